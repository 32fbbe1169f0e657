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


@dataclass(frozen=True)
class OuterConfig:
    """How long the outer loop runs and how often it looks up."""

    # The papers stop near 2,000; the published default of 50,000 is for a run that someone watches.
    iterations: int = option(2000, "outer steps", aliases=("Iteration",), low=0, free=True)
    eval_it: int = option(100, "evaluate on validation every so many steps, and at the end (0: never)", low=0)
    checkpoint_every: int = option(20, "steps between checkpoints", low=1, free=True)
    momentum: float = option(0.5, "momentum of every outer rate", low=0)


class Learned(Protocol):
    """What an outer loop needs of the learned set."""

    leaves: list[Tensor]

    def param_groups(self) -> list[dict[str, Any]]: ...
    def project(self) -> None: ...
    def trouble(self) -> str | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def outer_loop(
    outer_step: Callable[[], dict[str, float]],
    learned: Learned,
    cfg: OuterConfig,
    run: Run,
    evaluate: Callable[[int], float],
    keep: Callable[[int, bool], None],
) -> None:
    """Learn until `cfg.iterations`, resuming from the run folder's checkpoint where there is one.

    outer_step()        fills `.grad` of the leaves and returns numbers to log, `loss` among them
    evaluate(step)      a validation score, higher is better
    keep(step, best)    writes the learned set as it was evaluated, and at both ends; `best`: it scored best so far

    The run never goes on from a state that is not sound: a loss, gradient, pixel or rate that is not finite, or a rate
    that is not positive, raises RunError with the step, and leaves the last sound state in `checkpoint.pt`.
    """
    optimizer = torch.optim.SGD(learned.param_groups(), lr=0.0, momentum=cfg.momentum)
    path = run.folder / "checkpoint.pt"
    first, best, saved = 0, float("-inf"), None
    if run.resumed:
        if path.exists():
            first, best = _restore(path, learned, optimizer, run)
            saved = first
        run.rewind(first)

    def checkpoint(step: int, best: float, chance: dict[str, Tensor]) -> None:
        nonlocal saved
        state = {"step": step, "best": best, "rng": chance}
        save_tensors(path, state | {"learned": learned.state_dict(), "optimizer": optimizer.state_dict()})
        saved = step

    with progress(total=cfg.iterations, initial=first, what="distill") as bar:
        for step in range(first, cfg.iterations + 1):
            ends = step in (0, cfg.iterations)
            due = ends or step % cfg.checkpoint_every == 0
            before = best, run.rng_state()
            if cfg.eval_it and (ends or step % cfg.eval_it == 0):
                try:
                    score = evaluate(step)
                except RunError as error:
                    raise _failure(str(error), step, saved, run) from error
                keep(step, score > best)
                best = max(best, score)
            elif ends:
                keep(step, False)
            if step == cfg.iterations:
                checkpoint(step, *before)
                break
            optimizer.zero_grad(set_to_none=True)
            numbers = outer_step()
            if trouble := _not_finite(numbers, learned.leaves):
                raise _failure(trouble, step, saved, run)
            # Finite pixels may still be so far off that nothing can be computed from them. What was just computed
            # shows that they were sound, so this is the moment to keep them.
            if due:
                checkpoint(step, *before)
            optimizer.step()
            learned.project()
            if trouble := learned.trouble():
                raise _failure(trouble, step, saved, run)
            run.log(step, **numbers)
            bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
            bar.update()


def _restore(path: Any, learned: Learned, optimizer: torch.optim.Optimizer, run: Run) -> tuple[int, float]:
    state = load_tensors(path, "checkpoint")
    try:
        learned.load_state_dict(state["learned"])
        # The rates are the config's, which may have been changed on resuming; the momentum is the checkpoint's.
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        run.load_rng_state(state["rng"])
        return state["step"], state["best"]
    except (AttributeError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"checkpoint {path} does not fit this run ({error}); remove it to start anew") from None


def _not_finite(numbers: dict[str, float], leaves: list[Tensor]) -> str | None:
    for name, value in numbers.items():
        if not torch.isfinite(torch.tensor(value)):
            return f"{name} is {value}"
    grads = [leaf.grad.abs().sum() for leaf in leaves if leaf.grad is not None]
    return None if torch.isfinite(torch.stack(grads)).all() else "a gradient is not finite"


def _failure(trouble: str, step: int, saved: int | None, run: Run) -> RunError:
    if saved is None:
        return RunError(
            f"step {step}: {trouble}, before anything was learned; lower the inner rates (--lr_teacher_img, "
            "--lr_teacher_txt) or --syn_steps, or look at the experts"
        )
    return RunError(
        f"step {step}: {trouble}; the last good state is that of step {saved} in {run.folder}/checkpoint.pt; "
        "lower the outer rates (or set --clamp_lr) and --resume"
    )
