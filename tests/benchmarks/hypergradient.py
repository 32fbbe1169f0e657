"""What the exact hypergradient costs beside plain unrolling and the detached approximation: time, FLOPs, memory.

    python -m tests.benchmarks.hypergradient --only ConvNet

Times are ratios to `unroll` (see tests/benchmarks/timing.py). F is a step's FLOPs in forward passes of the network.
Memory is the peak of what one call allocates; the S weight vectors that `exact` keeps are subtracted where it is
compared between numbers of steps: what is left must not grow.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods.core.inner import Draw, InnerSGD, Params, hypergradient
from methods.core.pull import Forward
from methods.lors import contrastive_loss
from networks.towers import TowerConfig, build_towers
from tests.benchmarks.table import Row, Scale, judged, show
from tests.benchmarks.timing import cost, flops, in_turns, peak_bytes, profile_line

GROUP = "hypergradient"
WAYS = {
    "unroll": {"mode": "unroll"},
    "exact, one graph kept": {"mode": "exact", "keep": 1},
    "exact, four graphs kept": {"mode": "exact", "keep": 4},
    "exact, one kept, --pull forward": {"mode": "exact", "keep": 1, "engine": Forward},
    "detached": {"mode": "detached"},
}
FLAT = ("exact, one graph kept", "exact, four graphs kept")  # whose memory does not grow with the steps


@dataclass(frozen=True)
class Case:
    """A pair of towers, and the learned pairs that they train on for some steps."""

    name: str
    size: int
    pairs: int
    steps: int = 8
    width: int = 256  # of the sentence embeddings
    slow: bool = False  # enough to be timed twice, and without `detached`
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, device: str) -> Built:
        cfg = TowerConfig(**{"image_encoder": self.name, "image_pretrained": False} | self.options)
        towers = build_towers(cfg, self.width, self.size, 0, device).train()
        rng = torch.Generator().manual_seed(0)
        images = torch.randn(self.pairs, 3, self.size, self.size, generator=rng).to(device).requires_grad_()
        texts = (0.5 * torch.randn(self.pairs, self.width, generator=rng)).to(device).requires_grad_()
        lr = {group: torch.tensor(0.1, device=device, requires_grad=True) for group in towers.flat}
        start = towers.flatten()
        target = {group: vector + 0.01 * torch.randn_like(vector) for group, vector in start.items()}
        leaves = [images, texts, *lr.values()]

        def step_loss(params: Params, draw: Draw) -> Tensor:
            u, v = towers.functional(params, towers.encode(images[draw.indices]), texts[draw.indices])
            return contrastive_loss(u @ v.T / 0.07)

        def objective(final: Params) -> Tensor:
            return sum((final[group] - target[group]).square().sum() for group in final)

        def call(way: str, steps: int) -> float:
            for leaf in leaves:
                leaf.grad = None
            draws = [Draw(torch.randperm(self.pairs).to(device), seed) for seed in range(steps)]
            how = dict(WAYS[way])
            if "engine" in how:
                how["engine"] = how["engine"](step_loss)
            loss = hypergradient(step_loss, start, draws, InnerSGD(lr), objective, leaves, **how)
            return float(loss)  # waits for a GPU

        @torch.no_grad()
        def forward() -> Tensor:
            return step_loss(start, Draw(torch.arange(self.pairs, device=device), 0))

        return Built(call, forward, sum(vector.numel() for vector in start.values()))


@dataclass(frozen=True)
class Built:
    """call      one hypergradient (way, steps), gradients of an earlier one forgotten
    forward   one pass of the network on all pairs
    weights   their number"""

    call: Callable[[str, int], float]
    forward: Callable[[], Tensor]
    weights: int


def cases(scale: Scale) -> dict[str, Case]:
    """Title → case: on a GPU the papers' sizes."""
    head = {"image_trainable": False, "joint_width": 2304}
    if scale.quick:
        return {"ConvNet of depth 2, 4 pairs of 16 px": Case("ConvNetD2W8", 16, 4, 2)}
    if scale.device == "cuda":
        return {
            "ConvNetD3, 100 pairs of 32 px": Case("ConvNetD3", 32, 100),
            "NFNet-l0, 20 pairs of 224 px": Case("nfnet", 224, 20, width=768),
            "ViT-tiny, 20 pairs of 224 px": Case("vit_tiny", 224, 20, width=768),
            "projection head 768 to 2304, 100 pairs": Case("mlp", 8, 100, width=768, options=head),
        }
    return {
        "ConvNetD3 of width 64, 40 pairs of 32 px": Case("ConvNetD3W64", 32, 40),
        "NFNet-l0, 2 pairs of 64 px": Case("nfnet", 64, 2, 4, slow=True),
        "ViT-tiny, 4 pairs of 64 px": Case("vit_tiny", 64, 4),
        "projection head 768 to 2304, 100 pairs": Case("mlp", 8, 100, width=768, options=head),
    }


def measure(title: str, case: Case, scale: Scale, repeats: int) -> list[Row]:
    """A row a way: the time beside `unroll`; FLOPs, seconds and memory in the note."""
    built, device = case.build(scale.device), scale.device
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # loaded for a forward derivative
    ways = [
        way for way, how in WAYS.items() if how.get("keep", 0) < case.steps and not (case.slow and way == "detached")
    ]
    work = {way: lambda w=way: built.call(w, case.steps) for way in ways}
    counts = {way: cost(job, device) for way, job in work.items()}  # which warms up, too
    forward, found = flops(built.forward) * case.steps, in_turns(work, 2 if case.slow else repeats, device, warm=0)
    rows = []
    for way, timed in found.items():
        count, peak = counts[way]
        note = f"{count / forward:.1f} F a step, {timed.seconds:.2f} s, {peak / 1e6:,.0f} MB"
        limit = 1.25 if way in FLAT else None
        row = judged(GROUP, f"{title}, S = {case.steps}: time of {way} to unroll", timed.ratio, "x", limit, note=note)
        rows.append(row.explained(lambda w=way: profile_line(work[w], device)))
    return rows


def memory(counts: Sequence[int], scale: Scale) -> list[Row]:
    """How the peak grows from few steps to many."""
    pairs = scale.of(4, 10, 100)
    built = Case(scale.of("ConvNetD2W8", "ConvNetD3W64", "ConvNetD3"), scale.of(16, 32), pairs).build(scale.device)
    built.call("unroll", 1)
    rows = []
    for way in ("unroll", *FLAT):
        kept = 4 * built.weights if way in FLAT else 0
        peaks = [peak_bytes(lambda w=way, s=steps: built.call(w, s), scale.device) for steps in counts]
        grown = (peaks[-1] - counts[-1] * kept) / (peaks[0] - counts[0] * kept)
        what = f"ConvNet, {pairs} pairs: memory of {way}, {counts[-1]} steps to {counts[0]}"
        note = ", ".join(f"S = {steps}: {peak / 1e6:,.1f} MB" for steps, peak in zip(counts, peaks, strict=True))
        aside = " (stored weights aside)" * bool(kept)
        rows.append(judged(GROUP, what + aside, grown, "x", 1.05 if kept else None, note=note))
    return rows


def rows(scale: Scale) -> Iterator[Row]:
    for title, case in cases(scale).items():
        yield from measure(title, case, scale, scale.of(1, 3, 10))
    yield from memory(scale.of([2, 4], [8, 32]), scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="the cases with this in their title")
    parser.add_argument("--memory_steps", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    scale = Scale(args.device)
    for title, case in cases(scale).items():
        if args.only in title:
            show(measure(title, case, scale, args.repeats))
    if args.memory_steps:
        show(memory(args.memory_steps, scale))


if __name__ == "__main__":
    main()
