"""What photographs go through before a student sees them, on whole batches and on any device.

All chance comes from the CPU generator that is handed in, in a fixed order and for the batch as a whole, so an equal
generator gives equal images (beyond float rounding) on every device. Images are float in [0, 1] until `normalised`.
Sources: the transforms of IDC (Kim et al., ICML 2022), which Minimax diffusion and VLCP train with; CutMix (Yun et al.,
ICCV 2019); the patch shuffle of RDED (Sun et al., CVPR 2024).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment import random_boxes
from data.images import Stats
from utils.rng import draw_seed, seeded

GREY = (0.299, 0.587, 0.114)
JITTER = 0.4  # each of brightness, contrast and saturation moves by up to this share, either way
LIGHTING = 0.1  # standard deviation along each principal axis of ImageNet's colours
# The axes (one a column) and their eigenvalues, as AlexNet's authors measured them.
_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_ORDERS = torch.tensor(list(itertools.permutations(range(3))))  # (6, 3)


def normalised(images: Tensor, stats: Stats) -> Tensor:
    """The images less the mean, in standard deviations, a channel at a time."""
    mean, std = (torch.tensor(part, device=images.device)[:, None, None] for part in stats)
    return (images - mean) / std


def random_crops(images: Tensor, size: int, scale: tuple[float, float], rng: torch.Generator) -> Tensor:
    """(B, 3, size, size): torchvision's RandomResizedCrop (bilinear, antialiased), another box for each image."""
    shape = torch.tensor(images.shape[-2:]).expand(len(images), 2)
    return resized_crops(images, random_boxes(shape, rng, scale), size)


def resized_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """(B, C, size, size): from each image (C, H, W) its box, resized by an antialiased bilinear filter.

    boxes  (B, 4) long: top, left, height, width
    """
    if (boxes == boxes[0]).all():
        top, left, height, width = boxes[0].tolist()
        crops = images[..., top : top + height, left : left + width]
        return F.interpolate(crops, size=(size, size), mode="bilinear", antialias=True)
    boxes = boxes.to(images.device)
    rows = _filter(boxes[:, 0], boxes[:, 2], size, images.shape[-2])
    columns = _filter(boxes[:, 1], boxes[:, 3], size, images.shape[-1])
    return rows[:, None] @ images @ columns[:, None].mT


def _filter(start: Tensor, length: Tensor, size: int, total: int) -> Tensor:
    """(B, size, total): how much each pixel of a line counts in each of `size` pixels made of a stretch of it."""
    start, length = start.float()[:, None], length.float()[:, None]
    scale = length / size
    centre = start + scale * (torch.arange(size, device=start.device) + 0.5)  # (B, size)
    place = torch.arange(total, device=start.device) + 0.5
    weight = (1 - (place - centre[..., None]).abs() / scale.clamp(min=1)[..., None]).clamp(min=0)
    weight = weight * ((place > start) & (place < start + length))[:, None]
    return weight / weight.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Tint:
    """The colours of B images, changed.

    amounts  (B, 3) within ±0.4: how far towards black, towards the image's mean grey, towards its own greys
    order    (B, 3) long: which of these comes first, second, third
    light    (B, 3): what is added to red, green and blue at the end
    """

    amounts: Tensor
    order: Tensor
    light: Tensor


def draw_tint(count: int, rng: torch.Generator) -> Tint:
    """Colour jitter and PCA lighting for `count` images."""
    amounts = (2 * torch.rand(count, 3, generator=rng) - 1) * JITTER
    order = _ORDERS[torch.randint(len(_ORDERS), (count,), generator=rng)]
    light = torch.randn(count, 3, generator=rng) * LIGHTING * torch.tensor(_EIGENVALUES) @ torch.tensor(_AXES).T
    return Tint(amounts, order, light)


def tinted(images: Tensor, tint: Tint) -> Tensor:
    """The batch (B, 3, H, W) in other colours; what leaves [0, 1] stays outside, as published."""
    share, device = torch.tensor(GREY, device=images.device)[:, None, None], images.device
    for slot in range(3):
        kind = tint.order[:, slot]
        amount = tint.amounts.gather(1, kind[:, None])[:, 0]
        kind, amount = (part.to(device)[:, None, None, None] for part in (kind, amount))
        grey = (images * share).sum(1, keepdim=True)
        aim = torch.where(kind == 0, torch.zeros_like(grey), torch.where(kind == 1, grey.mean((2, 3), True), grey))
        images = images + amount * (aim - images)
    return images + tint.light.to(device)[:, :, None, None]


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed with itself in another order.

    order  (B,) long: the image that each is mixed with
    share  r, what an image keeps of its own label
    box    top, bottom, left, right of what comes from the other image; None: the whole, blended
    """

    order: Tensor
    share: float
    box: tuple[int, int, int, int] | None

    def __call__(self, images: Tensor) -> Tensor:
        other = images[self.order.to(images.device)]
        if self.box is None:
            return self.share * images + (1 - self.share) * other
        top, bottom, left, right = self.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        return mixed


def draw_mix(kind: str, alpha: float, count: int, side: int, rng: torch.Generator) -> Mix:
    """CutMix (`cutmix`) or mixup (`mixup`) of `count` images of `side` pixels, λ ~ Beta(α, α)."""
    kept = _beta(alpha, rng)
    order = torch.randperm(count, generator=rng)
    if kind == "mixup":
        return Mix(order, kept, None)
    row, column = torch.randint(side, (2,), generator=rng).tolist()
    box = cut_box(kept, side, row, column)
    top, bottom, left, right = box
    return Mix(order, 1 - (bottom - top) * (right - left) / side**2, box)


def cut_box(kept: float, side: int, row: int, column: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of CutMix's box: a share of 1 − `kept` of the image about a point, clipped to it."""
    half = int(side * (1 - kept) ** 0.5) // 2
    return max(row - half, 0), min(row + half, side), max(column - half, 0), min(column + half, side)


def _beta(alpha: float, rng: torch.Generator) -> float:
    if alpha == 1:
        return float(torch.rand((), generator=rng))
    with seeded(draw_seed(rng)):
        return float(torch.distributions.Beta(alpha, alpha).sample())


def draw_bands(count: int, factor: int, rng: torch.Generator) -> Tensor:
    """(B, 2, factor) long: the orders in which an image's column bands and its row bands are put."""
    return torch.rand(count, 2, factor, generator=rng).argsort(-1)


def shuffle_bands(images: Tensor, bands: Tensor) -> Tensor:
    """The batch (B, C, H, W) with each image's column bands, and then its row bands, in other orders.

    The last band takes what is left over of the side. For two bands that makes 4 pictures of a mosaic of 4 patches,
    not the 24 that shuffled patches would.
    """
    height, width = images.shape[-2:]
    columns = torch.stack([_places(width, tuple(order)) for order in bands[:, 0].tolist()]).to(images.device)
    rows = torch.stack([_places(height, tuple(order)) for order in bands[:, 1].tolist()]).to(images.device)
    which = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@functools.lru_cache(1024)
def _places(side: int, order: tuple[int, ...]) -> Tensor:
    """(side,) long: the pixel that each pixel of a line comes from."""
    step, last = side // len(order), len(order) - 1
    return torch.cat([torch.arange(band * step, side if band == last else (band + 1) * step) for band in order])
