"""What choosing a coreset costs: herding and k-center beside one pass over the features.

    python -m tests.benchmarks.coresets                                  30,000 x 512
    python -m tests.benchmarks.coresets --samples 145000 --width 1536    COCO's size: 0.9 GB of features

A pass is one product of the features with a vector, which reads each of them once; `passes` is the time of a choice in
passes, about one a pick. Memory is the peak above the features.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from methods.core.coresets import herding, k_center
from tests.benchmarks.timing import seconds


def measured(choose: Callable[[Tensor, int], Tensor], features: Tensor, count: int) -> tuple[float, float]:
    """Seconds of one choice, and MB above what was there before."""
    spent: list[float] = []
    memory = peak_above_now(lambda: spent.append(seconds(lambda: choose(features, count))))
    return spent[0], max(0.0, memory)


def peak_above_now(work: Callable[[], object]) -> float:
    """MB by which the process's peak exceeds what it holds now (Linux: pages now, KB at the peak)."""
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - now) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="time and memory of herding and k-center")
    parser.add_argument("--samples", type=int, default=30_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 500])
    asked = parser.parse_args()

    rng = torch.Generator().manual_seed(0)
    features = torch.empty(asked.samples, asked.width).normal_(generator=rng)
    point = features[0].clone()
    for choose in (herding, k_center):
        choose(features[:2000], 2)  # the library's threads and buffers are not ours to count
    one_pass = min(seconds(lambda: features @ point) for _ in range(5))

    print(f"{asked.samples:,} x {asked.width}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':<12}{'chosen':>8}{'seconds':>10}{'passes':>9}{'MB above':>10}")
    print(f"{'one pass':<12}{'':>8}{one_pass:>10.4f}{1:>9}")
    for name, choose in (("herding", herding), ("k-center", k_center)):
        for count in asked.counts:
            spent, memory = measured(choose, features, count)
            print(f"{name:<12}{count:>8}{spent:>10.2f}{spent / one_pass:>9.0f}{memory:>10.0f}")


if __name__ == "__main__":
    main()
