"""PoDDL: the labels of a poster's patches, fixed by the areas that classes own, or learned as a small map beside it."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from methods.poster_layout import Grid, Layout
from utils.errors import UserError

LABEL_MODES = ("majority", "area")
LABEL_SHAPES = ("exact", "reference")


def fixed_labels(layout: Layout, mode: str) -> Tensor:
    """(M, K) float32 probabilities of each patch, from the pixels n of it that each class owns.

    mode   `area`: the shares n / Σn. `majority`: softmax of n, as released; n is in the hundreds, so all goes to the
           class that owns most, and is split evenly where two own as much

    UserError for a patch that lies outside all areas.
    """
    counts = layout.counts().double()
    if (bare := int((counts.sum(1) == 0).sum())) > 0:
        raise UserError(
            f"{bare} of {len(counts)} patches lie outside all class areas and would have no label; enlarge "
            "--class_area_width and --class_area_height, or learn labels with --train_y (eval.py: leave out crops)"
        )
    shares = counts.softmax(1) if mode == "majority" else counts / counts.sum(1, keepdim=True)
    return shares.float()


def map_shape(layout: Layout, budget: int, rule: str) -> tuple[int, int]:
    """Rows and columns of a label map with at most `budget` cells, in about the poster's proportions.

    With f = √(budget / (W·H)) the candidates are the roundings, up and down, of (H·f, W·f).

    rule   `exact`: the one that leaves fewest cells unused, of those with a row for each row of classes and a column
           for each column; the class grid itself where there is none. `reference`: as released, where a map that uses
           the whole budget is rejected, so that some classes start without a label anywhere
    """
    height, width = layout.patches.canvas
    if rule == "reference":
        # The order of these operations decides the last bit, and with it some shapes.
        factor = 1 / math.sqrt(width * height / budget)
        rows, columns = height * factor, width * factor
        choices = [(up(rows), to(columns)) for up in (math.ceil, math.floor) for to in (math.ceil, math.floor)]
        return min(choices, key=lambda shape: _unused(shape, budget) if _unused(shape, budget) > 0 else math.inf)
    factor = math.sqrt(budget / (width * height))
    down, across = layout.order.shape
    rows, columns = (_roundings(side * factor) for side in (height, width))
    choices = [(row, column) for row in rows for column in columns if row >= down and column >= across]
    choices = [shape for shape in choices if _unused(shape, budget) >= 0]
    return min(choices, key=lambda shape: _unused(shape, budget), default=(down, across))


def map_grid(layout: Layout, shape: tuple[int, int]) -> Grid:
    """The cells of a label map of this shape that belong to each patch."""
    sides = zip(shape, layout.patches.cell, layout.patches.canvas, strict=True)
    cell = tuple(max(1, side * patch // canvas) for side, patch, canvas in sides)
    return Grid(shape, cell, layout.patches.count)


def start_map(layout: Layout, shape: tuple[int, int]) -> Tensor:
    """The map (K, h, w) before any step: bands of one class each, where that class has 1 and all others 0."""
    down, across = layout.order.shape
    rows, columns = (_bands(side, count) for side, count in zip(shape, (down, across), strict=True))
    cells = layout.order[rows][:, columns]  # h, w
    return torch.nn.functional.one_hot(cells, layout.classes).permute(2, 0, 1).float()


def map_labels(label_map: Tensor, grid: Grid) -> Tensor:
    """(M, K) probabilities of each patch, differentiable: the scores of its cells, summed and shared out.

    A patch whose scores are all 0 has no label: zeros, from which nothing is learned.
    """
    scores = grid.cut(label_map).sum((2, 3))
    total = scores.sum(1, keepdim=True)
    return scores / torch.where(total > 0, total, torch.ones_like(total))


def _unused(shape: tuple[int, int], budget: int) -> int:
    return budget - shape[0] * shape[1]


def _roundings(value: float) -> set[int]:
    """Up and down to whole numbers; what is one but for rounding stays itself."""
    near = round(value)
    return {near} if math.isclose(value, near, rel_tol=1e-9) else {math.floor(value), math.ceil(value)}


def _bands(side: int, count: int) -> Tensor:
    """(side,) long: which of `count` bands each of `side` places belongs to."""
    edges = Grid((1, side), (1, 0), (1, count + 1)).lefts
    lengths = [after - before for before, after in pairwise(edges)]
    return torch.arange(count).repeat_interleave(torch.tensor(lengths))
