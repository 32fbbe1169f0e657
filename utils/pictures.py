"""Image tensors as PNG files, and the one place where image files are opened."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils.files import atomic

if TYPE_CHECKING:
    from PIL.Image import Image

# What data sets come in; PIL knows stranger formats, some of which start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_LONGEST = 1000  # times as long as wide: with its short side brought to a network's it would fill the memory
_PADDING = 2  # black pixels around each picture of a grid


class TooManyPixels(ValueError):
    """An image that a few bytes of a file claim to be, and that would fill the memory."""


def open_image(source: bytes | Path, formats: Sequence[str] = FORMATS, times: int = 1) -> Image:
    """The image in a file, or in its content, opened and not yet decoded; of several frames the first.

    TooManyPixels for more than `times` PIL's limit (89 million), and whatever PIL raises for what is damaged or of none
    of these formats.
    """
    from PIL import Image

    # It warns of what is refused here. Not in `catch_warnings`, which several threads would undo for each other.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    most = times * (Image.MAX_IMAGE_PIXELS or float("inf"))
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=tuple(formats))
    except Image.DecompressionBombError:  # twice its limit
        raise TooManyPixels(f"it has too many pixels, more than {most:,}") from None
    if image.width * image.height > most:
        image.close()
        raise TooManyPixels(f"it has too many pixels, more than {most:,}")
    return image


def check_sides(image: Image) -> None:
    """ValueError for an image more than a thousand times as long as wide."""
    if max(image.size) > _LONGEST * min(image.size):
        raise ValueError(f"it is {image.width} pixels wide and {image.height} high")


def save_grid(path: Path | str, images: Tensor, per_row: int = 10, scale_each: bool = True, upscale: int = 1) -> None:
    """Write `images` (N, 3, H, W) as one PNG, row by row from the top left, with black lines of 2 pixels between.

    per_row     pictures in a row
    scale_each  stretch each picture from its own least to its greatest value; otherwise all by the same two values
    upscale     enlarge by this whole factor, each pixel becoming a block

    VLDD's grids are `save_grid(path, images[:90], upscale=4)`. ValueError for no images.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"a grid takes images (N, 3, H, W) with N > 0, not {tuple(images.shape)}")
    images = images.detach().cpu().float()
    axes = (1, 2, 3) if scale_each else (0, 1, 2, 3)
    low, high = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
    pixels = _to_bytes((images - low) / (high - low).clamp_min(1e-5))
    pixels = pixels.repeat_interleave(upscale, dim=2).repeat_interleave(upscale, dim=3)

    count, _, height, width = pixels.shape
    columns = min(per_row, count)
    height, width = height + _PADDING, width + _PADDING
    grid = torch.zeros(3, -(-count // columns) * height + _PADDING, columns * width + _PADDING, dtype=torch.uint8)
    for index, picture in enumerate(pixels):
        top, left = index // columns * height + _PADDING, index % columns * width + _PADDING
        grid[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    with atomic(path) as temporary:
        temporary.write_bytes(png_bytes(grid))


def clip_std(images: Tensor, limit: float = 2.5) -> Tensor:
    """`images` cut at `limit` standard deviations either side of their mean, both over all values, as published."""
    mean, reach = images.mean(), limit * images.std()
    return images.clamp(mean - reach, mean + reach)


def to_uint8(
    images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, fit: bool = False
) -> Tensor:
    """Pictures (..., C, H, W) uint8 on the CPU from normalised floats; values outside [0, 1] are cut.

    mean, std   (C,) what the images were normalised by: x = (picture − mean) / std; None for 0 and 1
    fit         draw a picture that goes far beyond [0, 1], as learned ones do, back into it (but for the outermost
                hundredth of its values), so that the eye sees its shapes; others stay as they are
    """
    images = images.detach().cpu().float()
    if std is not None:
        images = images * torch.tensor(std).view(-1, 1, 1)
    if mean is not None:
        images = images + torch.tensor(mean).view(-1, 1, 1)
    if fit:
        values = images.flatten(-3).sort(-1).values
        rim = values.shape[-1] // 100
        low, high = values[..., rim].clamp(max=0), values[..., -1 - rim].clamp(min=1)
        images = (images - low[..., None, None, None]) / (high - low)[..., None, None, None]
    return _to_bytes(images)


def png_bytes(image: Tensor) -> bytes:
    """The PNG file of one picture (3, H, W) uint8; ValueError for anything else."""
    from PIL import Image

    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"a picture is (3, H, W) uint8, not {tuple(image.shape)} {image.dtype}; see to_uint8")
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(file, format="PNG")
    return file.getvalue()


def _to_bytes(unit: Tensor) -> Tensor:
    # Casting nan to an integer is undefined; show it black.
    return (unit.nan_to_num(0.0).clamp(0, 1) * 255 + 0.5).to(torch.uint8)
