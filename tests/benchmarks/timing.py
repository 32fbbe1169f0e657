"""Time and memory of pieces of work side by side: taken by turns, so that a busy machine is unfair to all alike."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Work = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """Median seconds of a piece of work, and the median of its ratios to the first piece in the same turn."""

    seconds: float
    ratio: float


def seconds(work: Work, device: str = "cpu", repeats: int = 1, wall: bool = False) -> float:
    """The median time of `work`: on a CPU that which the process had a core for, on a GPU until all is computed.

    wall   on a CPU, too, the time that passes: for work that waits, or that other processes do
    """
    clock = time.process_time if device == "cpu" and not wall else time.perf_counter
    found = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(clock() - begin)
    return statistics.median(found)


def in_turns(
    work: Mapping[str, Work], repeats: int, device: str = "cpu", wall: bool = False, warm: int = 1
) -> dict[str, Timed]:
    """Each piece of work once a turn, after `warm` turns that do not count."""
    turns = [{name: seconds(job, device, wall=wall) for name, job in work.items()} for _ in range(warm + repeats)]
    turns, first = turns[warm:], next(iter(work))
    return {
        name: Timed(
            statistics.median(turn[name] for turn in turns),
            statistics.median(turn[name] / turn[first] for turn in turns),
        )
        for name in work
    }


class Allocations(TorchDispatchMode):
    """Counts the bytes of every tensor made within the block for as long as it lives; views and inputs are free."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for value in tree_iter((args, kwargs)):
            self._meet(value, count=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            self._meet(value, count=True)
        return result

    def _meet(self, value: Any, count: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if count else 0
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_bytes(work: Work, device: str) -> int:
    """The most that `work` holds at once beyond what there was before; on a CPU every tensor is counted."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with Allocations() as counted:
        work()
    return counted.peak
