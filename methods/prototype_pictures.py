"""Prototypes as pictures: what was drawn of each, beside the real images and the words that it came from."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import atomic
from utils.pictures import open_image

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

FURTHER = 6  # members of a cluster beside the one nearest to its mean
SHARED = 4  # drawn images that share the first tile where a prototype has several
LARGE, SMALL = 256, 128  # sides of the large tiles in pixels, about; SMALL where a class has more than MANY prototypes
MANY = 20
SCREEN = 10  # rows of a grid, and images in one
_CAPTION, _NAMES = 480, 220  # pixels of width, the latter at most
_MARGIN, _GAP = 28, 16
_TITLE, _TEXT, _NOTE = 28, 16, 14  # sizes of letters in pixels
_INK, _SOFT, _RULE, _ACCENT, _GONE = (28, 29, 31), (112, 116, 124), (228, 228, 225), (47, 95, 208), (214, 214, 212)
_PACKED = 3  # of 9: photographs hardly shrink further, and it takes half the time of the usual 6
_HEADS = ("drawn", "nearest to the mean", "others of its cluster", "text prototype")


@dataclass(frozen=True)
class Shown:
    """A prototype to be shown.

    drawn    files of the images made of it; `members` of real ones of its cluster, the nearest to its mean first
    source   the member whose caption it has, if any of them
    words    frequent words, how often each was counted, and whether the caption has it
    note     what else is said of it, in a line
    """

    drawn: Sequence[Path]
    text: str
    members: Sequence[Path] = ()
    source: Path | None = None
    words: Sequence[tuple[str, int, bool]] = ()
    note: str = ""


@dataclass
class _Words:
    """Lines of a row's words, and how high they are."""

    caption: list[str]
    counts: list[list[tuple[str, bool]]] = field(default_factory=list)

    @property
    def height(self) -> int:
        return _line(_NOTE) + len(self.caption) * _line(_TEXT) + len(self.counts) * _line(_NOTE) + 6 * bool(self.counts)


def save_sheet(path: Path, title: str, subtitle: str, prototypes: Sequence[Shown]) -> None:
    """Write a class's prototypes as one PNG file, a row each, which notes where rows end; see `excerpt`."""
    from PIL import Image, ImageDraw

    side = _tile_side([file for one in prototypes for file in one.drawn], LARGE if len(prototypes) <= MANY else SMALL)
    grids = any(one.members for one in prototypes)
    lefts = _columns(side, grids)
    words = [_words(one, side) for one in prototypes]
    heights = [max(side, part.height) for part in words]
    head = _MARGIN + _line(_TITLE) + _line(_NOTE) + _GAP + _line(_NOTE) + 4
    ends = [head]
    for height in heights:
        ends.append(ends[-1] + height + _GAP)
    image = Image.new("RGB", (lefts[-1] + _CAPTION + _MARGIN, ends[-1] + _MARGIN - _GAP), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), _cut(title, _TITLE, image.width - 2 * _MARGIN), _INK, _font(_TITLE))
    draw.text((_MARGIN, _MARGIN + _line(_TITLE)), subtitle, _SOFT, _font(_NOTE))
    for left, name in zip(lefts, _HEADS if grids else (_HEADS[0], _HEADS[-1]), strict=True):
        draw.text((left, head - _line(_NOTE) - 6), name, _SOFT, _font(_NOTE))
    for number, (one, part, top) in enumerate(zip(prototypes, words, ends, strict=False)):
        if number:
            draw.line((_MARGIN, top - _GAP // 2, image.width - _MARGIN, top - _GAP // 2), _RULE)
        _paste_row(image, one, top, lefts, side)
        _write(draw, one, part, (lefts[-1], top - 3))
    _save(path, image, ends=[end - _GAP // 2 for end in ends[1:]])


def save_grid(path: Path, classes: Sequence[tuple[str, Sequence[Path]]]) -> None:
    """Write images of the first classes, as many as a screen has room for, as one PNG file, which notes their number.

    classes   name and files of each
    """
    from PIL import Image, ImageDraw

    side, most = (
        _tile_side([file for _, files in classes for file in files[:1]], SMALL),
        max(len(f) for _, f in classes),
    )
    pitch, across = side + 4, min(most, SCREEN)
    lines = -(-most // across)
    names = min(_NAMES, max(int(_font(_NOTE).getlength(name)) for name, _ in classes) + 1)
    block = names + _GAP + across * pitch + 2 * _GAP
    beside = min(len(classes), max(1, (_NAMES + SCREEN * pitch) // block))
    classes = classes[: beside * max(1, SCREEN // lines)]
    high = -(-len(classes) // beside) * lines
    image = Image.new("RGB", (beside * block, high * pitch + 2 * _GAP - 4), "white")
    draw = ImageDraw.Draw(image)
    for number, (name, files) in enumerate(classes):
        left, top = number % beside * block + _GAP, number // beside * lines * pitch + _GAP
        wrapped = _wrapped(name, _NOTE, names, side // _line(_NOTE))
        middle = top + (side - len(wrapped) * _line(_NOTE)) // 2
        for line, text in enumerate(wrapped):
            draw.text((left, middle + line * _line(_NOTE)), text, _INK, _font(_NOTE))
        for place, file in enumerate(files[:most]):
            corner = left + names + _GAP + place % across * pitch, top + place // across * pitch
            image.paste(_tile(file, side), corner)
    _save(path, image, classes=len(classes))


def noted(path: Path, name: str) -> Any:
    """What a picture written here notes under a name: `ends` of a sheet's rows, number of `classes` in a grid."""

    with open_image(path, times=2) as image:
        return json.loads(image.text[name])


def excerpt(path: Path, shape: float) -> tuple[bytes, int, int]:
    """A sheet's PNG file cut after as many rows as make it at most `shape` times as high as wide, one at least; how
    many these are, and of how many."""

    ends = noted(path, "ends")
    with open_image(path, times=2) as image:
        fitting = [end for end in ends if end <= shape * image.width] or ends[:1]
        if len(fitting) == len(ends):
            return path.read_bytes(), len(ends), len(ends)
        file = io.BytesIO()
        image.crop((0, 0, image.width, fitting[-1])).save(file, format="PNG", compress_level=_PACKED)
        return file.getvalue(), len(fitting), len(ends)


def _save(path: Path, image: Image.Image, **notes: Any) -> None:
    from PIL import PngImagePlugin

    texts = PngImagePlugin.PngInfo()
    for name, value in notes.items():
        texts.add_text(name, json.dumps(value))
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=texts, compress_level=_PACKED)


# --- tiles -----------------------------------------------------------------------------------------------------------


def _tile_side(files: Sequence[Path], goal: int) -> int:
    """The side of large tiles: images twice a whole number of times as large, so that half a tile does as well, but
    larger ones as they are, or shrunk to `goal`."""

    for file in files:
        try:
            with open_image(file) as image:
                own = max(image.size)
        except Exception:  # as in `_tile`
            continue
        return 2 * own * (goal // (2 * own)) or min(own, goal) // 2 * 2
    return goal


def _columns(side: int, grids: bool) -> list[int]:
    """Where the columns begin: one of drawn images, two of real ones if there are any, and the words."""
    widths = [side, side, FURTHER // 2 * (side // 2)] if grids else [side]
    lefts = [_MARGIN]
    for width in widths:
        lefts.append(lefts[-1] + width + _GAP)
    lefts[-1] += 8
    return lefts


def _paste_row(image: Image.Image, one: Shown, top: int, lefts: Sequence[int], side: int) -> None:
    """A prototype's pictures: the drawn ones; the first real one; the others, two rows of half the size."""
    framed = [file == one.source for file in one.members]
    if len(one.drawn) == 1:
        image.paste(_tile(one.drawn[0], side), (lefts[0], top))
    else:
        _paste_halves(image, one.drawn[:SHARED], [False] * SHARED, (lefts[0], top), side)
    if one.members:
        image.paste(_tile(one.members[0], side, framed[0]), (lefts[1], top))
        _paste_halves(image, one.members[1 : 1 + FURTHER], framed[1:], (lefts[2], top), side)


def _paste_halves(
    image: Image.Image, files: Sequence[Path], framed: Sequence[bool], corner: tuple[int, int], side: int
) -> None:
    """Files as tiles of half a side in two rows, with white lines of two pixels between, drawn over their rims."""
    from PIL import ImageDraw

    half, across, draw = side // 2, -(-len(files) // 2) if len(files) > SHARED else 2, ImageDraw.Draw(image)
    for place, (file, frame) in enumerate(zip(files, framed, strict=False)):
        left, top = corner[0] + place % across * half, corner[1] + place // across * half
        image.paste(_tile(file, half, frame), (left, top))
        for line in ((left - 1, top, 2, half), (left, top + half - 1, half, 2)):
            draw.rectangle((line[0], line[1], line[0] + line[2] - 1, line[1] + line[3] - 1), "white")


def _tile(path: Path, side: int, framed: bool = False) -> Image.Image:
    """The middle square of an image: small ones in blocks, larger ones shrunk; grey where it cannot be read."""
    from PIL import Image, ImageDraw

    tile = Image.new("RGB", (side, side), _GONE)
    try:
        with open_image(path) as image:
            image.draft("RGB", (2 * side, 2 * side))  # a photograph is decoded no larger than it is shown
            image = image.convert("RGB")
        own = min(image.size)
        left, top = (image.width - own) // 2, (image.height - own) // 2
        new = own * (side // own) or side
        how = Image.Resampling.NEAREST if own <= side else Image.Resampling.LANCZOS
        image = image.crop((left, top, left + own, top + own)).resize((new, new), how)
        tile.paste(image, ((side - new) // 2, (side - new) // 2))
    except Exception:  # whatever a library makes of a broken file: a picture that is missing must not end a run
        ImageDraw.Draw(tile).text((side / 2, side / 2), "no image", _SOFT, _font(_NOTE), anchor="mm")
    # Without a rim, a white image is no square on white paper.
    ImageDraw.Draw(tile).rectangle(
        (0, 0, side - 1, side - 1), outline=_ACCENT if framed else _RULE, width=5 if framed else 1
    )
    return tile


# --- words -----------------------------------------------------------------------------------------------------------


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _line(size: int) -> int:
    """From one line of text to the next."""
    return size * 4 // 3


def _words(one: Shown, side: int) -> _Words:
    """A prototype's words as lines: its caption, as much of it as there is room for, and two lines of counts."""
    counts = _flowed([(f"{word} {count}", told) for word, count, told in one.words], 2)
    room = max(side, 11 * _line(_TEXT)) - _Words([], counts).height
    return _Words(_wrapped(one.text, _TEXT, _CAPTION, max(2, room // _line(_TEXT))), counts)


def _write(draw: ImageDraw.ImageDraw, one: Shown, words: _Words, corner: tuple[int, int]) -> None:
    left, top = corner
    for line in words.caption:
        draw.text((left, top), line, _INK, _font(_TEXT))
        top += _line(_TEXT)
    top += 6 if words.counts else 0
    for line in words.counts:
        place = left
        for text, told in line:
            draw.text((place, top), text, _ACCENT if told else _SOFT, _font(_NOTE))
            place += _font(_NOTE).getlength(text) + _NOTE
        top += _line(_NOTE)
    draw.text((left, top), _cut(one.note, _NOTE, _CAPTION), _SOFT, _font(_NOTE))


def _flowed(parts: Sequence[tuple[str, bool]], most: int) -> list[list[tuple[str, bool]]]:
    """Parts side by side, in at most so many lines as wide as captions; those beyond are left out."""
    lines, used = [], _CAPTION
    for text, told in parts:
        width = int(_font(_NOTE).getlength(text)) + _NOTE
        if used + width > _CAPTION + _NOTE:
            if len(lines) == most:
                break
            lines.append([])
            used = 0
        lines[-1].append((_cut(text, _NOTE, _CAPTION), told))
        used += width
    return lines


def _wrapped(text: str, size: int, width: int, most: int) -> list[str]:
    """A text in at most so many lines of a width, broken between words; an ellipsis ends it where it is cut."""
    lines, fits = [""], _fits(size, width)
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if fits(longer):
            lines[-1] = longer
        elif len(lines) == most:
            lines[-1] = _cut(f"{lines[-1]} …", size, width)
            break
        elif lines[-1]:
            lines.append(_cut(word, size, width))
        else:
            lines[-1] = _cut(word, size, width)
    return lines


def _cut(text: str, size: int, width: int) -> str:
    """A line of text, shortened to a width by an ellipsis."""
    fits, short = _fits(size, width), text
    while len(short) > 1 and not fits(short):
        short = short.removesuffix("…").rstrip()[:-1] + "…"
    return short


def _fits(size: int, width: int) -> Callable[[str], bool]:
    return lambda text: _font(size).getlength(text) <= width
