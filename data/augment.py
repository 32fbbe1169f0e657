"""The train transform of image–text training: a random crop, a flip and RandAugment, on batches of 8-bit images.

All chance is drawn first, on the CPU and in a fixed order, and then applied; so an equal generator gives equal images
whatever the device or the number of workers. Images stay uint8 between operations, as in the published pipelines, which
makes the tone curves below exact.

Source: the transform of VLDD and LoRS, which is BLIP's (Li et al., ICML 2022): RandomResizedCrop with scale (0.5, 1),
horizontal flip, RandAugment (Cubuk et al., 2020) of two ops at magnitude 5 of 10, each applied half of the time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.devices import moved

SHIFTS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
OPS = ("identity", "autocontrast", "brightness", "sharpness", "equalize", *SHIFTS)
GREY = 128.0  # what a shifted image shows beyond its edge


def magnitude(op: str, level: float) -> float:
    """The strength of `op` at RandAugment's `level` (0 to 10): a slope, pixels, degrees, or a blending factor.

    A blending factor of 1 (brightness and sharpness at level 5) leaves the image as it is.
    """
    if op in ("shear_x", "shear_y"):
        return level / 10 * 0.3
    if op in ("translate_x", "translate_y"):
        return level / 10 * 10
    if op == "rotate":
        return level / 10 * 30
    return level / 10 * 1.8 + 0.1


def random_boxes(sizes: Tensor, rng: torch.Generator, scale: tuple[float, float] = (0.5, 1.0)) -> Tensor:
    """One crop an image, (B, 4) long: top, left, height, width.

    sizes  (B, 2) long, the images' heights and widths
    scale  the range of the crop's share of the image's area; its width/height is within (3/4, 4/3)

    Ten tries that may overrun the image, then the largest central crop, as torchvision's RandomResizedCrop does it.
    """
    count, tries = len(sizes), 10
    area, shape = torch.rand(2, count, tries, generator=rng, dtype=torch.float64)
    place = torch.rand(count, 2, generator=rng, dtype=torch.float64)

    full = sizes.double()
    height, width = full[:, :1], full[:, 1:]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    ratio = torch.exp(math.log(4 / 3) * (2 * shape - 1))
    crops = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()], -1)  # (B, tries, 2)
    fits = ((crops > 0) & (crops <= full[:, None])).all(-1)
    first = (fits * torch.arange(tries, 0, -1)).argmax(1)
    central = torch.minimum(full, (full.flip(1) * 4 / 3).round())

    found = fits.any(1, keepdim=True)
    crop = torch.where(found, crops[torch.arange(count), first], central)
    corner = torch.floor(torch.where(found, place, 0.5) * (full - crop + 1))
    return torch.cat([corner, crop], 1).long()


def resized_crop(image: Tensor, box: Tensor, size: int) -> Tensor:
    """A crop of one image (H, W, 3) uint8, resized to (3, size, size) uint8: antialiased bicubic, as PIL's."""
    top, left, height, width = box.tolist()
    crop = image[top : top + height, left : left + width].permute(2, 0, 1)
    return F.interpolate(crop[None], size=(size, size), mode="bicubic", antialias=True)[0]


def random_flip(images: Tensor, rng: torch.Generator) -> Tensor:
    """The batch (B, C, H, W) with each image mirrored left to right or not, by a fair coin."""
    heads = torch.rand(len(images), generator=rng) < 0.5
    return torch.where(moved(heads, images.device)[:, None, None, None], images.flip(3), images)


def draw_ops(count: int, rng: torch.Generator, slots: int = 2) -> tuple[Tensor, Tensor]:
    """What RandAugment does to `count` images: `ops` (slots, B) long, places in OPS, and `signs` (slots, B), ±1.

    A slot's op is drawn from the ten with replacement and then skipped (made the identity) half of the time.
    """
    ops = torch.randint(len(OPS), (slots, count), generator=rng)
    applied = torch.rand(slots, count, generator=rng) < 0.5
    signs = torch.randint(2, (slots, count), generator=rng) * 2.0 - 1
    return torch.where(applied, ops, OPS.index("identity")), signs


def rand_augment(images: Tensor, ops: Tensor, signs: Tensor, level: float = 5) -> Tensor:
    """The batch (B, 3, s, s) uint8 after the ops of `draw_ops`, slot by slot."""
    images = images.clone()
    families = ((_shift, SHIFTS), (_retone, ("autocontrast", "equalize")), (_enhance, ("brightness", "sharpness")))
    for op, sign in zip(ops, signs, strict=True):
        for change, names in families:
            chosen = torch.isin(op, torch.tensor([OPS.index(name) for name in names])).nonzero()[:, 0]
            if len(chosen):
                places = moved(chosen, images.device)
                images[places] = change(images[places], op[chosen], sign[chosen], level)
    return images


def _shift(images: Tensor, ops: Tensor, signs: Tensor, level: float) -> Tensor:
    matrices = torch.empty(len(ops), 2, 3)
    for name in SHIFTS:
        chosen = ops == OPS.index(name)
        matrices[chosen] = _matrix(name, signs[chosen] * magnitude(name, level), images.shape[-1])
    matrices = moved(matrices, images.device)[:, None, None]  # (n, 1, 1, 2, 3)
    middle = (2 * torch.arange(images.shape[-1], device=images.device) + 1) / images.shape[-1] - 1
    # As F.affine_grid, but its matrix product is slower here and is rounded where half precision is allowed.
    along = matrices[..., 0] * middle[None, None, :, None] + matrices[..., 2]  # (n, 1, s, 2)
    grid = along + matrices[..., 1] * middle[None, :, None, None]  # (n, s, s, 2)
    # Zeros beyond the edge of (image - grey) are grey beyond the edge of the image.
    shifted = F.grid_sample(images.float() - GREY, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (shifted + GREY).round_().to(torch.uint8)


def _matrix(name: str, amount: Tensor, size: int) -> Tensor:
    """(n, 2, 3): where in the input each output point comes from, both in coordinates from -1 to 1.

    Content moves right and down by a positive translation and turns anticlockwise by a positive angle about the centre;
    a shear keeps the top-left corner in place.
    """
    zero, one = torch.zeros_like(amount), torch.ones_like(amount)
    angle = torch.deg2rad(amount)
    step = -2 * amount / size  # pixels to coordinates
    rows = {
        "shear_x": (one, amount, amount, zero, one, zero),
        "shear_y": (one, zero, zero, amount, one, amount),
        "translate_x": (one, zero, step, zero, one, zero),
        "translate_y": (one, zero, zero, zero, one, step),
        "rotate": (angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero),
    }[name]
    return torch.stack(rows, -1).view(-1, 2, 3)


def _retone(images: Tensor, ops: Tensor, signs: Tensor, level: float) -> Tensor:
    """Each channel through a table of 256 tones that depends on its histogram."""
    lanes = images.shape[0] * images.shape[1]  # one table a channel, all in a row
    first = torch.arange(0, lanes * 256, 256, dtype=torch.int32, device=images.device)
    places = (images.flatten(2).flatten(0, 1).int() + first[:, None]).flatten()
    histogram = torch.bincount(places, minlength=lanes * 256).view(*images.shape[:2], 256)
    equalized = moved(ops == OPS.index("equalize"), images.device)[:, None, None]
    tables = torch.where(equalized, _equalize(histogram), _autocontrast(histogram)).to(torch.uint8)
    return tables.flatten().index_select(0, places).view_as(images)


def _autocontrast(histogram: Tensor) -> Tensor:
    """Tone tables (n, 3, 256) that stretch the darkest tone to 0 and the brightest to 255. Source: PIL.ImageOps."""
    tones = torch.arange(256, device=histogram.device)
    seen = histogram > 0
    low = torch.where(seen, tones, 255).amin(-1, keepdim=True)
    high = torch.where(seen, tones, 0).amax(-1, keepdim=True)
    # A true division: `255.0 / x` is 255 times the reciprocal in torch, which now and then lands one tone lower.
    scale = torch.full_like(high, 255).double() / (high - low)
    stretched = (tones * scale - low * scale).clamp(0, 255).long()
    return torch.where(high > low, stretched, tones)


def _equalize(histogram: Tensor) -> Tensor:
    """Tone tables (n, 3, 256) that spread the pixels evenly over the tones. Source: PIL.ImageOps."""
    tones = torch.arange(256, device=histogram.device)
    brightest = torch.where(histogram > 0, tones, 0).amax(-1, keepdim=True)
    step = (histogram.sum(-1, keepdim=True) - histogram.gather(-1, brightest)) // 255
    below = histogram.cumsum(-1) - histogram
    spread = (step // 2 + below) // step.clamp(min=1)
    return torch.where(step > 0, spread.clamp(max=255), tones)


def _enhance(images: Tensor, ops: Tensor, signs: Tensor, level: float) -> Tensor:
    """A blend with a plainer image, black for brightness and smoothed for sharpness. Source: PIL.ImageEnhance."""
    factor = magnitude("sharpness", level)
    if factor == 1:
        return images
    full = images.float()
    plain = torch.zeros_like(full)
    smoothed = moved((ops == OPS.index("sharpness")).nonzero()[:, 0], images.device)
    plain[smoothed] = _smooth(full[smoothed])
    return torch.lerp(plain, full, factor).clamp_(0, 255).round_().to(torch.uint8)


def _smooth(images: Tensor) -> Tensor:
    """Every pixel but the outermost averaged with its neighbours, itself counted five times; whole tones."""
    kernel = torch.ones(images.shape[1], 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel / 13, groups=images.shape[1]).round_()
    return smooth
