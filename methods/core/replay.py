"""How the steps of an inner loop are replayed, and what that will take: chosen and told before a run.

A step whose graph is kept costs 9 F, one that is replayed 12 F (inner.py). So as many of the last steps are kept as a
memory budget holds. All of it is the same gradient, to rounding.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from methods.core.compiled import Parts
from methods.core.inner import Draw, Engine, Inner, Params, StepLoss, loss_gradient, second_derivative
from methods.core.meter import flops, memory
from methods.core.pull import Forward, checked
from utils.config import option
from utils.errors import UserError

GIB = 2**30
ENGINES: dict[str, Callable[[StepLoss], Engine]] = {"forward": Forward}


@dataclass(frozen=True)
class ReplayConfig:
    """How inner steps are differentiated: equal gradients, to rounding."""

    memory_budget: float = option(
        0.0,
        "GiB that --mode exact may fill with inner steps; what it cannot keep it replays (0: of a GPU's memory 60 %, "
        "of a machine's a quarter)",
        low=0,
        free=True,
    )
    pull: str = option(
        "reverse",
        "how a replayed step is differentiated: reverse, twice backwards; forward, once forwards and once backwards, "
        "for ConvNets in fewer FLOPs, but on CPUs not in less time",
        choices=("reverse", *ENGINES),
        free=True,
    )
    compile: bool = option(
        False, "compile inner steps: minutes at first, then faster, above all on GPUs (core/compiled.py)", free=True
    )

    def check(self) -> None:
        if self.compile and self.pull != "reverse":
            raise UserError(f"--compile differentiates by --pull reverse, not {self.pull}; leave one of them out")

    def idle_with(self, mode: str) -> dict[str, str]:
        """What another mode than `exact` does not read, and what it would take."""
        found = {"memory_budget": "--mode exact"} if self.memory_budget and mode != "exact" else {}
        if self.compile and mode == "unroll":
            found["compile"] = "--mode exact or detached"
        elif self.compile:  # all steps are replayed then
            found["memory_budget"] = "--compile false"
        return found | ({"pull": "--mode exact or detached"} if self.pull != "reverse" and mode == "unroll" else {})

    def budget(self, device: torch.device) -> int:
        """Bytes: of what the device has rather than of what is free now, so that the same run is the same tomorrow."""
        if self.memory_budget:
            return int(self.memory_budget * GIB)
        if device.type == "cuda":
            return int(0.6 * torch.cuda.get_device_properties(device).total_memory)
        if device.type == "mps":
            return torch.mps.recommended_max_memory() // 2
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return machine // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@dataclass(frozen=True)
class StepCost:
    """What one inner step takes, measured.

    flops            of its forward pass
    graph, pull      bytes that its graph holds, and at most while it is built and differentiated
    state            bytes to keep of a step that will be replayed
    gradient, back   seconds for its gradient without a graph, and for building its graph and differentiating it
    """

    flops: int
    graph: int
    pull: int
    state: int
    gradient: float
    back: float

    @classmethod
    def measured(
        cls, step_loss: StepLoss, start: Params, draw: Draw, inner: Inner, leaves: Sequence[Tensor]
    ) -> StepCost:
        """By taking it a few times; nothing learned changes."""
        device = next(iter(start.values())).device
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        heads = {group: value.detach().requires_grad_() for group, value in start.items()}

        def graph() -> object:
            loss = step_loss(heads, draw)
            return torch.autograd.grad(loss, list(heads.values()), create_graph=True)

        def forward() -> None:
            with torch.no_grad():
                step_loss(heads, draw)

        def back() -> object:
            return second_derivative(step_loss, start, start, draw, leaves)

        def gradient() -> object:
            return loss_gradient(step_loss, start, draw)

        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            state = sum(value.nbytes for value in inner.start(start).values())
            return cls(
                flops(forward),
                memory(graph, device)[0],
                memory(back, device)[1],
                state,
                _seconds(gradient, device),
                _seconds(back, device),
            )

    def compiled(self, engine: Engine, start: Params, draw: Draw, leaves: Sequence[Tensor]) -> StepCost:
        """The same by an engine, which is made ready: compiled, and where there is a CUDA graph, recorded."""
        device = next(iter(start.values())).device
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        ways = (lambda: engine.gradient(start, draw), lambda: engine.pull(start, start, draw, leaves))
        for way in ways * 3:
            way()
        gradient, back = (_seconds(way, device) for way in ways)
        return replace(self, gradient=gradient, back=back)

    def steps_kept(self, steps: int, budget: int) -> int:
        """How many of the last `steps` can keep their graphs within a budget of bytes: at least one."""
        left = budget - self.pull - steps * self.state
        return max(1, min(steps, 1 + (int(left // self.graph) if self.graph else steps)))

    def bytes(self, steps: int, kept: int) -> int:
        """Held at once at most, where `kept` of these steps keep their graphs."""
        return (steps - kept) * self.state + max(0, kept - 1) * self.graph + self.pull

    def seconds(self, before: int, steps: int, kept: int) -> float:
        """Of a loop that differentiates `steps`, after so many that it does not."""
        return (before + steps - kept) * self.gradient + steps * self.back


class Replay:
    """How the inner loop of a run goes back: `keep` and `engine` of `hypergradient`, decided by `plan`."""

    def __init__(self, cfg: ReplayConfig, mode: str, device: torch.device) -> None:
        self.cfg, self.mode, self.device, self.keep, self._pull = cfg, mode, device, 1, cfg.pull
        self.compiles = cfg.compile and mode != "unroll"

    def engine(self, step_loss: StepLoss) -> Engine | None:
        if self.compiles and isinstance(step_loss, Parts):
            return step_loss
        return ENGINES[self._pull](step_loss) if self._pull in ENGINES and self.mode != "unroll" else None

    def plan(
        self,
        step_loss: StepLoss,
        start: Params,
        draws: Sequence[Draw],
        inner: Inner,
        leaves: Sequence[Tensor],
        outer_steps: int,
        window: int | None = None,
        loops: int = 1,
    ) -> str:
        """Measure a step, decide, and say what the run will take; `loops`: such inner loops in an outer step."""
        engine, note = self.engine(step_loss), ""
        if engine is not None and not self.compiles and (why := checked(engine, step_loss, start, draws[0], leaves)):
            engine, self._pull, note = None, "reverse", f"; --pull {self.cfg.pull} is not possible ({why}): reverse"
        cost = StepCost.measured(step_loss, start, draws[0], inner, leaves)
        steps = min(window or len(draws), len(draws))
        budget = self.cfg.budget(self.device)
        self.keep = cost.steps_kept(steps, budget) if self.mode == "exact" else 1
        if engine is not None:  # which is given the gradient that was found on the way
            cost = replace(cost, state=cost.state + sum(value.nbytes for value in start.values()))
        if self.compiles:
            cost, self.keep = cost.compiled(engine, start, draws[0], leaves), 0
        kept = steps if self.mode == "unroll" else self.keep
        needed = cost.bytes(steps, kept)
        if needed > budget:
            way = "; --mode exact takes less" if self.mode == "unroll" else ""
            note += f"; that is more than --memory_budget {budget / GIB:.3g}{way}"
        how = "compiled" if self.compiles else f"the graphs of {kept} kept"
        each = loops * cost.seconds(len(draws) - steps, steps, kept)
        return (
            f"inner loop: {len(draws)} steps of {cost.flops / 1e9:.3g} GFLOP forward, {how}, about "
            f"{needed / 2**20:,.0f} MiB; {each:.2g} s an outer step, {_span(each * outer_steps)} for {outer_steps:,} "
            f"without evaluations{note}"
        )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """That pass until `work` is done, which is warm by now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _span(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
