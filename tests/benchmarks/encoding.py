"""What an outer step costs when heads on frozen trunks are matched, beside matching the trunk itself.

    python -m tests.benchmarks.encoding --repeats 2

Three ways at one budget (the same pairs, inner steps, mini-batches, trunk and joint width; exact gradients):

trunk   `--image_trainable true`: the image tower learns, and is matched
each    `--image_trainable false --image_projection`, with the trunk asked for its features in every inner step
once    the same, as distill.py does it: images are encoded once, the gradient goes back through the trunk once

Times are medians over interleaved repeats, ratios the medians of those to `once` in the same turn (see
tests/benchmarks/timing.py, also for memory). `of it` is the part of `once` that encodes: the trunk, there and
back; the rest is the inner loop on features.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods.core.inner import Draw, Params
from methods.core.matching import match
from methods.core.trajectories import Segment
from methods.lors import Similarity, contrastive_loss
from methods.pairs import PairsConfig, Phase
from networks.towers import TowerConfig, build_towers
from tests.benchmarks.timing import in_turns, peak_bytes

WAYS = ("once", "trunk", "each")
HEADS = {"image_trainable": False, "image_projection": True}


@dataclass(frozen=True)
class Case:
    """A trunk, and the learned pairs of an outer step; `batch` of them in an inner step."""

    trunk: str
    size: int
    joint: int
    pairs: int = 100
    batch: int = 100
    width: int = 768  # of the sentence embeddings
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, way: str, steps: int, device: str) -> tuple[Callable[[], None], Callable[[], None], int]:
        """A whole outer step, the encoding in it alone, and the number of matched weights."""
        options = {"image_pretrained": False, "joint_width": self.joint} | self.options
        options |= {} if way == "trunk" else HEADS
        towers = build_towers(
            TowerConfig(image_encoder=self.trunk, **options), self.width, self.size, 0, device
        ).train()
        rng = torch.Generator().manual_seed(0)
        images = torch.randn(self.pairs, 3, self.size, self.size, generator=rng).to(device)
        texts = (0.5 * torch.randn(self.pairs, self.width, generator=rng)).to(device)
        similarity = Similarity("identity", self.pairs, 1, 1.0, rng, device)
        phase = Phase(images, texts, similarity, PairsConfig(num_pairs=(self.pairs,)))
        start = towers.flatten()
        segment = Segment(start, {group: v + 0.01 * torch.randn_like(v) for group, v in start.items()}, 0, 0)

        def step_loss(params: Params, draw: Draw) -> Tensor:
            batch = phase.batch(draw)
            seen = towers.encode(batch.images) if way == "each" else batch.images
            u, v = towers.functional(params, seen, batch.texts)
            return contrastive_loss(u @ v.T / 0.07, batch.similarity)

        def step() -> None:
            for leaf in phase.leaves:
                leaf.grad = None
            draws = phase.draws(rng, steps, self.batch, consecutive=True)
            with phase.encoded(towers, draws) if way == "once" else contextlib.nullcontext():
                match(step_loss, phase, segment, draws, "exact")  # returns numbers: a GPU has been waited for
            float(phase.images.grad.view(-1)[0])  # and here again, for the trunk's part

        def encode() -> None:
            phase.images.grad = None
            with phase.encoded(towers, phase.draws(rng, steps, self.batch, consecutive=True)):
                phase.leaves[0].grad = torch.ones_like(phase.leaves[0])
            float(phase.images.grad.view(-1)[0])

        return step, encode, sum(vector.numel() for vector in start.values())


CASES = {
    "ConvNet of depth 4 and width 64, 64 px": Case("ConvNetD4W64", 64, 128),
    "the same, 20 pairs an inner step": Case("ConvNetD4W64", 64, 128, batch=20),
    "a small normaliser-free network, 96 px": Case("test_nfnet", 96, 128, options={"image_output": "features"}),
}
LARGE = {  # for a GPU: the papers' own image tower
    "NFNet-L0, 224 px": Case("nfnet", 224, 0),
    "the same, 20 pairs an inner step": Case("nfnet", 224, 0, batch=20),
}


def measure(case: Case, title: str, steps: int, repeats: int, device: str) -> None:
    built = {way: case.build(way, steps, device) for way in WAYS}
    work = {way: step for way, (step, _, _) in built.items()} | {"of it": built["once"][1]}
    about = f"{case.pairs} pairs, {min(case.batch, case.pairs)} an inner step, S = {steps}"
    print(f"\n{title}: {about}\n{'':8}{'weights':>14}{'seconds':>10}{'to once':>10}{'peak MB':>10}")
    for name, timed in in_turns(work, repeats, device).items():
        weights = f"{built[name][2]:14,}" if name in built else f"{'':14}"
        peak = f"{peak_bytes(work[name], device) / 1e6:10.0f}" if name in built else ""
        print(f"{name:8}{weights}{timed.seconds:10.3f}{timed.ratio:10.2f}{peak}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="", help="the cases with this in their title")
    parser.add_argument("--large", action="store_true", help="the papers' image tower: for a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for title, case in (LARGE if args.large else CASES).items():
        if args.only in title:
            measure(case, title, args.steps, args.repeats, args.device)


if __name__ == "__main__":
    main()
