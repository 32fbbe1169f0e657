"""The outer loop: step, guard, log, checkpoint, evaluate, resume. What is learned, and how, is the method's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.config import option
from utils.errors import RunError, UserError
from utils.files import load_tensors, save_tensors
from utils.progress import progress
from utils.run import Run

PATIENCE = 100  # skipped steps in a row after which a run ends


@dataclass(frozen=True)
class OuterConfig:
    """How long the outer loop runs and how often it looks up."""

    # The papers stop near 2,000; the published default of 50,000 is for a run that someone watches.
    iterations: int = option(2000, "outer steps", aliases=("Iteration",), low=0, free=True)
    eval_it: int = option(100, "evaluate on validation every so many steps, and at the end (0: never)", low=0)
    checkpoint_every: int = option(20, "steps between checkpoints", low=1, free=True)
    momentum: float = option(0.5, "momentum of the outer rates", low=0)
    # DATM: a student that ends further off than it began has met a segment it cannot follow; its gradient only harms.
    threshold: float = option(
        0.0, "skip the update of a step whose loss is above this, or not finite (0: never)", low=0
    )
    clip_grad: float = option(
        0.0, "shorten the gradient of each learned tensor to this norm (0: never)", low=0, free=True
    )


class Learned(Protocol):
    """What an outer loop needs of the learned set."""

    leaves: list[Tensor]

    def param_groups(self) -> list[dict[str, Any]]: ...
    def project(self) -> None: ...
    def trouble(self) -> str | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def outer_loop(
    outer_step: Callable[[int], dict[str, float]],
    learned: Learned,
    cfg: OuterConfig,
    run: Run,
    evaluate: Callable[[int], float],
    keep: Callable[[int, bool], None],
) -> None:
    """Learn until `cfg.iterations`, resuming from the run folder's checkpoint where there is one.

    outer_step(step)    fills `.grad` of the leaves and returns numbers to log, `loss` among them
    evaluate(step)      a validation score, higher is better
    keep(step, best)    writes the learned set as it was evaluated, and at both ends; `best`: it scored best so far

    The run never goes on from a state that is not sound: a loss, gradient, pixel or rate that is not finite, or a rate
    that is not positive, raises RunError with the step, and leaves the last sound state in `checkpoint.pt`.
    """
    optimizer = torch.optim.SGD(learned.param_groups(), lr=0.0, momentum=cfg.momentum)
    checkpoint = _Checkpoint(learned, optimizer, run)
    first, best = checkpoint.restore() if run.resumed else (0, float("-inf"))
    gate = _Gate(cfg.threshold)
    with progress(total=cfg.iterations, initial=first, what="distill") as bar:
        for step in range(first, cfg.iterations + 1):
            ends = step in (0, cfg.iterations)
            before = best, run.rng_state()
            if cfg.eval_it and (ends or step % cfg.eval_it == 0):
                try:
                    score = evaluate(step)
                except RunError as error:
                    raise checkpoint.failure(str(error), step) from error
                keep(step, score > best)
                best = max(best, score)
            elif ends:
                keep(step, False)
            if step == cfg.iterations:
                checkpoint.save(step, *before)
                break
            optimizer.zero_grad(set_to_none=True)
            numbers = outer_step(step)
            trouble = _not_finite(numbers, learned.leaves)
            skip, fatal = gate.judge(numbers["loss"], trouble)
            if fatal:
                raise checkpoint.failure(fatal, step)
            # Finite pixels may still be so far off that nothing can be computed from them. What was just computed
            # shows that they were sound, so this is the moment to keep them.
            if not trouble and (ends or step % cfg.checkpoint_every == 0):
                checkpoint.save(step, *before)
            if skip:
                numbers["skipped"] = 1.0
            else:
                _shorten(learned.leaves, cfg.clip_grad)
                optimizer.step()
                learned.project()
            if trouble := learned.trouble():
                raise checkpoint.failure(trouble, step)
            run.log(step, **numbers)
            bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
            bar.update()


class _Gate:
    """Which steps change nothing: with a threshold, those whose loss is above it or not finite; `row` so far."""

    def __init__(self, threshold: float) -> None:
        self.threshold, self.row = threshold, 0

    def judge(self, loss: float, trouble: str | None) -> tuple[bool, str | None]:
        """Whether to skip a step, and what ends the run, if anything does; `trouble` is what is not finite in it."""
        if not self.threshold or (trouble is None and loss <= self.threshold):
            self.row = 0
            return False, trouble
        self.row += 1
        over = f"{PATIENCE} steps in a row had a loss above --threshold {self.threshold:g}"
        return True, over if self.row == PATIENCE else None


class _Checkpoint:
    """The last sound state of an outer loop, on disk. `step` is the one it was taken at, None before the first."""

    def __init__(self, learned: Learned, optimizer: torch.optim.Optimizer, run: Run) -> None:
        self.learned, self.optimizer, self.run = learned, optimizer, run
        self.path, self.step = run.folder / "checkpoint.pt", None

    def save(self, step: int, best: float, chance: dict[str, Tensor]) -> None:
        """Keep the present state; `best` and `chance` are the best score and the generators before this step."""
        state = {"step": step, "best": best, "rng": chance}
        save_tensors(
            self.path, state | {"learned": self.learned.state_dict(), "optimizer": self.optimizer.state_dict()}
        )
        self.step = step

    def restore(self) -> tuple[int, float]:
        """The step and best score of the state on disk, which is taken up; what was logged after it is forgotten."""
        step, best = 0, float("-inf")
        if self.path.exists():
            state = load_tensors(self.path, "checkpoint")
            try:
                self.learned.load_state_dict(state["learned"])
                # The rates are the config's, which may have changed on resuming; the momentum is the checkpoint's.
                rates = [group["lr"] for group in self.optimizer.param_groups]
                self.optimizer.load_state_dict(state["optimizer"])
                for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
                self.run.load_rng_state(state["rng"])
                self.step, step, best = state["step"], state["step"], state["best"]
            except (AttributeError, KeyError, ValueError, RuntimeError, TypeError) as error:
                reason = f"does not fit this run ({error}); remove it to start anew"
                raise UserError(f"checkpoint {self.path} {reason}") from None
        self.run.rewind(step)
        return step, best

    def failure(self, trouble: str, step: int) -> RunError:
        """The error that names the step and the state to go on from."""
        if self.step is None:
            return RunError(
                f"step {step}: {trouble}, before anything was learned; lower the inner rate (--lr_teacher...) "
                "or --syn_steps, or look at the experts"
            )
        return RunError(
            f"step {step}: {trouble}; the last good state is that of step {self.step} in {self.path}; "
            "lower the outer rates (or set --clamp_lr or --clip_grad) and --resume"
        )


def _not_finite(numbers: dict[str, float], leaves: list[Tensor]) -> str | None:
    for name, value in numbers.items():
        if not torch.isfinite(torch.tensor(value)):
            return f"{name} is {value}"
    grads = [leaf.grad.abs().sum() for leaf in leaves if leaf.grad is not None]
    return None if torch.isfinite(torch.stack(grads)).all() else "a gradient is not finite"


def _shorten(leaves: list[Tensor], norm: float) -> None:
    """Gradients of at most this norm, each by its own: that of a rate is far longer than that of an image."""
    for leaf in leaves if norm else ():
        if leaf.grad is not None:
            leaf.grad.mul_((norm / leaf.grad.norm().clamp_min(1e-30)).clamp_max(1))
