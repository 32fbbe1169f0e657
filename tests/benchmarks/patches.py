"""How a poster's patches are cut: a gather of all, once an outer step, beside slices and beside cutting in each step.

    python -m tests.benchmarks.patches

The four published posters with their patches and how many of those an inner step takes. Times are medians of what all
take in turn; the first turn warms up. On a CPU they are seconds of computing, not of waiting for a core.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

from methods.poster_layout import Grid
from tests.benchmarks.poster import table
from tests.benchmarks.table import environment
from tests.benchmarks.timing import seconds

# patches of each published poster, patches an inner step
SEEDS = {
    "CIFAR-10": (Grid((60, 153), (32, 32), (6, 16)), 96),
    "CIFAR-100": (Grid((303, 303), (32, 32), (20, 20)), 50),
    "CUB-200": (Grid((302, 610), (32, 32), (30, 60)), 200),
    "Tiny ImageNet": (Grid((608, 1211), (64, 64), (20, 40)), 30),
}
STEPS = 10  # inner steps


class Cutting:
    """Ways from a poster to its patches and back.

    batch   patches an inner step
    """

    def __init__(self, grid: Grid, batch: int, device: str) -> None:
        self.grid, self.side, self.places = grid, grid.cell[0], grid.index.to(device)
        self.corners = [(top, left) for left in grid.lefts for top in grid.tops]
        self.poster = torch.randn(3, *grid.canvas, device=device, requires_grad=True)
        self.upstream = torch.randn(len(grid), 3, *grid.cell, device=device)
        self.draws = [torch.randperm(len(grid))[:batch].sort().values.to(device) for _ in range(STEPS)]

    def gather(self) -> Tensor:
        return self.grid.cut(self.poster)

    def slices(self) -> Tensor:
        return torch.stack(
            [self.poster[:, top : top + self.side, left : left + self.side] for top, left in self.corners]
        )

    def back(self, patches: Tensor, to: Tensor) -> Tensor:
        return torch.autograd.grad(patches, to, self.upstream[: len(patches)])[0]

    def gather_and_back(self) -> None:
        self.back(self.gather(), self.poster)

    def slices_and_back(self) -> None:
        self.back(self.slices(), self.poster)

    def once(self) -> None:
        """All patches once; each inner step takes its own of them."""
        whole = self.gather()
        leaf, total = whole.detach().requires_grad_(), torch.zeros_like(whole)
        for draw in self.draws:
            total += self.back(leaf[draw], leaf)
        torch.autograd.grad(whole, self.poster, total)

    def each(self) -> None:
        """All patches in each inner step."""
        total = torch.zeros_like(self.poster)
        for draw in self.draws:
            total += self.back(self.gather()[draw], self.poster)

    def own(self) -> None:
        """In each inner step those that it takes."""
        total = torch.zeros_like(self.poster)
        for draw in self.draws:
            patches = self.poster.flatten(1)[:, self.places[draw]].view(3, -1, *self.grid.cell).transpose(0, 1)
            total += self.back(patches, self.poster)


def print_cutting(repeats: int, device: str) -> None:
    """One gather of all patches beside slices, and cutting once beside cutting in each inner step."""
    rows = []
    for name, (grid, batch) in SEEDS.items():
        cut = Cutting(grid, batch, device)
        work = [cut.gather, cut.slices, cut.gather_and_back, cut.slices_and_back, cut.once, cut.each, cut.own]
        turns = [[1e3 * seconds(job, device) for job in work] for _ in range(repeats + 1)][1:]  # the first warms up
        ours, theirs, back, theirs_back, once, each, own = map(statistics.median, zip(*turns, strict=True))
        numbers = [ours, ours / theirs, back, back / theirs_back, once / STEPS, each / once, own / once]
        rows.append([f"{name}, {len(grid)} of {grid.cell[0]} px, {batch} a step", *(f"{n:.2f}" for n in numbers)])
    header = ["patches", "gather, ms", "to slices", "gather and back, ms", "to slices"]
    header += ["cut once, ms an inner step", "all cut in each, to once", "its own cut in each, to once"]
    table(f"Patches: a gather beside slices; cut once for {STEPS} inner steps beside in each", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(environment(args.device))
    print_cutting(args.repeats, args.device)


if __name__ == "__main__":
    main()
