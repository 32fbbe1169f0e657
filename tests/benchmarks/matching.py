"""What one outer step of MTT costs at the published settings: memory against the number of inner steps, and time.

    python -m tests.benchmarks.matching --steps 5 20 80

Memory is the peak of what one outer step allocates (see tests/benchmarks/timing.py), beside the S weight vectors
that the exact gradient keeps. The published CIFAR-100, 50 images a class, has 80 steps of 125 images, of which plain
unrolling keeps all graphs. Time is that of the whole step: draws, augmentation, inner loop, gradient.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from data.dsa import STRATEGY, augment, parse_strategy
from methods.core.matching import match
from methods.core.trajectories import Segment
from methods.images import SyntheticConfig, SyntheticImages
from networks import build_network
from networks.flat import FlatModule
from tests.benchmarks.timing import peak_bytes

# classes, images a class, inner steps, images an inner step (all where it is none)
ROWS = {"CIFAR-10, 1 a class": (10, 1, 50, None), "CIFAR-100, 50 a class": (100, 50, 80, 125)}


def build(
    classes: int, ipc: int, batch: int | None, augmented: bool, device: str, model: str = "ConvNet"
) -> tuple[Callable, int]:
    """`step(mode, steps)`, one whole outer step of a ConvNet at 32 px; and the number of its weights."""
    torch.manual_seed(0)
    ops = parse_strategy(STRATEGY) if augmented else ()
    flat = FlatModule(build_network(model, 32, classes).to(device).train())
    labels = torch.arange(classes, device=device).repeat_interleave(ipc)
    pixels = torch.randn(len(labels), 3, 32, 32, device=device)
    cfg = SyntheticConfig(ipc=ipc, batch_syn=batch)
    images = SyntheticImages(pixels, labels, 32, cfg, lambda batch, rng: augment(batch, ops, rng))
    start = flat.flatten()
    segment = Segment({"net": start}, {"net": start + 0.01 * torch.randn_like(start)}, 0, 0)
    rng = torch.Generator().manual_seed(0)

    def step_loss(params: dict, draw: object) -> torch.Tensor:
        seen, targets = images.batch(draw)
        return F.cross_entropy(flat(params["net"], seen), targets)

    def step(mode: str, steps: int) -> None:
        for leaf in images.leaves:
            leaf.grad = None
        match(step_loss, images, segment, images.draws(rng, steps), mode)  # returns numbers: a GPU has been waited for

    return step, flat.size


def print_memory(counts: list[int], device: str) -> None:
    title = "CIFAR-100, 50 a class"
    classes, ipc, _, batch = ROWS[title]
    step, weights = build(classes, ipc, batch, True, device)
    print(f"\n{title}: {batch} images an inner step, {weights:,} weights, peak MB")
    print(f"{'S':>4}{'unroll':>12}{'exact':>12}{'less S weights':>16}{'ratio':>8}")
    first = 0.0
    for steps in counts:
        # One graph of plain unrolling is about as large as all that `exact` needs; eighty are not worth the wait.
        unroll = f"{peak_bytes(lambda s=steps: step('unroll', s), device) / 1e6:12.0f}" if steps <= 5 else f"{'–':>12}"
        exact = peak_bytes(lambda s=steps: step("exact", s), device) / 1e6
        rest = exact - steps * weights * 4 / 1e6
        first = first or rest
        print(f"{steps:4}{unroll}{exact:12.0f}{rest:16.0f}{rest / first:8.2f}")


def print_times(repeats: int, device: str) -> None:
    clock = time.process_time if device == "cpu" else time.perf_counter
    print(f"\n{'one outer step':24}{'S':>4}{'seconds':>10}{'without augmentation':>22}{'ratio':>8}")
    for title, (classes, ipc, steps, batch) in ROWS.items():
        if device == "cpu":
            steps = min(steps, 10)
        seconds = []
        for augmented in (True, False):
            step, _ = build(classes, ipc, batch, augmented, device)
            step("exact", 2)
            begin = clock()
            for _ in range(repeats):
                step("exact", steps)
            seconds.append((clock() - begin) / repeats)
        print(f"{title:24}{steps:4}{seconds[0]:10.3f}{seconds[1]:22.3f}{seconds[0] / seconds[1]:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 80], help="inner steps to measure memory with")
    parser.add_argument("--repeats", type=int, default=2, help="timed outer steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    print_times(args.repeats, args.device)
    print_memory(args.steps, args.device)


if __name__ == "__main__":
    main()
