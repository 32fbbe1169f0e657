"""Expert trajectories are made here: networks trained alone or side by side, their weights kept epoch by epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.core.expert_files import Company, ExpertFiles
from methods.core.inner import Params
from methods.core.stack import Ascent, Stack, StackTrainer
from methods.core.store import DTYPES, TrajectoryStore
from methods.core.training import Recipe, Trainer
from networks.flat import FlatModule
from utils.config import option
from utils.errors import RunError, UserError
from utils.progress import progress
from utils.rng import derive_seed
from utils.run import Run
from utils.writer import HostCopy, Writer


@dataclass(frozen=True)
class ExpertConfig:
    """The experts: how many, how long, and what of them is kept."""

    num_experts: int = option(20, "independent experts", low=1, free=True)
    train_epochs: int = option(10, "epochs an expert", low=1)
    batch_size_train: int = option(128, "real items a batch; a last, smaller batch is dropped", low=1)
    mom: float = option(0.0, "momentum of the experts", low=0)
    l2: float = option(0.0, "weight decay of the experts", low=0)
    decay: bool = option(False, "all rates × 0.1 after epoch train_epochs // 2 + 1")
    save_epochs: tuple[int, ...] = option((), "epochs to keep, 0 is before training (empty: all)", low=0)
    store_dtype: str = option("float32", "numbers on disk; bfloat16 halves them", choices=tuple(DTYPES))
    eval_freq: int = option(1, "score on validation every so many epochs (0: never)", low=0, free=True)

    def check(self) -> None:
        if self.save_epochs and max(self.save_epochs) > self.train_epochs:
            raise UserError(f"save_epochs names {max(self.save_epochs)}, but experts train {self.train_epochs} epochs")

    def recipe(self, lr: dict[str, float]) -> Recipe:
        milestones = (self.train_epochs // 2 + 1,) if self.decay else ()
        return Recipe(lr, self.train_epochs, self.mom, self.l2, milestones)


@dataclass(frozen=True)
class ClassExpertConfig(ExpertConfig):
    """Experts that classify: MTT's numbers, and FTD's way to train them."""

    num_experts: int = option(100, "independent experts", low=1, free=True)
    train_epochs: int = option(50, "epochs an expert", low=1)
    batch_size_train: int = option(256, "real images a batch", aliases=("batch_train",), low=1)
    decay: bool = option(False, "rate × 0.1, momentum lost, after epoch train_epochs // 2 + 1, counted from 0")
    together: int = option(1, "experts trained side by side, as one stack (with batch norm: one)", low=1, free=True)
    rho: float = option(0.0, "radius of GSAM, constant (FTD: 0.01; 0: plain SGD)", aliases=("rho_max",), low=0)
    rho_min: float | None = option(None, "as FTD spells it; only the same as --rho", low=0)
    gsam_alpha: float = option(0.3, "weight of GSAM's orthogonal part (FTD: 0.3 or 1)", aliases=("alpha",), low=0)
    adaptive: bool = option(True, "GSAM's step uphill in units of each weight")

    def check(self) -> None:
        super().check()
        if self.rho_min is not None and self.rho_min != self.rho:
            raise UserError(
                f"--rho_min {self.rho_min:g} is not --rho_max {self.rho:g}: the radius is constant; give the same twice"
            )

    def idle(self) -> dict[str, str]:
        return {} if self.rho else dict.fromkeys(("gsam_alpha", "adaptive"), "--rho (FTD: 0.01)")

    def recipe(self, lr: dict[str, float]) -> Recipe:
        milestones = (self.train_epochs // 2 + 2,) if self.decay else ()
        return Recipe(lr, self.train_epochs, self.mom, self.l2, milestones, reset_momentum=True)


@dataclass(frozen=True)
class ExpertTask:
    """What experts are trained to do.

    net, flat      the network, and its weight groups as flat vectors
    renew(seed)    begins a new expert in place
    batches(expert, epoch), loss_fn(batch), score()   the data, its loss, and the metrics on validation
    prepare()      makes what these keep in files, where it is not there
    """

    net: nn.Module
    flat: dict[str, FlatModule]
    renew: Callable[[int], None]
    batches: Callable[[int, int], Iterable[Any]]
    loss_fn: Callable[[Any], Tensor]
    score: Callable[[], dict[str, float]]
    prepare: Callable[[], None] = lambda: None


def train_experts(task: ExpertTask, store: TrajectoryStore, cfg: ExpertConfig, lr: dict[str, float], run: Run) -> None:
    """Train the experts that `store` still lacks, one after another; several processes each train the next that nobody
    has begun.

    Between two epochs the whole state of an expert under training is on disk (expert_files.py), so a run that was
    killed goes on there, on as many processes as there are then, and ends with the same files as one that was not.
    Snapshots and states are written while training goes on.
    """
    groups = {group: flat.parameters() for group, flat in task.flat.items()}

    def prepare() -> None:
        with run.ranks.in_turn():
            task.prepare()

    def begin(experts: range) -> _Trainees:
        (expert,) = experts
        seed = _seed(run, expert)
        task.renew(derive_seed(seed, "weights"))
        trainer = Trainer(task.net, groups, cfg.recipe(lr), seed)
        return _Trainees(
            trainer,
            fit=lambda on_epoch, what: trainer.fit(
                lambda epoch: task.batches(expert, epoch), task.loss_fn, lambda _, loss: on_epoch([loss]), what
            ),
            snapshots=lambda: [{group: flat.flatten() for group, flat in task.flat.items()}],
            score=lambda: [task.score()],
        )

    _train_all(begin, 1, store, cfg, run, prepare)


def train_class_experts(
    net: nn.Module,
    batches: Callable[[int, int], Iterable[tuple[Tensor, Tensor]]],
    score: Callable[[Callable[[Tensor], Tensor]], dict[str, float]],
    store: TrajectoryStore,
    cfg: ClassExpertConfig,
    lr: float,
    run: Run,
    forward: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Train the classifiers that `store`, of the one group `net`, still lacks, `cfg.together` side by side.

    net                      of which all experts are copies
    batches(expert, epoch)   images (B, C, H, W), augmented, with labels (B,) long or (B, K) probabilities
    score(logits)            the metrics on validation of an expert that gives logits(images) in evaluation mode
    forward                  what networks that learn run in: a fresh context (precision.py)

    An expert's way is the same in any company, to float tolerance. Interruptions are as for `train_experts`.
    """
    stack, ascent = Stack(net, forward=forward), Ascent(cfg.rho, cfg.gsam_alpha, cfg.adaptive)

    def begin(experts: range) -> _Trainees:
        seeds = [_seed(run, expert) for expert in experts]
        weights = stack.draw([derive_seed(seed, "weights") for seed in seeds])
        names = [f"expert {expert}" for expert in experts]
        trainer = StackTrainer(stack, weights, cfg.recipe({"net": lr}), seeds, ascent, names if len(names) > 1 else ())

        def side_by_side(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for own in zip(*(batches(expert, epoch) for expert in experts), strict=True):
                images, labels = zip(*own, strict=True)
                yield torch.stack(images), torch.stack(labels)

        def scores() -> list[dict[str, float]]:
            net.eval()
            return [score(functools.partial(stack.flat, row)) for row in trainer.weights]

        return _Trainees(
            trainer,
            fit=lambda on_epoch, what: trainer.fit(side_by_side, lambda _, loss: on_epoch(loss.tolist()), what),
            snapshots=lambda: [{"net": row} for row in trainer.weights],
            score=scores,
        )

    _train_all(begin, 1 if stack.single else cfg.together, store, cfg, run)


@dataclass(frozen=True)
class _Trainees:
    """Experts under training: all lists have one item each.

    fit(on_epoch, what)   trains to the end and calls on_epoch(losses) after each epoch
    """

    trainer: Trainer | StackTrainer
    fit: Callable[[Callable[[list[float]], None], str], None]
    snapshots: Callable[[], list[Params]]
    score: Callable[[], list[dict[str, float]]]


def _train_all(
    begin: Callable[[range], _Trainees],
    together: int,
    store: TrajectoryStore,
    cfg: ExpertConfig,
    run: Run,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Train what `store` lacks in companies of `together`, which begin(expert numbers) starts; `prepare` where it lacks
    any."""
    files = ExpertFiles(store, run, cfg.train_epochs)
    plan: list[Company] = run.ranks.broadcast(files.plan(cfg.num_experts, together) if run.ranks.first else None)
    if plan:
        prepare()
    lacking = sum(len(company.experts) for company in plan)
    total = max(cfg.num_experts, lacking)
    with progress(what="experts", initial=total - lacking, total=total) as bar, Writer() as writer:
        for company in run.ranks.share(plan, "experts"):
            trainees, state = begin(company.experts), files.load(company)
            if state is not None:
                trainees.trainer.load_state_dict(state)
                writer.submit(functools.partial(files.begin, company))
            _train_company(trainees, company, files, writer, cfg, run)
            writer.submit(functools.partial(files.finish, company))
            bar.update(len(company.experts))
    run.ranks.all(None)  # whoever has no expert left waits here for those who have
    files.collect_all()


def _train_company(
    trainees: _Trainees, company: Company, files: ExpertFiles, writer: Writer, cfg: ExpertConfig, run: Run
) -> None:
    trainer, keep, experts = trainees.trainer, set(cfg.save_epochs) or set(range(cfg.train_epochs + 1)), company.experts

    def store_all(metrics: list[dict[str, float]]) -> None:
        """Hand on the snapshots, if this epoch is kept, and the state from which to go on."""
        epoch = trainer.epoch
        snapshots = trainees.snapshots() if epoch in keep else [None] * len(experts)
        for expert, snapshot in zip(experts, snapshots, strict=True):
            _check_finite(expert, epoch, snapshot or {})
        kind = DTYPES[files.store.dtype]
        kept = HostCopy([part and {group: vector.to(kind) for group, vector in part.items()} for part in snapshots])
        state = HostCopy(trainer.state_dict()) if epoch else None

        def write() -> None:
            for expert, snapshot, numbers in zip(experts, kept.get(), metrics, strict=True):
                files.store.add(expert, epoch, snapshot, _seed(run, expert), numbers)
            if state is not None:
                files.save(company, state.get())

        writer.submit(write)

    def on_epoch(losses: list[float]) -> None:
        due = cfg.eval_freq and (trainer.epoch % cfg.eval_freq == 0 or trainer.epoch == cfg.train_epochs)
        scores = trainees.score() if due else [{}] * len(experts)
        store_all([{"loss": loss} | score for loss, score in zip(losses, scores, strict=True)])

    if trainer.epoch == 0:
        store_all([{}] * len(experts))
    what = f"expert {experts[0]}" if len(experts) == 1 else f"experts {experts[0]} to {experts[-1]}"
    trainees.fit(on_epoch, what)


def _check_finite(expert: int, epoch: int, snapshot: Params) -> None:
    for group, vector in snapshot.items():
        if not torch.isfinite(vector.sum()):  # after its last step an expert has no loss that would tell
            raise RunError(
                f"expert {expert}: the weights of {group} are not finite after epoch {epoch}; lower the rate"
            )


def _seed(run: Run, expert: int) -> int:
    return derive_seed(run.seed, "expert", expert)
