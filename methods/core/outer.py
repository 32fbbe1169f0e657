"""The outer loop: step, guard, log, checkpoint, evaluate, resume. What is learned, and how, is the method's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.config import option
from utils.errors import Lost, RunError, UserError
from utils.files import check_version, digest, load_tensors, save_tensors
from utils.progress import progress
from utils.ranks import Ranks
from utils.run import Run
from utils.stopping import Stop, stoppable

FORMAT = 1  # of checkpoint.pt; what has none is of the first
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

    def plan(self, segments: int = 1) -> Plan:
        """SGD with momentum; evaluations every so many steps and at both ends. `segments`: of a step."""
        return Plan(
            iterations=self.iterations,
            due=lambda step: bool(self.eval_it) and (step % self.eval_it == 0 or step == self.iterations),
            optimizer=functools.partial(torch.optim.SGD, lr=0.0, momentum=self.momentum),
            checkpoint_every=self.checkpoint_every,
            threshold=self.threshold,
            clip_grad=self.clip_grad,
            segments=segments,
        )


@dataclass(frozen=True)
class Plan:
    """How an outer loop moves, when it looks up, and what it passes over.

    due               whether to evaluate before this step (and, at `iterations`, at the end)
    optimizer         of the learned set's parameter groups
    checkpoint_every  steps
    threshold         a step whose loss is above this, or not finite, changes nothing (0: never so)
    tolerant          a step whose loss or gradient is not finite changes nothing, rather than end the run
    patience          steps in a row that may change nothing, before the run ends
    clip_grad         longest gradient of each learned tensor (0: any)
    segments          whose gradients each step averages: a run may not go on with more or fewer
    show_every        steps between two losses on the progress bar
    needs_log         whether the steps to come follow from what was logged
    finished          after the evaluation at a step: whether the run is over before its time
    advice            what to do when the run ends at a bad state: where nothing was learned yet, and where there is a
                      state to go on from
    """

    iterations: int
    due: Callable[[int], bool]
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    checkpoint_every: int
    threshold: float = 0.0
    tolerant: bool = False
    patience: int = PATIENCE
    clip_grad: float = 0.0
    segments: int = 1
    show_every: int = 1
    needs_log: bool = False
    finished: Callable[[int], bool] = lambda step: False
    advice: tuple[str, str] = (
        "lower the inner rate (--lr_teacher...) or --syn_steps, or look at the experts",
        "lower the outer rates (or set --clamp_lr or --clip_grad)",
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
    plan: Plan,
    run: Run,
    evaluate: Callable[[int], float],
    keep: Callable[[int, bool], None],
) -> None:
    """Learn until `plan.iterations`, resuming from the run folder's checkpoint where there is one.

    outer_step(step)    fills `.grad` of the leaves and returns numbers to log, `loss` among them
    evaluate(step)      a validation score, higher is better
    keep(step, best)    writes the learned set as it was evaluated, and at both ends; `best`: it scored best so far

    Several processes take each step alike: their `outer_step` leaves the same numbers and gradients in all of them, as
    `evaluate` does its score.

    The run never goes on from a state that is not sound: a loss, gradient, pixel or rate that is not finite, or a rate
    that is not positive, raises RunError with the step, and leaves the last sound state in `checkpoint.pt`.

    A signal (utils/stopping.py) breaks an evaluation off, but not a step: what it computes shows that the state which
    it started from is sound, and that is the one that is kept.
    """
    optimizer = plan.optimizer(learned.param_groups())
    gate = _Gate(plan)
    checkpoint = _Checkpoint(learned, optimizer, run, plan)
    first, best, gate.row = checkpoint.restore() if run.resumed else (0, float("-inf"), 0)
    _begin_alike(learned, run.ranks)
    with progress(total=plan.iterations, initial=first, what="distill") as bar, stoppable(run.ranks) as stop:
        for step in range(first, plan.iterations + 1):
            before = best, run.rng_state(), gate.row
            best, over, asked = _look(step, best, plan, evaluate, keep, checkpoint, stop)
            if over and not asked:
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
            asked = stop.asked
            if not trouble and (asked or step == 0 or step % plan.checkpoint_every == 0):
                checkpoint.save(step, *before)
            if asked:
                stop.end()
            if skip:
                numbers = {name: value for name, value in numbers.items() if math.isfinite(value)} | {"skipped": 1.0}
            else:
                _move(learned, optimizer, plan)
            if trouble := learned.trouble():
                raise checkpoint.failure(trouble, step)
            run.log(step, **numbers)
            if step % plan.show_every == 0 and "loss" in numbers:
                bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
            bar.update()


def _look(
    step: int,
    best: float,
    plan: Plan,
    evaluate: Callable[[int], float],
    keep: Callable[[int, bool], None],
    checkpoint: _Checkpoint,
    stop: Stop,
) -> tuple[float, bool, bool]:
    """Evaluate before a step, if that is due: the best score by now, whether the run is over, and whether a signal came
    first, which leaves nothing of the evaluation."""
    over = step == plan.iterations
    if not plan.due(step):
        if over or step == 0:
            keep(step, False)
        return best, over, False
    if stop.asked:
        return best, over, True
    with stop.at_once():
        score = _score(evaluate, step, checkpoint)
    if stop.asked:
        return best, over, True
    keep(step, score > best)
    return max(best, score), over or plan.finished(step), False


def _move(learned: Learned, optimizer: torch.optim.Optimizer, plan: Plan) -> None:
    """Take the step that the gradients ask for."""
    _shorten(learned.leaves, plan.clip_grad)
    optimizer.step()
    learned.project()


def _score(evaluate: Callable[[int], float], step: int, checkpoint: _Checkpoint) -> float:
    try:
        return evaluate(step)
    except Lost:
        raise
    except RunError as error:
        raise checkpoint.failure(str(error), step) from error


class _Gate:
    """Which steps change nothing, and when there were too many of them in a row (`row`: how many there are by now)."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.row = plan, 0

    def judge(self, loss: float, trouble: str | None) -> tuple[bool, str | None]:
        """Whether to skip a step, and what ends the run, if anything does; `trouble` is what is not finite in it."""
        threshold = self.plan.threshold
        if trouble is None and (not threshold or loss <= threshold):
            self.row = 0
            return False, None
        if not threshold and not self.plan.tolerant:
            return False, trouble
        self.row += 1
        why = (
            f"had a loss above --threshold {threshold:g}"
            if threshold
            else f"changed nothing, the last because {trouble}"
        )
        return True, f"{self.row} steps in a row {why}" if self.row == self.plan.patience else None


class _Checkpoint:
    """The last sound state of an outer loop, on disk. `step` is the one it was taken at, None before the first."""

    def __init__(self, learned: Learned, optimizer: torch.optim.Optimizer, run: Run, plan: Plan) -> None:
        self.learned, self.optimizer, self.run, self.plan = learned, optimizer, run, plan
        self.path, self.step = run.folder / "checkpoint.pt", None

    def save(self, step: int, best: float, chance: dict[str, Tensor], row: int) -> None:
        """Keep the present state; `best`, `chance` and `row` are the best score, the generators and how many steps in a
        row had changed nothing, before this step.

        RunError where several processes have come apart: what they average would mean nothing any more.
        """
        if self.run.ranks.world > 1 and not self.run.ranks.same(digest(*self.learned.leaves)):
            raise self._apart(step)
        if self.run.ranks.first:
            state = {"format": FORMAT, "step": step, "best": best, "rng": chance, "segments": self.plan.segments}
            state |= {"row": row, "log": self.run.log_sum(step)}
            save_tensors(
                self.path, state | {"learned": self.learned.state_dict(), "optimizer": self.optimizer.state_dict()}
            )
        self.step = step

    def restore(self) -> tuple[int, float, int]:
        """Step, best score and `row` of the state on disk, which is taken up; what was logged after it is forgotten."""
        step, best, row, known = 0, float("-inf"), 0, None
        if self.path.exists():
            state = load_tensors(self.path, "checkpoint")
            self._check_segments(state)
            try:
                check_version(self.path, state.get("format", 1), FORMAT)
                self.learned.load_state_dict(state["learned"])
                # The rates are the config's, which may have changed on resuming; the momentum is the checkpoint's.
                rates = [group["lr"] for group in self.optimizer.param_groups]
                self.optimizer.load_state_dict(state["optimizer"])
                for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
                self.run.load_rng_state(state["rng"])
                self.step, step, best = state["step"], state["step"], state["best"]
                row, known = state.get("row", 0), state.get("log")  # older files have neither
            except (AttributeError, KeyError, ValueError, RuntimeError, TypeError) as error:
                reason = f"does not fit this run ({error}); remove it to start anew"
                raise UserError(f"checkpoint {self.path} {reason}") from None
        if not self.run.ranks.same(step):
            raise UserError(f"the processes do not see the same files in {self.run.folder}; give a place that all see")
        self.run.rewind(step, known, self.plan.needs_log)
        return step, best, row

    def _check_segments(self, state: Any) -> None:
        """UserError where a run that averages over some segments would go on with more or fewer."""
        had, ours = (state.get("segments", 1) if isinstance(state, dict) else 1), self.plan.segments
        if had != ours:
            processes = f"{self.run.ranks.world} process{'es' * (self.run.ranks.world > 1)}"
            raise UserError(
                f"checkpoint {self.path} averages {had} segments a step, this command ({processes}) {ours}; go on "
                f"with --segments {had}"
            )

    def _apart(self, step: int) -> RunError:
        last = "" if self.step is None else f", the last that they shared is that of step {self.step} in {self.path}"
        return RunError(
            f"step {step}: the processes no longer hold the same learned set{last}; see that all run one version on "
            "equal devices, and --resume"
        )

    def failure(self, trouble: str, step: int) -> RunError:
        """The error that names the step and the state to go on from."""
        if self.step is None:
            return RunError(f"step {step}: {trouble}, before anything was learned; {self.plan.advice[0]}")
        return RunError(
            f"step {step}: {trouble}; the last good state is that of step {self.step} in {self.path}; "
            f"{self.plan.advice[1]} and --resume"
        )


def _begin_alike(learned: Learned, ranks: Ranks) -> None:
    """Give all processes what the first one begins with: no two devices need agree on each bit that led to it."""
    if ranks.world > 1:
        state = learned.state_dict()
        ranks.copy_(list(_tensors(state)))
        learned.load_state_dict(state)


def _tensors(state: Any) -> Iterator[Tensor]:
    """The tensors of a nested state, in its order."""
    if torch.is_tensor(state):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors(part)


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
