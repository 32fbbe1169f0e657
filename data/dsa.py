"""Differentiable augmentation of image batches, and the older augmentation it replaced.

One of six operations is drawn for a whole batch, its strength for each image. All chance is drawn on the CPU, from a
generator that the caller gives, and then moved; so an equal generator gives equal transforms on every device. The
operations act on whatever the network sees, normalised or whitened, and let gradients through to the images.

    ops = parse_strategy("color_crop_cutout_flip_scale_rotate")
    images = augment(images, ops, rng)

Colour is brightness, saturation and contrast, which are operations by themselves, too. RaT-BPTT and PoDD draw one of
these where they draw colour (`poster_augment`).

Source: Zhao and Bilen, Dataset Condensation with Differentiable Siamese Augmentation (ICML 2021), in the form that
trajectory matching uses it: colour, a crop by an eighth, a cutout of half the side, flip, scale by 1.2, turn by 15°.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.devices import moved
from utils.errors import UserError
from utils.registry import nearest

COLORS = ("brightness", "saturation", "contrast")
ALWAYS = ("flip", "color", "cutout")  # in this order, where poster_augment composes
STRATEGY = "color_crop_cutout_flip_scale_rotate"
CROP = 0.125  # reach of a crop, as a share of the side
CUTOUT = 0.5  # side of what a cutout removes, as a share of the image's
SCALE = 1.2
ROTATE = 15.0  # degrees


def parse_strategy(text: str) -> tuple[str, ...]:
    """The operations that `text` joins by underscores; none for 'none' or nothing. UserError for one that is unknown.

    An operation named twice is drawn twice as often.
    """
    if text.lower() in ("", "none"):
        return ()
    names = tuple(text.lower().split("_"))
    for name in names:
        if name not in OPS:
            raise UserError(
                f"unknown augmentation '{name}' in '{text}'{nearest(name, OPS)}; join some of {', '.join(OPS)} by '_'"
            )
    return names


def augment(images: Tensor, ops: tuple[str, ...], rng: torch.Generator) -> Tensor:
    """Images (B, C, H, W) after one operation, drawn for the batch; each image has its own strength.

    ops  of `parse_strategy`; none returns the images as they are and draws nothing
    rng  a CPU generator, the only chance
    """
    return _one_of(images, ops, _Fresh(len(images), rng)) if ops else images


def siamese(images: Tensor, ops: tuple[str, ...], seed: int) -> Tensor:
    """Images (B, C, H, W) after one operation of one strength for all, which follow from `seed` alone.

    Two batches of any sizes undergo the same transform. The choice and then each draw have a generator of their own,
    seeded by `seed`, `seed` + 1 and so on, as published. ValueError for a negative seed: that is `augment`.
    """
    if seed < 0:
        raise ValueError(f"a seed is at least 0, not {seed}")
    return _one_of(images, ops, _Shared(len(images), seed)) if ops else images


def poster_augment(strategy: str, composed: bool) -> Callable[[Tensor, torch.Generator], Tensor] | None:
    """(images (B, C, H, W), CPU generator) → images, as RaT-BPTT and PoDD augment; None where nothing is asked for.

    strategy  as for `parse_strategy`; `color` is one of COLORS, drawn
    composed  those of ALWAYS that are named are all done, with all of colour, and then one of the others, drawn; else
              one of all that are named; a name that comes twice counts twice only in the latter case

    One operation is drawn for the batch, its strength for each image.
    """
    ops = parse_strategy(strategy)
    if not ops:
        return None
    first, rest = [], ops
    if composed:
        first = [name for name in ALWAYS if name in ops]
        rest = tuple(name for name in dict.fromkeys(ops) if name not in ALWAYS)

    def change(images: Tensor, rng: torch.Generator) -> Tensor:
        chance = _Fresh(len(images), rng)
        for name in first:
            images = OPS[name](images, chance)
        if not rest:
            return images
        name = rest[chance.choice(len(rest))]
        return _one_of(images, COLORS, chance) if name == "color" else OPS[name](images, chance)

    return change


class _Chance(Protocol):
    """Draws on the CPU: (B,) float32 within [0, 1), and (B,) long within `low` to `high`, both included."""

    def choice(self, count: int) -> int: ...

    def uniform(self) -> Tensor: ...

    def integers(self, low: int, high: int) -> Tensor: ...


class _Fresh:
    """Each image has its own draw, all from one generator."""

    def __init__(self, count: int, rng: torch.Generator) -> None:
        self.count, self.rng = count, rng

    def choice(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.rng))

    def uniform(self) -> Tensor:
        return torch.rand(self.count, generator=self.rng)

    def integers(self, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (self.count,), generator=self.rng)


class _Shared:
    """All images share each draw, which has a seed of its own."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def _next(self) -> _Fresh:
        rng = torch.Generator().manual_seed(self.seed)
        self.seed += 1
        return _Fresh(1, rng)

    def choice(self, count: int) -> int:
        return self._next().choice(count)

    def uniform(self) -> Tensor:
        return self._next().uniform().expand(self.count)

    def integers(self, low: int, high: int) -> Tensor:
        return self._next().integers(low, high).expand(self.count)


def _one_of(images: Tensor, ops: tuple[str, ...], chance: _Chance) -> Tensor:
    return OPS[ops[chance.choice(len(ops))]](images, chance)


def color(images: Tensor, brighter: Tensor, saturated: Tensor, contrasted: Tensor) -> Tensor:
    """Images brighter, then more or less saturated, then of more or less contrast; three (B,) within [0, 1)."""
    return contrast(saturation(brightness(images, brighter), saturated), contrasted)


def brightness(images: Tensor, amount: Tensor) -> Tensor:
    """Each image plus `amount` − 0.5; (B,) within [0, 1)."""
    return images + (_along(images, amount) - 0.5)


def saturation(images: Tensor, amount: Tensor) -> Tensor:
    """Each pixel's distance from its own grey times 2 · `amount`, (B,) within [0, 1); one channel keeps its pixels."""
    return torch.lerp(images.mean(1, keepdim=True), images, 2 * _along(images, amount))


def contrast(images: Tensor, amount: Tensor) -> Tensor:
    """Each image's distance from its mean times `amount` + 0.5; (B,) within [0, 1)."""
    return torch.lerp(images.mean((1, 2, 3), keepdim=True), images, _along(images, amount) + 0.5)


def crop(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Each image seen through a window moved by `down` and `right` (B,) long pixels; zero outside the image."""
    height, width = images.shape[2:]
    rows, columns = (
        moved(shift, images.device)[:, None] + torch.arange(side, device=images.device)
        for shift, side in ((down, height), (right, width))
    )
    outside = ((rows < 0) | (rows >= height))[:, None, :, None] | ((columns < 0) | (columns >= width))[:, None, None]
    # Cyclic places are all different, so the backward pass adds nothing up and is the same each time.
    seen = _gather(images, 2, rows % height)
    return _gather(seen, 3, columns % width).masked_fill(outside, 0)


def cutout(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Each image with a square of half its side set to zero, centred at `rows`, `columns` (B,) long.

    What reaches beyond the edge removes nothing.
    """
    hits = []
    for centre, side in ((rows, images.shape[2]), (columns, images.shape[3])):
        size = _cutout_size(side)
        first = moved(centre, images.device)[:, None] - size // 2
        place = torch.arange(side, device=images.device)
        hits.append((place >= first) & (place < first + size))
    return images.masked_fill(hits[0][:, None, :, None] & hits[1][:, None, None], 0)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Each image mirrored left to right where `mirrored` (B,) bool says so."""
    columns = torch.arange(images.shape[3], device=images.device)
    return _gather(images, 3, torch.where(moved(mirrored, images.device)[:, None], columns.flip(0), columns))


def scale(images: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Each image's content shrunk by the factors `across` and `down` (B,) about its centre; zero beyond its edge."""
    x, y = _points(images)
    across, down = (_like(images, value)[:, None, None] for value in (across, down))
    shape = (len(images), *images.shape[2:])
    return _sample(images, (across * x).expand(shape), (down * y).expand(shape))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Each image's content turned counter-clockwise by `degrees` (B,) about its centre; zero beyond its edge.

    Angles are those of the square from −1 to 1 that any image is mapped to, so other shapes are sheared a little.
    """
    x, y = _points(images)
    angle = _like(images, torch.deg2rad(degrees))[:, None, None]
    return _sample(images, angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y)


def _draw_color(images: Tensor, chance: _Chance) -> Tensor:
    return color(images, chance.uniform(), chance.uniform(), chance.uniform())


def _draw_brightness(images: Tensor, chance: _Chance) -> Tensor:
    return brightness(images, chance.uniform())


def _draw_saturation(images: Tensor, chance: _Chance) -> Tensor:
    return saturation(images, chance.uniform())


def _draw_contrast(images: Tensor, chance: _Chance) -> Tensor:
    return contrast(images, chance.uniform())


def _draw_crop(images: Tensor, chance: _Chance) -> Tensor:
    reaches = [int(CROP * side + 0.5) for side in images.shape[2:]]
    return crop(images, *(chance.integers(-reach, reach) for reach in reaches))


def _draw_cutout(images: Tensor, chance: _Chance) -> Tensor:
    return cutout(images, *(chance.integers(0, side - _cutout_size(side) % 2) for side in images.shape[2:]))


def _draw_flip(images: Tensor, chance: _Chance) -> Tensor:
    return flip(images, chance.uniform() < 0.5)


def _draw_scale(images: Tensor, chance: _Chance) -> Tensor:
    return scale(images, *(1 / SCALE + (SCALE - 1 / SCALE) * chance.uniform() for _ in range(2)))


def _draw_rotate(images: Tensor, chance: _Chance) -> Tensor:
    return rotate(images, ROTATE * (2 * chance.uniform() - 1))


OPS: dict[str, Callable[[Tensor, _Chance], Tensor]] = {
    "color": _draw_color,
    "crop": _draw_crop,
    "cutout": _draw_cutout,
    "flip": _draw_flip,
    "scale": _draw_scale,
    "rotate": _draw_rotate,
    "brightness": _draw_brightness,
    "saturation": _draw_saturation,
    "contrast": _draw_contrast,
}


def _along(images: Tensor, values: Tensor) -> Tensor:
    return _like(images, values).view(-1, 1, 1, 1)


def _like(images: Tensor, values: Tensor) -> Tensor:
    return moved(values.to(images.dtype), images.device)


def _gather(images: Tensor, axis: int, places: Tensor) -> Tensor:
    """Each image's rows (axis 2) or columns (axis 3) at `places` (B, side) long."""
    view = places[:, None, :, None] if axis == 2 else places[:, None, None]
    return images.gather(axis, view.expand(*images.shape[:axis], -1, *images.shape[axis + 1 :]))


def _cutout_size(side: int) -> int:
    return int(CUTOUT * side + 0.5)


def _points(images: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of the pixels, x (W,) and y (H, 1): −1 and 1 are the middles of the outermost ones."""
    height, width = images.shape[2:]
    x = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype)
    y = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype)
    return x, y[:, None]


def _sample(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Images read between pixels at x, y (B, H, W)."""
    # The grid is not made by F.affine_grid, whose matrix product may be rounded on a GPU.
    grid = torch.stack([x, y], -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def crop_scale_rotate(images: Tensor, rng: torch.Generator) -> Tensor:
    """Images (B, C, H, W) after the older augmentation of dataset condensation: each undergoes one of three changes.

    crop    moved by −4 to 3 pixels both ways; what comes in is the batch's mean of each channel
    scale   height and width resized by factors within (0.8, 1.2), to the nearest pixel, about the centre; zero outside
    rotate  turned by a whole number of degrees from −45 to 44; what comes in is the batch's mean

    Strengths are those of Zhao et al., Dataset Condensation with Gradient Matching (ICLR 2021). Rotation reads between
    pixels linearly, not by the cubic splines of the released code. All chance is from `rng`, a CPU generator.
    """
    count = len(images)
    kinds = torch.randint(3, (count,), generator=rng)
    shifts = torch.randint(-4, 4, (2, count), generator=rng)
    factors = 0.8 + 0.4 * torch.rand(2, count, generator=rng)
    degrees = torch.randint(-45, 45, (count,), generator=rng).to(images.dtype)

    means = images.mean((0, 2, 3), keepdim=True)
    changed = images.clone()
    for kind in range(3):
        chosen = (kinds == kind).nonzero()[:, 0]
        if not len(chosen):
            continue
        places = moved(chosen, images.device)
        part = images[places]
        if kind == 0:
            # Zeros beyond the edge of (image − mean) are the mean beyond the edge of the image.
            part = crop(part - means, *shifts[:, chosen]) + means
        elif kind == 1:
            part = _resized(part, factors[:, chosen])
        else:
            part = rotate(part - means.mean(), degrees[chosen]) + means.mean()
        changed[places] = part
    return changed


def _resized(images: Tensor, factors: Tensor) -> Tensor:
    """Each image's height and width times `factors` (2, B), to the nearest pixel and about its centre; zero outside."""
    outside = torch.zeros((), dtype=torch.bool, device=images.device)
    for axis, factor in ((2, factors[0]), (3, factors[1])):
        side = images.shape[axis]
        size = moved((factor * side).long().clamp(min=1), images.device)[:, None]
        place = torch.arange(side, device=images.device) - torch.div(side - size, 2, rounding_mode="floor")
        beyond = (place < 0) | (place >= size)
        outside = outside | (beyond[:, None, :, None] if axis == 2 else beyond[:, None, None])
        images = _gather(images, axis, (place * side // size).clamp(0, side - 1))
    return images.masked_fill(outside, 0)
