"""Expert trajectories are made here: one network after another, its weights kept epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.core.training import Recipe, Trainer
from methods.core.trajectories import DTYPES, TrajectoryStore
from networks.flat import FlatModule
from utils.config import option
from utils.errors import RunError, UserError
from utils.files import load_tensors, save_tensors
from utils.progress import progress
from utils.rng import derive_seed
from utils.run import Run


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
class ExpertTask:
    """What experts are trained to do.

    net, flat      the network, and its weight groups as flat vectors
    renew(seed)    begins a new expert in place
    batches(expert, epoch), loss_fn(batch), score()   the data, its loss, and the metrics on validation
    """

    net: nn.Module
    flat: dict[str, FlatModule]
    renew: Callable[[int], None]
    batches: Callable[[int, int], Iterable[Any]]
    loss_fn: Callable[[Any], Tensor]
    score: Callable[[], dict[str, float]]


def train_experts(task: ExpertTask, store: TrajectoryStore, cfg: ExpertConfig, lr: dict[str, float], run: Run) -> None:
    """Train the experts that `store` still lacks.

    Between two epochs the whole state of the expert under training is in `progress.pt`, so a run that was killed goes
    on there and ends with the same snapshots as one that was not.
    """
    keep = set(cfg.save_epochs) or set(range(cfg.train_epochs + 1))
    groups = {group: flat.parameters() for group, flat in task.flat.items()}
    unfinished = run.folder / "progress.pt"
    done = sum(expert["done"] for expert in store.experts)
    for expert in progress(range(done, cfg.num_experts), what="experts", initial=done, total=cfg.num_experts):
        seed = derive_seed(run.seed, "expert", expert)
        task.renew(derive_seed(seed, "weights"))
        trainer = Trainer(task.net, groups, cfg.recipe(lr), seed)
        if run.resumed and unfinished.exists():
            state = load_tensors(unfinished, "expert in progress", remedy="remove it to begin that expert anew")
            if state["expert"] == expert:
                trainer.load_state_dict(state)
        first_row = expert * (cfg.train_epochs + 1)
        run.rewind(first_row + trainer.epoch + 1)
        if trainer.epoch == 0:
            _keep(task, store, expert, 0, seed, {}, keep)

        def on_epoch(
            epoch: int,
            loss: float,
            expert: int = expert,
            first_row: int = first_row,
            seed: int = seed,
            trainer: Trainer = trainer,
        ) -> None:
            due = cfg.eval_freq and (epoch % cfg.eval_freq == 0 or epoch == cfg.train_epochs)
            metrics = {"loss": loss} | (task.score() if due else {})
            _keep(task, store, expert, epoch, seed, metrics, keep)
            run.log(first_row + epoch, expert=expert, epoch=epoch, **metrics)
            save_tensors(unfinished, {"expert": expert} | trainer.state_dict())

        what = f"expert {expert}"
        trainer.fit(lambda epoch, expert=expert: task.batches(expert, epoch), task.loss_fn, on_epoch, what)
        store.finish(expert)
        unfinished.unlink(missing_ok=True)


def _keep(
    task: ExpertTask, store: TrajectoryStore, expert: int, epoch: int, seed: int, metrics: dict, keep: set[int]
) -> None:
    snapshot = {group: flat.flatten() for group, flat in task.flat.items()} if epoch in keep else None
    for group, vector in (snapshot or {}).items():
        if not torch.isfinite(vector.sum()):  # after its last step an expert has no loss that would tell
            raise RunError(
                f"expert {expert}: the weights of {group} are not finite after epoch {epoch}; lower the rate"
            )
    store.add(expert, epoch, snapshot, seed, metrics)
