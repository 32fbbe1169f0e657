"""What one outer step of each method costs, and which share it reaches of the rate at which the device multiplies.

    python -m tests.benchmarks.outer --only VLDD

The steps are the methods' own: draws, inner loop, gap to the expert, gradient. On a CPU they are small; on a GPU of the
published sizes, in each precision. The share is FLOPs of products and convolutions a second, to those of a product of
two large matrices of the same numbers; whatever else a step does takes time and counts as nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods.core.inner import Draw, Params
from methods.core.matching import match
from methods.core.precision import PRECISIONS, Speed, numbers
from methods.core.trajectories import Segment
from methods.lors import Similarity, contrastive_loss
from methods.pair_blending import blending
from methods.pairs import PairsConfig, Phase
from networks.towers import TowerConfig, build_towers
from tests.benchmarks import matching, poster
from tests.benchmarks.table import Row, Scale, judged, show
from tests.benchmarks.timing import Work, cost, matmul_rate, profile_line, seconds

GROUP = "outer"
HEADS = {"image_trainable": False, "image_projection": True}


@dataclass(frozen=True)
class Pairs:
    """An outer step on learned pairs: as VLDD's, unless told otherwise."""

    encoder: str
    size: int
    pairs: int
    batch: int
    steps: int = 8
    width: int = 768  # of the sentence embeddings
    lors: bool = False  # low-rank similarity, weighted BCE, consecutive batches
    blend: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, device: str, precision: str = "float32") -> Work:
        cfg = TowerConfig(image_encoder=self.encoder, image_pretrained=False, **self.options)
        towers = build_towers(cfg, self.width, self.size, 0, device).train()
        rng = torch.Generator().manual_seed(0)
        images = torch.randn(self.pairs, 3, self.size, self.size, generator=rng).to(device)
        texts = (0.5 * torch.randn(self.pairs, self.width, generator=rng)).to(device)
        similarity = Similarity("lowrank" if self.lors else "identity", self.pairs, 4, 3.0, rng, device)
        phase = Phase(images, texts, similarity, PairsConfig(num_pairs=(self.pairs,)))
        segment, speed = neighbour(towers.flatten()), Speed(precision, device)

        def step_loss(params: Params, draw: Draw) -> Tensor:
            batch, blend = phase.batch(draw), blending(draw, self.blend)
            with speed.forward():
                u, v = towers.functional(params, batch.images, batch.texts, blend)
            return contrastive_loss(u @ v.T / 0.07, batch.similarity, "WBCE" if self.lors else "InfoNCE")

        def step() -> None:
            for leaf in phase.tensors:
                leaf.grad = None
            draws = phase.draws(rng, self.steps, self.batch, consecutive=self.lors)
            with speed.numbers(), phase.encoded(towers, draws, speed.forward):
                match(step_loss, phase, segment, draws, "exact")

        return step


def neighbour(start: Params) -> Segment:
    """A segment from these weights to others nearby."""
    return Segment(start, {group: vector + 0.01 * torch.randn_like(vector) for group, vector in start.items()}, 0, 0)


def image_step(steps: int, device: str, **sizes: Any) -> Work:
    """MTT's."""
    step, _ = matching.build(augmented=True, device=device, **sizes)
    return lambda: step("exact", steps)


def poster_step(before: int, length: int, real: int, device: str, model: str) -> Work:
    """PoDD's: so many steps before the window and in it, and real images."""
    outer = poster.Outer("exact", real, min(real, 100), device, model)
    batch = outer.real.batch(0)
    return lambda: outer(before, length, batch)


def cases(scale: Scale) -> dict[str, Callable[[], Work]]:
    """Title → what builds the step; on a CPU nothing of the papers' size."""
    device = scale.device
    heads = HEADS | {"joint_width": scale.of(16, 256, 2304)}
    small = scale.of(("ConvNetD2W8", 16, 6, 4, 2), ("ConvNetD4W64", 64, 20, 10, 4), ("nfnet", 224, 100, 20))
    pairs = Pairs(*small)
    encoder = {"nfnet": "NFNet-l0"}.get(pairs.encoder, pairs.encoder)
    about = f"{encoder}, {pairs.size} px, {pairs.steps} steps of {pairs.batch} pairs"
    images = {"classes": 10, "ipc": 1, "batch": None, "model": (net := scale.of("ConvNetW8", "ConvNetD3"))}
    inner = scale.of(2, 10, 50)
    before, length, real = scale.of((1, 2, 10), (2, 3, 100), (70, 60, 5000))
    return {
        f"VLDD, {about}": lambda: pairs.build(device),
        f"LoRS, {about}": lambda: Pairs(*small, lors=True).build(device),
        f"heads on a frozen trunk, features mixed (RepBlend), {about}": lambda: Pairs(
            *small, blend=1.0, options=heads
        ).build(device),
        f"MTT, {net}, 10 images, {inner} steps": lambda: image_step(inner, device, **images),
        f"PoDD, {net}, {before} steps and a window of {length}, {real} real images": lambda: poster_step(
            before, length, real, device, net
        ),
    }


def measure(
    title: str, build: Callable[[], Work], scale: Scale, rate: float, repeats: int, aim: float | None = None
) -> Row:
    """The share that one case reaches; seconds, FLOPs, memory, and what most of the time goes to, in the note."""
    device, work = scale.device, build()
    flops, peak = cost(work, device)  # which warms up, too
    spent = seconds(work, device, repeats)
    note = f"{spent:.2f} s, {flops / 1e9:,.1f} GFLOP, {peak / 1e6:,.0f} MB; {profile_line(work, device)}"
    return judged(GROUP, f"{title}: share of the matmul rate", 100 * flops / spent / rate, "%", None, aim, note, ".0f")


def precise(scale: Scale, repeats: int) -> Iterator[Row]:
    """VLDD's step at the published size in each precision, beside the product of such numbers."""
    for precision in PRECISIONS:
        with Speed(precision, scale.device).numbers():
            rate = matmul_rate(scale.device, torch.bfloat16 if precision == "bf16" else torch.float32)
        yield rate_row(rate, precision)
        case = Pairs("nfnet", 224, 100, 20)
        title = f"VLDD, NFNet-l0, 224 px, 8 steps of 20 pairs, {precision}"
        yield measure(title, lambda p=precision, c=case: c.build(scale.device, p), scale, rate, repeats, 35)


def rate_row(rate: float, precision: str) -> Row:
    return Row(GROUP, f"product of two large matrices, {precision}", f"{rate / 1e9:,.0f}", "GFLOP/s")


def rows(scale: Scale, only: str = "", repeats: int = 0) -> Iterator[Row]:
    repeats = repeats or scale.of(1, 2, 5)
    with numbers("float32"):
        rate = matmul_rate(scale.device, size=scale.of(256, 0))
        yield rate_row(rate, "float32")
        for title, build in cases(scale).items():
            if only in title:
                yield measure(title, build, scale, rate, repeats)
    if scale.device == "cuda" and only in "VLDD":
        yield from precise(scale, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=0, help="timed steps of each (0: two; on a GPU five)")
    parser.add_argument("--only", default="", help="the cases with this in their title")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    show(rows(Scale(args.device), args.only, args.repeats))


if __name__ == "__main__":
    main()
