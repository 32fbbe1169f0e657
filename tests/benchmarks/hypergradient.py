"""How long the exact hypergradient takes, and how much memory, beside plain unrolling and the detached approximation.

    python -m tests.benchmarks.hypergradient --repeats 5

Times are medians over interleaved repeats, and a ratio is the median of the ratios to `unroll` in the same turn, so a
busy machine is unfair to all three alike; on a CPU they are seconds of computing, not of waiting for a core. Memory is
the peak of what one call allocates; on a CPU every tensor is counted as it comes and goes, on a GPU the allocator is
asked. The S weight vectors that `exact` keeps are subtracted in its last column but one: what is left must not grow.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods.core.inner import MODES, Draw, InnerSGD, Params, hypergradient
from methods.lors import contrastive_loss
from networks.towers import TowerConfig, build_towers
from tests.benchmarks.timing import peak_bytes


@dataclass(frozen=True)
class Case:
    """A pair of towers, and the learned pairs that they train on."""

    name: str
    size: int
    pairs: int
    width: int = 256  # of the sentence embeddings
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, device: str) -> Callable[[str, int], float]:
        """`call(mode, steps)`: one hypergradient, gradients of an earlier one forgotten."""
        cfg = TowerConfig(**{"image_encoder": self.name, "image_pretrained": False} | self.options)
        towers = build_towers(cfg, self.width, self.size, 0, device).train()
        rng = torch.Generator().manual_seed(0)
        images = torch.randn(self.pairs, 3, self.size, self.size, generator=rng).to(device).requires_grad_()
        texts = (0.5 * torch.randn(self.pairs, self.width, generator=rng)).to(device).requires_grad_()
        lr = {group: torch.tensor(0.1, device=device, requires_grad=True) for group in towers.flat}
        start = towers.flatten()
        target = {group: vector + 0.01 * torch.randn_like(vector) for group, vector in start.items()}
        leaves = [images, texts, *lr.values()]
        self.__dict__["weights"] = sum(vector.numel() for vector in start.values())

        def step_loss(params: Params, draw: Draw) -> Tensor:
            u, v = towers.functional(params, towers.encode(images[draw.indices]), texts[draw.indices])
            return contrastive_loss(u @ v.T / 0.07)

        def objective(final: Params) -> Tensor:
            return sum((final[group] - target[group]).square().sum() for group in final)

        def call(mode: str, steps: int) -> float:
            for leaf in leaves:
                leaf.grad = None
            draws = [Draw(torch.randperm(self.pairs).to(device), seed) for seed in range(steps)]
            loss = hypergradient(step_loss, start, draws, InnerSGD(lr), objective, leaves, mode)
            return float(loss)  # waits for a GPU

        return call


CASES = {
    "ConvNet, 100 pairs of 32 px": Case("ConvNetD3W64", 32, 100),
    "normaliser-free, 8 pairs of 64 px": Case("test_nfnet", 64, 8, options={"image_output": "features"}),
    "text head 768 to 2304 alone, 100 pairs": Case(
        "mlp", 8, 100, 768, options={"image_trainable": False, "joint_width": 2304}
    ),
}


def print_times(case: Case, title: str, steps: int, repeats: int, device: str) -> None:
    call = case.build(device)
    # The time that this process had a core for; a GPU's work is none of that.
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(repeats + 1):
        for mode in MODES:
            begin = clock()
            call(mode, steps)
            if turn:  # the first turn warms up
                seconds[mode].append(clock() - begin)
    print(f"\n{title}, S = {steps}, {case.weights:,} weights\n{'':12}{'seconds':>10}{'to unroll':>12}")
    for mode, values in seconds.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(values, seconds["unroll"], strict=True))
        print(f"{mode:12}{statistics.median(values):10.3f}{ratio:12.2f}")


def print_memory(case: Case, title: str, counts: list[int], device: str) -> None:
    call = case.build(device)
    call("exact", 1)
    print(f"\n{title}, peak MB\n{'S':>4}{'unroll':>12}{'exact':>12}{'less S weights':>16}{'ratio':>8}")
    first = 0.0
    for steps in counts:
        unroll, exact = (peak_bytes(lambda m=mode, s=steps: call(m, s), device) / 1e6 for mode in ("unroll", "exact"))
        rest = exact - steps * case.weights * 4 / 1e6
        first = first or rest
        print(f"{steps:4}{unroll:12.1f}{exact:12.1f}{rest:16.1f}{rest / first:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="", help="time the cases with this in their title")
    parser.add_argument("--memory_steps", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for title, case in CASES.items():
        if args.only in title:
            print_times(case, title, args.steps, args.repeats, args.device)
    pairs = 100 if args.device == "cuda" else 10
    print_memory(Case("ConvNetD3W64", 32, pairs), f"ConvNet, {pairs} pairs of 32 px", args.memory_steps, args.device)


if __name__ == "__main__":
    main()
