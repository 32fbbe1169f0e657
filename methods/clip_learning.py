"""How the student of `--method dimefm` learns (distill.py): steps, rates, checkpoints, on one process or on several.

AdamW, weight decay for matrices only, and rates by step: with W steps of warm-up among all M,

    rate = low + (peak − low) t / W                 t < W,   low: --warmup_lr, peak: --base_lr
    rate = least + (peak − least)(1 + cos πt/M) / 2    after,  least: --min_lr

where t is the step before, since the released code moves its schedule after the optimiser; the cosine counts the
warm-up's steps too, so that the rate falls a little as the warm-up ends.

Several processes (torchrun) each take a share of every batch. The loss needs all images at once, so the student's
features are gathered, each process finds the gradient that flows through its own, and the gradients are added up: what
one process would have found, to the rounding of sums. Only the first process writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.pools import refuse_bad
from methods.clip_batches import Batch, BatchConfig, HeldOut, Unpaired
from methods.clip_depth import Depths
from methods.core.checkpoints import Checkpoints
from networks.clip_students import ImageStudent, StudentSpec, decay_groups, student_state
from utils.config import option, section
from utils.errors import RunError, UserError
from utils.files import save_tensors
from utils.progress import progress
from utils.ranks import Ranks
from utils.rng import derive_seed, seeded
from utils.run import Run
from utils.stopping import stoppable

STUDENT = "student.pt"  # the last epoch's student, in the run's folder
_ENOUGH = 1000  # images after which their undecodable share is judged before the epoch ends

Losses = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class LearnConfig:
    """How the student learns."""

    batches: BatchConfig = section(BatchConfig)
    epochs: int = option(100, "times that the images are gone through", low=1)
    base_lr: float = option(8e-4, "rate of AdamW at its peak", above=0)
    warmup_lr: float = option(4e-6, "rate of the first step", low=0)
    min_lr: float = option(4e-5, "rate that the cosine ends at", low=0)
    warmup_epochs: float = option(4.0, "epochs over which the rate rises", low=0)
    weight_decay: float = option(0.05, "weight decay of matrices; vectors, biases and positions have none", low=0)
    amp: bool = option(False, "half precision in the student: float16 on a GPU, bfloat16 on the CPU; never in the loss")
    steps: int = option(0, "end after so many steps, as if interrupted there (0: after the last)", low=0, free=True)
    print_freq: int = option(100, "steps between two lines of the log", low=1, free=True)
    checkpoint_every: float = option(1.0, "epochs between checkpoints, such as 0.1", above=0, free=True)
    keep: int = option(2, "checkpoints kept (0: all)", low=0, free=True)
    local_rank: int = option(-1, "process number that an old launcher adds; torchrun's is enough", low=-1, free=True)

    def check(self) -> None:
        check_rate(self.base_lr, "base_lr")
        check_rate(self.warmup_lr, "warmup_lr")
        if self.min_lr > self.base_lr:
            raise UserError(
                f"--min_lr {self.min_lr:g} is above --base_lr {self.base_lr:g}, so that rates would rise to the end; "
                "lower it too"
            )


def check_rate(rate: float, flag: str) -> None:
    """UserError for a rate that AdamW cannot count with: more than it itself fits in float32."""
    if rate > 1e30:
        raise UserError(f"--{flag} is {rate:g}, which float32 hardly holds; give a rate such as 1e-3")


def published_rate(step: int, steps: int, warmup: int, base: float, warm: float, low: float) -> float:
    """The rate of step `step` (from 0) of `steps`, of which `warmup` warm up."""
    before = max(step - 1, 0)
    if before < warmup:
        return warm + (base - warm) * before / warmup
    return low + (base - low) * (1 + math.cos(math.pi * before / steps)) / 2


class Learner:
    """A student under training, whose whole state can be saved between two steps.

    losses  (teacher's images, sentences, student's images) → terms by name, `loss` among them
    done    steps taken; `seen` images asked for, `bad` of them could not be decoded
    """

    def __init__(
        self, net: nn.Module, losses: Losses, cfg: LearnConfig, per_epoch: int, seed: int, ranks: Ranks
    ) -> None:
        self.net, self.losses, self.cfg, self.seed, self.ranks = net, losses, cfg, seed, ranks
        self.steps, self.warmup = cfg.epochs * per_epoch, int(cfg.warmup_epochs * per_epoch)
        self.done = self.seen = self.bad = 0
        self.agreements: list[float] = []
        kind = ranks.device.type
        self.half = None if not cfg.amp else torch.bfloat16 if kind == "cpu" else torch.float16
        groups = decay_groups(net, cfg.weight_decay)
        # Fused: gradients that overflow are then passed over on the GPU, without the processor waiting to know.
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=kind == "cuda")
        self.scaler = torch.amp.GradScaler(kind, enabled=self.half is torch.float16)
        rows = cfg.batches.batch_size
        self.depths = Depths(net, seed, rows, ranks.part(rows, "--batch_size"))
        # Once, not in each step: a copy to a GPU from ordinary memory waits until all steps before are done.
        self._mean, self._std = (torch.tensor(part, device=ranks.device).view(3, 1, 1) for part in (net.mean, net.std))
        self._unread: list[Tensor] = []

    def step(self, batch: Batch) -> int:
        """Learn from a batch, of which every process has its share; how many of all its images were decoded."""
        device = self.ranks.device
        decoded = self.ranks.gather(batch.decoded)  # by the processors, so that none has to ask its GPU
        self.optimizer.zero_grad(set_to_none=True)
        self.depths.draw(self.done, device)
        chance = derive_seed(self.seed, "chance", self.done, self.ranks.rank)
        with seeded(chance, device), torch.autocast(device.type, self.half, enabled=self.half is not None):
            student = self.net(self._pixels(batch.views.to(device, non_blocking=True)))
        if student.dtype != torch.float64:
            student = student.float()
        images, texts = (
            self.ranks.gather(part.to(device, student.dtype, non_blocking=True)) for part in (batch.images, batch.texts)
        )
        student = self.ranks.gather(student, grad=True)
        count = int(decoded.sum())
        if count < len(decoded):
            there = decoded.nonzero().squeeze(1).to(device, non_blocking=True)
            images, student = images[there], student[there]
        if count:
            self._descend(self.losses(images, texts, student))
        self.done, self.seen, self.bad = self.done + 1, self.seen + len(decoded), self.bad + len(decoded) - count
        return count

    def _descend(self, terms: dict[str, Tensor]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.scaler.scale(terms["loss"]).backward()
        self.ranks.add_([weight.grad for weight in self.net.parameters() if weight.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.names = tuple(terms)
        self._unread.append(torch.stack([term.detach() for term in terms.values()]))

    def rate(self) -> float:
        """Of the next step."""
        cfg = self.cfg
        return published_rate(self.done, self.steps, self.warmup, cfg.base_lr, cfg.warmup_lr, cfg.min_lr)

    def read(self, forget: bool = True) -> dict[str, float]:
        """Mean of each term over the steps since it was last read: the one place where the processor waits for the GPU.

        forget   the next mean is of the steps from here on
        RunError naming the step, counted from 1, at which the loss is not finite.
        """
        if not self._unread:
            return {}
        terms = torch.stack(self._unread).double().cpu()  # (steps, terms)
        self._unread = [] if forget else self._unread
        failed = (~terms.isfinite().all(1)).nonzero()
        if len(failed):
            step = self.done - len(terms) + 1 + int(failed[0])
            raise RunError(f"step {step}: the loss is not finite; lower --base_lr, or leave out --amp")
        return dict(zip(self.names, terms.mean(0).tolist(), strict=True))

    def check_weights(self) -> None:
        """RunError where they are not finite, which the loss would tell one step too late."""
        if not torch.stack([weight.isfinite().all() for weight in self.net.parameters()]).all():
            raise RunError(f"step {self.done}: the weights are not finite; lower --base_lr, or leave out --amp")

    @torch.no_grad()
    def agreement(self, held: HeldOut) -> float:
        """How often (%) the student's closest sentence to an image it never learned from is the teacher's."""
        size = max(1, self.cfg.batches.batch_size // self.ranks.world)
        texts = held.texts.to(self.ranks.device)
        self.net.eval()
        picked = [(self._features(part).float() @ texts.T).argmax(1).cpu() for part in held.views.split(size)]
        self.net.train()
        return 100 * float((torch.cat(picked) == held.picked).double().mean())

    def _features(self, views: Tensor) -> Tensor:
        return self.net(self._pixels(views.to(self.ranks.device)))

    def _pixels(self, views: Tensor) -> Tensor:
        return (views.float() / 255 - self._mean) / self._std

    def state_dict(self) -> dict[str, Any]:
        state = {
            "student": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "counters": {"step": self.done, "seen": self.seen, "bad": self.bad, "agreements": self.agreements},
        }
        if self._unread:  # of a state that was kept between two lines of the log
            state["unread"] = {"names": list(self.names), "terms": torch.stack(self._unread)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        counters = state["counters"]
        self.done, self.seen, self.bad = counters["step"], counters["seen"], counters["bad"]
        self.agreements = list(counters["agreements"])
        if unread := state.get("unread"):
            self.names, self._unread = tuple(unread["names"]), list(unread["terms"].to(self.ranks.device))


@dataclass(frozen=True)
class Learned:
    """How a student's training went.

    steps        taken, of `planned`
    agreements   % with the teacher's choice of a sentence for held-out images: before training, and after each epoch
    chance       % of it by chance; 0 where nothing is held out
    undecodable  images that were passed over, of `seen`
    """

    steps: int
    planned: int
    agreements: tuple[float, ...]
    chance: float
    undecodable: int
    seen: int


def learn(
    cfg: LearnConfig,
    net: ImageStudent,
    spec: StudentSpec,
    feed: Unpaired,
    losses: Losses,
    run: Run,
    bad_images: float = 0.01,
    note: dict[str, Any] | None = None,
) -> Learned:
    """Take all steps that are left, from the last checkpoint on; the student, in the end as at each epoch's, is in
    `student.pt` of the run's folder. A signal ends the training after the step that is under way, whose state is kept.

    losses      as `Learner` takes them
    bad_images  share of images that cannot be decoded beyond which the run is stopped, by UserError
    note        goes into student.pt: of which teacher it is
    """
    learner, checkpoints, first = _begin(cfg, net, feed, losses, run)
    last = min(cfg.steps, learner.steps) if cfg.steps else learner.steps
    held = feed.held_out() if run.ranks.first else None
    if not first:
        _look(learner, held, run, 0)
    with (
        progress(total=last, initial=first, what="distill", disable=not run.ranks.first) as bar,
        closing(feed.stream(range(first, last))) as source,
        stoppable(run.ranks) as stop,
    ):
        for step, batch in enumerate(source, first + 1):
            if not learner.step(batch):
                raise UserError(f"no image of step {step} can be decoded, such as {feed.example()}; mend the images")
            over = step % feed.per_epoch == 0 or step == last
            kept = over or checkpoints.due(step)
            if kept or step % cfg.print_freq == 0:
                rate = published_rate(step - 1, learner.steps, learner.warmup, cfg.base_lr, cfg.warmup_lr, cfg.min_lr)
                numbers = _read(learner, checkpoints, kept)
                bar.set_postfix(loss=f"{numbers['loss']:.3f}", refresh=False)
                run.log(step - 1, **numbers, lr=rate, undecodable=learner.bad)
            if over or learner.seen >= _ENOUGH:
                refuse_bad(learner.bad, learner.seen, bad_images, feed.example())
            if over:
                _look(learner, held, run, step)
            if kept and run.ranks.first:
                told = (note or {}) | {"steps": step, "epochs": step / feed.per_epoch}
                save_tensors(run.folder / STUDENT, student_state(net, spec, told))
                checkpoints.save(step, learner, run.log_sum(step))
            if stop.asked:
                if not kept:
                    _read(learner, checkpoints, True, forget=False)
                    if run.ranks.first:
                        checkpoints.save(step, learner, run.log_sum(step))
                stop.end()
            bar.update()
    net.eval()
    chance = 100 / len(held.texts) if held else 0.0
    return Learned(learner.done, learner.steps, tuple(learner.agreements), chance, learner.bad, learner.seen)


def _begin(
    cfg: LearnConfig, net: ImageStudent, feed: Unpaired, losses: Losses, run: Run
) -> tuple[Learner, Checkpoints, int]:
    """The learner as the last checkpoint has it, the same in every process; the checkpoints, and the steps taken."""
    _check_processes(net, run.ranks)
    if cfg.warmup_epochs >= cfg.epochs:
        print(f"note: the rate only rises: --warmup_epochs {cfg.warmup_epochs:g} is all of --epochs {cfg.epochs}")
    if cfg.amp and run.device.type == "cpu":
        print("note: half precision is bfloat16 on the CPU")
    learner = Learner(net.to(run.device).train(), losses, cfg, feed.per_epoch, run.seed, run.ranks)
    every = max(1, round(cfg.checkpoint_every * feed.per_epoch))
    checkpoints = Checkpoints(run.folder, "checkpoint", every, cfg.keep, epoch=feed.per_epoch)
    first = checkpoints.restore(learner)
    run.check_same(first, len(feed.rows), len(feed.texts))
    run.ranks.copy_([*net.parameters(), *net.buffers()])
    run.rewind(first, checkpoints.log_sum)
    return learner, checkpoints, first


def _read(learner: Learner, checkpoints: Checkpoints, keep: bool, forget: bool = True) -> dict[str, float]:
    """What the learner reads; where that is not finite, or the weights to `keep` are not, the error tells where to go
    on from."""
    try:
        numbers = learner.read(forget)
        if keep:
            learner.check_weights()
        return numbers
    except RunError as error:
        kept = checkpoints.found()
        where = f"goes on from the last checkpoint, of step {kept[-1][0]}" if kept else "begins anew"
        raise RunError(f"{error}; --resume {where}") from None


def _look(learner: Learner, held: HeldOut | None, run: Run, step: int) -> None:
    """Log the agreement after so many steps."""
    if held is not None:
        learner.agreements.append(learner.agreement(held))
        run.log(max(step - 1, 0), agreement=learner.agreements[-1])


def _check_processes(net: nn.Module, ranks: Ranks) -> None:
    """UserError for a network that would learn otherwise on several processes."""
    if ranks.world > 1 and any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in net.modules()):
        raise UserError(
            f"this student normalises over the batch, of which {ranks.world} processes see a part each; train it in "
            "one process, or choose a student without batch normalisation"
        )
