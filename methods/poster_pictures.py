"""Posters as pictures: whitening undone, classes named, label maps in colour, and the frames of an animation."""

from __future__ import annotations

import colorsys
import functools
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.zca import ZCA
from methods.poster_layout import Grid, Layout
from utils.errors import UserError, first_line
from utils.files import atomic
from utils.pictures import open_image

if TYPE_CHECKING:
    from PIL import Image, ImageFont

LIMIT = 4.0  # standard deviations about the mean, beyond which a picture is cut
SIDE = 1060  # pixels, about: the longer side of small pictures, enlarged by a whole factor
NAMED = 120  # pixels, at least: between two class areas, for their names
WIDEST = 2600  # pixels, at most, for that
FRAME = 640, 200_000  # pixels, at most: the longer side, and all, of an enlarged frame of an animation
DETAIL = 100_000  # pixels of a poster that a frame keeps
FRAMES = 100  # at most; more would be of a size that no page should carry
COLOURS = 128  # of a frame; more would only describe noise
HELD = 3000  # milliseconds of each of the last frames, which name the classes
LEGIBLE = 50  # pixels between two class areas, below which these frames show a quarter of the poster each
_FONTS = (9, 26)  # smallest and largest, in pixels
_SCANT = 24  # pixels of width, in which no name says anything
_LIGHT, _DARK = (255, 255, 255), (16, 16, 16)

Scale = tuple[float, float]  # the values drawn black and white


def visible(poster: Tensor, patches: Grid, zca: ZCA | None, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A poster (C, H, W) as people know images: whitening undone patch by patch and blended, or normalisation undone.

    PoDD's whitening removes each image's mean and length, which stay lost: only relative brightness means something.
    """
    poster = poster.detach()
    if zca is not None:
        patches_of = zca.unwhiten(patches.cut(poster.to(zca.matrix.device)))
        return patches.blend(patches_of).cpu()
    poster = poster.cpu()
    return poster * poster.new_tensor(std).view(-1, 1, 1) + poster.new_tensor(mean).view(-1, 1, 1)


def scale_of(canvas: Tensor) -> Scale:
    """Least and greatest value of a canvas, of those within LIMIT standard deviations of its mean."""
    mean, reach = float(canvas.mean()), LIMIT * float(canvas.std(correction=0))
    return max(float(canvas.min()), mean - reach), min(float(canvas.max()), mean + reach)


def drawn(canvas: Tensor, scale: Scale | None = None) -> Tensor:
    """A canvas (C, H, W) as a picture (3, H, W) uint8; grey is three equal colours. Without a scale, by its own."""
    low, high = scale or scale_of(canvas)
    unit = ((canvas.cpu().float() - low) / max(high - low, 1e-12)).clamp(0, 1)
    return (unit * 255 + 0.5).to(torch.uint8).expand(3, -1, -1)


def enlarged(picture: Tensor, factor: int) -> Tensor:
    """A picture (3, H, W), each pixel a block."""
    return picture.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def save_poster(path: Path, canvas: Tensor) -> None:
    """Write a canvas (C, H, W) as a PNG file, enlarged where it is small; `read_poster` has the way back."""
    factor = max(1, round(SIDE / max(canvas.shape[1:])))
    low, high = scale_of(canvas)
    save_png(path, enlarged(drawn(canvas, (low, high)), factor), low=low, high=high, factor=factor)


def save_png(path: Path, picture: Tensor, **notes: float) -> None:
    """Write a picture (3, H, W) uint8, whole or not at all; notes are texts in the file."""
    from PIL import PngImagePlugin

    texts = PngImagePlugin.PngInfo()
    for name, value in notes.items():
        texts.add_text(name, repr(value))
    with atomic(path) as temporary:
        _image(picture).save(temporary, format="PNG", pnginfo=texts)


def read_poster(path: Path) -> tuple[Tensor, Scale]:
    """The picture (3, H, W) uint8 that `save_poster` wrote, as small as the poster, and its scale; UserError for one
    that is damaged."""
    try:
        with open_image(path, times=2) as image:
            notes, picture = image.text, torch.from_numpy(np.array(image.convert("RGB")))
        factor, scale = int(notes["factor"]), (float(notes["low"]), float(notes["high"]))
        return picture[::factor, ::factor].permute(2, 0, 1), scale
    except Exception as error:  # PIL raises a dozen kinds for damaged files
        raise UserError(
            f"picture {path} is damaged ({first_line(error)}); restore it, or remove it to go on without it"
        ) from None


def class_map(picture: Tensor, layout: Layout, classes: Sequence[str]) -> Tensor:
    """A poster's picture (3, H, W), enlarged until there is room for names, with each class's area and name."""
    pitch = _room(layout)[1]
    longest = max(picture.shape[1:])
    factor = max(1, min(max(-(-NAMED // pitch), round(SIDE / longest)), WIDEST // longest))
    return named(enlarged(picture, factor), layout, classes)


def named(picture: Tensor, layout: Layout, classes: Sequence[str]) -> Tensor:
    """A picture of a whole poster, of any size, with each class's area and name."""
    factors = [side / whole for side, whole in zip(picture.shape[1:], layout.areas.canvas, strict=True)]
    corners = layout.areas.boxes() * torch.tensor(factors * 2)
    room = tuple(side * factor for side, factor in zip(_room(layout), factors, strict=True))
    return _labelled(picture, corners, [[classes[owner]] for owner in layout.owners()], room)


def label_picture(label_map: Tensor, classes: Sequence[str]) -> Tensor:
    """A label map (K, h, w) as a picture: each cell has its top class's colour, name and share, paler where that is
    less; cells without any label are grey."""
    shares, tops = top_shares(label_map)
    colours = torch.tensor([_colour(label) for label in range(len(classes))])
    paint = 1 - shares[..., None] * (1 - colours[tops])
    paint[shares == 0] = 0.6
    height, width = shares.shape
    longest = max(height, width)
    side = max(1, SIDE // longest, min(NAMED, WIDEST // longest))
    picture = enlarged((paint * 255 + 0.5).to(torch.uint8).permute(2, 0, 1), side)
    cells = Grid((height * side, width * side), (side, side), (height, width))
    flat = zip(tops.T.flatten().tolist(), shares.T.flatten().tolist(), strict=True)
    texts = [[classes[label], f"{share:.0%}"] if share else ["no label"] for label, share in flat]
    return _labelled(picture, cells.boxes().float(), texts, (side, side), (_DARK, _LIGHT))


def top_shares(label_map: Tensor) -> tuple[Tensor, Tensor]:
    """Of each cell (h, w): the share of the class that has most, and which that is."""
    most, tops = label_map.detach().cpu().float().max(0)
    total = label_map.detach().cpu().float().sum(0)
    return most / torch.where(total > 0, total, torch.ones_like(total)), tops


def animation(paths: Sequence[Path], layout: Layout, classes: Sequence[str]) -> bytes:
    """A GIF of pictures that `save_poster` wrote, all drawn to one scale, and then of the last one with its classes:
    whole, or where there are many a quarter after another.

    Of more than FRAMES pictures it shows so many, evenly spread, the first and the last among them.
    """
    from PIL import Image

    chosen = torch.linspace(0, len(paths) - 1, min(len(paths), FRAMES)).round().long().tolist()
    pictures = [read_poster(paths[place]) for place in chosen]
    whole = min(low for _, (low, _) in pictures), max(high for _, (_, high) in pictures)
    frames = [_frame(picture, scale, whole) for picture, scale in pictures]
    durations = [max(60, min(400, 12_000 // len(frames)))] * len(frames)
    frames += _class_frames(frames[-1], layout, classes)
    durations += [HELD] * (len(frames) - len(durations))
    # A palette of each frame's own: one for all would show grey beginnings in bands.
    images = [_image(frame).quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for frame in frames]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return file.getvalue()


def _frame(picture: Tensor, scale: Scale, whole: Scale) -> Tensor:
    """A picture drawn to its own scale as a frame (3, h, w) of the scale that all share."""
    values = scale[0] + picture.float() / 255 * (scale[1] - scale[0])
    height, width = values.shape[1:]
    shrink = 1
    while -(-height // shrink) * -(-width // shrink) > DETAIL:
        shrink += 1
    values = F.avg_pool2d(values, shrink, ceil_mode=True)
    height, width = values.shape[1:]
    factor = min(FRAME[0] // max(height, width), math.isqrt(FRAME[1] // (height * width)))
    return enlarged(drawn(values, whole), max(1, factor))


def _class_frames(frame: Tensor, layout: Layout, classes: Sequence[str]) -> list[Tensor]:
    """Pictures of the size of a poster's frame (3, h, w) that name its classes."""
    height, width = frame.shape[1:]
    parts = 1 if _room(layout)[1] * width >= LEGIBLE * layout.areas.canvas[1] else 2
    whole = named(enlarged(frame, parts), layout, classes)
    return [part for row in whole.split(height, 1) for part in row.split(width, 2)]


def _room(layout: Layout) -> tuple[int, int]:
    """Height and width that each class's name has to itself: where areas overlap, less than an area."""
    starts = zip((layout.areas.tops, layout.areas.lefts), layout.areas.cell, strict=True)
    return tuple(min([side, *np.diff(lines).tolist()]) or 1 for lines, side in starts)


def _labelled(
    picture: Tensor,
    boxes: Tensor,
    texts: Sequence[Sequence[str]],
    room: tuple[float, float],
    colours: tuple[tuple[int, int, int], tuple[int, int, int]] = (_LIGHT, _DARK),
) -> Tensor:
    """A picture with boxes (N, 4) (top, left, bottom, right), and in each the lines of its text.

    room      height and width that each text may fill
    colours   of letters and of their rims
    """
    from PIL import ImageDraw

    image = _image(picture)
    draw = ImageDraw.Draw(image)
    corners = [(left, top, right - 1, bottom - 1) for top, left, bottom, right in boxes.tolist()]
    for box in corners:
        draw.rectangle(box, outline=_DARK, width=3)
    for left, top, right, bottom in corners:
        draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=_LIGHT)
    for (left, top, right, bottom), (text, size) in zip(
        corners, _fitted(texts, (room[0] - 6, room[1] - 8)), strict=True
    ):
        draw.multiline_text(
            ((left + right) / 2, (top + bottom) / 2),
            text,
            fill=colours[0],
            font=_font(size),
            anchor="mm",
            align="center",
            spacing=size // 5,
            stroke_width=max(1, size // 10),
            stroke_fill=colours[1],
        )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _fitted(texts: Sequence[Sequence[str]], room: tuple[float, float]) -> list[tuple[str, int]]:
    """Each text as it fits, wrapped, and its size: about the same for all, smaller where it is long; cut where the
    smallest is too large."""
    if room[1] < _SCANT:
        return [("", _FONTS[0])] * len(texts)
    own = [_largest(tuple(lines), room, _FONTS[1]) for lines in texts]
    usual = sorted(size for _, size in own)[len(own) // 4]
    return [_largest(tuple(lines), room, min(size, usual)) for lines, (_, size) in zip(texts, own, strict=True)]


@functools.lru_cache(1024)  # names come again and again
def _largest(lines: tuple[str, ...], room: tuple[float, float], most: int) -> tuple[str, int]:
    """A text and the largest size up to `most` at which it fits."""
    for size in range(most, _FONTS[0] - 1, -1):
        text = _wrapped(lines, size, room[1])
        if text is not None and _height(text, size) <= room[0]:
            return text, size
    return _cut(lines, _FONTS[0], room), _FONTS[0]


def _wrapped(lines: Sequence[str], size: int, width: float) -> str | None:
    """Lines broken between words, to this width; None where a word is too long."""
    font, found = _font(size), []
    for line in lines:
        row = ""
        for word in _words(line):
            if font.getlength(word) > width:
                return None
            longer = row + ("" if not row or row.endswith("-") else " ") + word
            if font.getlength(longer) > width:
                found.append(row)
                longer = word
            row = longer
        found.append(row)
    return "\n".join(found)


def _cut(lines: Sequence[str], size: int, room: tuple[float, float]) -> str:
    """What fits of a text: words shortened, and as many lines as there is height for."""
    font, words = _font(size), []
    for word in _words(" ".join(lines)):
        short = word
        while len(short) > 1 and font.getlength(short) > room[1]:
            short = short.removesuffix("…")[:-1] + "…"
        words.append(short)
    rows = (_wrapped([" ".join(words)], size, room[1]) or words[0]).split("\n")
    while len(rows) > 1 and _height("\n".join(rows), size) > room[0]:
        rows.pop()
    return "\n".join(rows)


def _words(text: str) -> list[str]:
    """Where a text may be broken: at spaces, underscores (which become such) and after hyphens."""
    return re.findall(r"[^\s_-]+-*|-+", text)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _height(text: str, size: int) -> float:
    return (text.count("\n") + 1) * (size + size // 5)


def _colour(label: int) -> tuple[float, float, float]:
    """A colour for a class; the golden ratio keeps those of neighbouring numbers far apart."""
    return colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.75, 0.85)


def _image(picture: Tensor) -> Image.Image:
    from PIL import Image

    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
