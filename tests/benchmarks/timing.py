"""Time, memory, FLOPs and profile of pieces of work.

Pieces are timed by turns and compared within a turn, so that a busy machine is unfair to all alike.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from methods.core.meter import Meter, flops, memory

Work = Callable[[], object]


class Timed(NamedTuple):
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


def peak_bytes(work: Work, device: str) -> int:
    """The most that `work` holds at once beyond what there was before; on a CPU every tensor is counted."""
    return memory(work, torch.device(device))[1]


def cost(work: Work, device: str) -> tuple[int, int]:
    """`flops` and `peak_bytes` of one call."""
    if device == "cuda":
        return flops(work), peak_bytes(work, device)
    with Meter() as meter:
        work()
    return meter.flops, meter.peak


def matmul_rate(device: str, dtype: torch.dtype = torch.float32, size: int = 0) -> float:
    """FLOPs a second of the product of two square matrices: what of a device's speed is there to be had."""
    size = size or (8192 if device == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / seconds(lambda: left @ right, device, repeats=5)


def profile_line(work: Work, device: str, top: int = 4) -> str:
    """One line: the operations that take the most time by themselves, and their shares."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it greets and takes leave otherwise
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, acc_events=True) as found:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    spent = {event.key: getattr(event, kind) for event in found.key_averages()}
    total = sum(spent.values()) or 1
    largest = sorted(spent, key=spent.get, reverse=True)[:top]
    return "profile: " + ", ".join(f"{_short(name)} {100 * spent[name] / total:.0f} %" for name in largest)


def _short(name: str, most: int = 40) -> str:
    name = name.removeprefix("aten::").split("(")[0].split("<")[0].removeprefix("void ")
    return name if len(name) <= most else name[: most - 1] + "…"
