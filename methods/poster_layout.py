"""Where things are on a poster: patches, class areas and cells of the label map are one geometry.

A `Grid` lays equal rectangles evenly over a canvas, the outermost ones at its edges; they may overlap. From it follow
the crops that networks train on, the areas that classes own, the crops of the label map, and the way back from crops to
a canvas. All sizes are (height, width) and all counts (rows, columns). Cells are counted as PoDD counts its patches:
down a column first, then the next column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from utils.config import option
from utils.devices import moved
from utils.errors import UserError


@dataclass(frozen=True)
class GridConfig:
    """The poster and what is cut out of it; the defaults are those of CIFAR-10 at 0.9 images a class."""

    poster_width: int = option(153, "width of the poster in pixels", low=1)
    poster_height: int = option(60, "height of the poster in pixels", low=1)
    patch_num_x: int = option(16, "patches side by side", low=1)
    patch_num_y: int = option(6, "patches one below the other", low=1)
    poster_class_num_x: int = option(5, "classes side by side", low=1)
    poster_class_num_y: int = option(2, "classes one below the other", low=1)
    class_area_width: int = option(0, "width of a class's area in pixels (0: an image's)", low=0)
    class_area_height: int = option(0, "height of a class's area in pixels (0: an image's)", low=0)

    def check_classes(self, classes: int) -> None:
        """UserError unless the class grid has a place for each class."""
        across, down = self.poster_class_num_x, self.poster_class_num_y
        if across * down != classes:
            raise UserError(
                f"--poster_class_num_x {across} times --poster_class_num_y {down} is {across * down}, and the data has "
                f"{classes} classes; their product must be that"
            )


@dataclass(frozen=True)
class Grid:
    """`count` rectangles of size `cell`, spread over `canvas`."""

    canvas: tuple[int, int]
    cell: tuple[int, int]
    count: tuple[int, int]

    def __len__(self) -> int:
        return self.count[0] * self.count[1]

    @property
    def tops(self) -> list[int]:
        return _offsets(self.canvas[0], self.cell[0], self.count[0])

    @property
    def lefts(self) -> list[int]:
        return _offsets(self.canvas[1], self.cell[1], self.count[1])

    def boxes(self) -> Tensor:
        """(M, 4) long: top, left, bottom, right of each cell; the last two are just outside it."""
        tops, lefts = torch.tensor(self.tops), torch.tensor(self.lefts)
        corner = torch.stack([tops.repeat(len(lefts)), lefts.repeat_interleave(len(tops))], 1)
        return torch.cat([corner, corner + torch.tensor(self.cell)], 1)

    @cached_property
    def index(self) -> Tensor:
        """(M, h·w) long: the places of each cell's pixels in the flattened canvas."""
        width, boxes = self.canvas[1], self.boxes()
        inside = torch.arange(self.cell[0])[:, None] * width + torch.arange(self.cell[1])
        return (boxes[:, 0] * width + boxes[:, 1])[:, None] + inside.flatten()

    def uncovered(self) -> int:
        """Pixels of the canvas that are in no cell."""
        rows, columns = (
            len({place for start in starts for place in range(start, start + side)})
            for starts, side in ((self.tops, self.cell[0]), (self.lefts, self.cell[1]))
        )
        return self.canvas[0] * self.canvas[1] - rows * columns

    def cut(self, canvas: Tensor) -> Tensor:
        """The cells (M, C, h, w) of a canvas (C, H, W), differentiable: one gather, whatever their number."""
        places = moved(self.index, canvas.device)
        return canvas.flatten(1)[:, places].view(-1, len(self), *self.cell).transpose(0, 1)

    def blend(self, cells: Tensor) -> Tensor:
        """A canvas (C, H, W) of cells (M, C, h, w): where two overlap, the left or upper one fades into the other.

        Each row is joined from left to right, then the rows from top to bottom. Over an overlap of o pixels the first
        one's weight falls linearly from 1 to 0, both ends reached; a gap stays 0.
        """
        rows, columns = self.count
        grid = cells.unflatten(0, (columns, rows)).transpose(0, 1)  # rows, columns, C, h, w
        joined = [_joined(list(row), self.lefts, self.canvas[1], -1) for row in grid]
        return _joined(joined, self.tops, self.canvas[0], -2)

    def overlaps(self, other: Grid) -> Tensor:
        """(M, N) long: how many pixels each cell here shares with each of another grid on the same canvas."""
        mine, theirs = self.boxes()[:, None], other.boxes()[None]
        least, most = torch.maximum(mine[..., :2], theirs[..., :2]), torch.minimum(mine[..., 2:], theirs[..., 2:])
        return (most - least).clamp_min(0).prod(-1)


@dataclass(frozen=True)
class Layout:
    """A poster's plan.

    patches   what networks train on
    areas     what each class owns, on the same canvas
    order     (rows, columns) long: the class of each area
    """

    patches: Grid
    areas: Grid
    order: Tensor

    @property
    def classes(self) -> int:
        return self.order.numel()

    @property
    def pixels(self) -> int:
        return self.patches.canvas[0] * self.patches.canvas[1]

    @property
    def ipc(self) -> float:
        """Images a class that have as many pixels."""
        return self.pixels / (self.classes * self.patches.cell[0] * self.patches.cell[1])

    def owners(self) -> Tensor:
        """(K,) long: the class of each area, counted as cells are."""
        return self.order.T.flatten()

    def counts(self) -> Tensor:
        """(M, K) long: pixels of each patch that each class owns; those in two areas count for both."""
        found = torch.zeros(len(self.patches), self.classes, dtype=torch.long)
        found[:, self.owners()] = self.patches.overlaps(self.areas)
        return found


def plan(cfg: GridConfig, size: int, order: Tensor) -> Layout:
    """The layout of a poster of images of side `size`, classes placed as `order` (rows, columns).

    UserError where the order is of another grid, a patch or an area does not fit on the poster, or the patches leave
    pixels out: nobody would ever train those.
    """
    cfg.check_classes(order.numel())
    rows, columns = order.shape
    if (rows, columns) != (cfg.poster_class_num_y, cfg.poster_class_num_x):
        raise UserError(
            f"the order of classes has {rows} rows of {columns}, not the {cfg.poster_class_num_y} rows of "
            f"{cfg.poster_class_num_x} of --poster_class_num_y and --poster_class_num_x; give those, or another order"
        )
    canvas = cfg.poster_height, cfg.poster_width
    area = cfg.class_area_height or size, cfg.class_area_width or size
    smaller = ", or lower --class_area_width or --class_area_height"
    for what, cell, other in (("a patch", (size, size), ""), ("a class area", area, smaller)):
        if cell[0] > canvas[0] or cell[1] > canvas[1]:
            raise UserError(
                f"{what} of {cell[1]} x {cell[0]} pixels does not fit on a poster of {canvas[1]} x {canvas[0]} "
                f"(width x height); enlarge --poster_width or --poster_height{other}"
            )
    patches = Grid(canvas, (size, size), (cfg.patch_num_y, cfg.patch_num_x))
    if left := patches.uncovered():
        down, across = (-(-side // size) for side in canvas)
        raise UserError(
            f"{left} of the poster's {canvas[0] * canvas[1]} pixels are in no patch, so nothing would train them; "
            f"a poster of {canvas[1]} x {canvas[0]} takes at least --patch_num_x {across} --patch_num_y {down}"
        )
    return Layout(patches, Grid(canvas, area, (cfg.poster_class_num_y, cfg.poster_class_num_x)), order)


def _offsets(length: int, side: int, count: int) -> list[int]:
    """Starts of `count` stretches over a line, first and last at its ends; halves go to the even neighbour."""
    return np.rint(np.linspace(0, length - side, count)).astype(int).tolist()


def _joined(parts: Sequence[Tensor], starts: Sequence[int], length: int, axis: int) -> Tensor:
    """Strips laid one after another along `axis` at `starts`, each fading into the next."""
    whole = parts[0]
    for part, start in zip(parts[1:], starts[1:], strict=True):
        side = part.shape[axis]
        whole = _reaching(whole, start, axis)
        shared = whole.shape[axis] - start
        fade = torch.linspace(1, 0, shared, dtype=whole.dtype, device=whole.device)
        fade = fade.view(-1, *[1] * (-axis - 1))
        mixed = fade * whole.narrow(axis, start, shared) + (1 - fade) * part.narrow(axis, 0, shared)
        rest = part.narrow(axis, shared, side - shared)
        whole = torch.cat([whole.narrow(axis, 0, start), mixed, rest], axis)
    return _reaching(whole, length, axis)


def _reaching(strip: Tensor, length: int, axis: int) -> Tensor:
    """The strip, with zeros up to `length` where it is shorter."""
    gap = list(strip.shape)
    gap[axis] = max(0, length - gap[axis])
    return torch.cat([strip, strip.new_zeros(gap)], axis)
