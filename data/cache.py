"""Image files decoded once, into one memory-mapped file of 8-bit pixels.

Five layouts. `squashed`: every image resized to (s, s) without keeping its shape, which is the test transform exactly;
`bilinear`: the same by a bilinear filter, where the others have a bicubic one.
`cropped`: the largest square in an image's middle, resized to (s, s), so that shapes are kept.
`centred`: nearly the same, to the pixel what torchvision's Resize(s) and CenterCrop(s) make of an image (bilinear).
`ragged`: shape kept, short side at most s·√2, so that a crop of half the area still has s² pixels; for random crops.

A cache is named after the content of its images, so it is found again wherever the files are moved to, and never used
for others. Reading 30,000 files to learn that nothing changed would be slow, so a small pointer file, named after the
files' paths, sizes and times, leads to the content's name; git's index works alike. Files are written aside and
renamed: a killed run leaves no half cache and two runs may build the same one at once.

Each image has a CRC-32, looked at when a process first reads that image: a start need not go through many gigabytes,
and at 1.3 GB/s on one core it costs a tenth of what copying the image out of the map does. What no longer is what was
written is refused; where that shows at the opening, in the table, the cache is made anew.
"""

from __future__ import annotations

import itertools
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import augment
from utils.devices import moved
from utils.errors import UserError
from utils.files import atomic, check_readable, digest, file_digest, write_text
from utils.pictures import FORMATS, TooManyPixels, check_sides, open_image
from utils.progress import progress
from utils.ranks import speaks

VERSION = 2  # of the pixels and of the file format; 1 had no checksums
_ROW = 32  # bytes of one row of the table: offset, height, width, CRC-32, int64 each
_END = 8  # bytes behind the table: its own CRC-32
_SIDE = 1 << 20  # pixels; no image is that long


class PackedImages:
    """N images of one or many sizes in a memory-mapped file: pixels (H, W, 3) end to end, then the table.

    table  (N, 3) long: offset in bytes, height, width

    FileNotFoundError when there is no such file, ValueError when it is not a whole cache of `count` images; UserError
    when an image is read that is not what was written.
    """

    def __init__(self, path: Path, count: int) -> None:
        size, self.path = path.stat().st_size, path
        end = size - count * _ROW - _END  # of the pixels
        if end < 0:
            raise ValueError(f"{path} is too short for {count} images")
        check_readable(path)
        # Mapped privately: writing to a tensor that shares these bytes could never reach the file.
        self.bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        table, told = self.bytes[end:].clone().view(torch.int64).split([count * _ROW // 8, 1])
        if _checksum(table.view(torch.uint8)) != int(told):
            raise ValueError(f"{path} has a damaged table")
        self.table, self._sums = table.view(count, 4).split([3, 1], dim=1)
        self._sound = torch.zeros(count, dtype=torch.bool)
        offset, height, width = self.table.unbind(1)
        lengths = height * width * 3
        if not (self.table[:, 1:] < _SIDE).all() or not (self.table[:, 1:] > 0).all():
            raise ValueError(f"{path} has a damaged table")
        if not torch.equal(offset, lengths.cumsum(0) - lengths) or int(lengths.sum()) != end:
            raise ValueError(f"{path} is not as long as its table says")

    def __getitem__(self, index: int) -> Tensor:
        """One image, (H, W, 3) uint8, not copied."""
        offset, height, width = self.table[index].tolist()
        image = self.bytes[offset : offset + height * width * 3]
        if not self._sound[index]:
            if _checksum(image) != int(self._sums[index]):
                raise UserError(
                    f"image cache {self.path} is damaged (its image {index} is not what its checksum says); "
                    "remove it and give the command again: it is made anew"
                )
            self._sound[index] = True
        return image.view(height, width, 3)

    def batch(self, indices: Tensor) -> Tensor:
        """Images of one size, (B, H, W, 3) uint8."""
        for index in indices[~self._sound[indices]].tolist():
            self[index]
        return self._pixels().index_select(0, indices)

    def whole(self) -> Tensor:
        """All images, which must be of one size, (N, H, W, 3) uint8, not copied."""
        for index in range(len(self.table)):
            self[index]
        return self._pixels()

    def _pixels(self) -> Tensor:
        count, (_, height, width) = len(self.table), self.table[0].tolist()
        return self.bytes[: count * height * width * 3].view(count, height, width, 3)


def _checksum(content: Tensor) -> int:
    return zlib.crc32(content.numpy())


class ImageFiles:
    """Images on disk as a split wants them: whole, or cropped at random and augmented; caches are made on demand.

    files    paths in order; UserError when some are missing
    size     side s of what comes out, in pixels
    folder   where caches are kept
    workers  threads that decode and crop
    what     the name on a progress bar, such as 'train'
    source   the annotation file or folder that lists the images, for error messages
    layout   how whole images become square: squashed, bilinear, cropped or centred
    flag     the option that says where images are, for error messages
    """

    # A few images (the seeds of a distilled set) are not worth a cache of all: up to 1/20 is decoded as asked.
    FEW = 20

    def __init__(
        self,
        files: Sequence[Path],
        size: int,
        folder: Path,
        workers: int,
        what: str,
        source: Path,
        layout: str = "squashed",
        flag: str = "--image_root",
    ) -> None:
        self.files, self.size, self.folder, self.workers = list(files), size, folder, workers
        self.what, self.source, self.layout = what, source, layout
        self.stats = _stats(self.files, source, flag)
        self.pool = ThreadPoolExecutor(workers)
        self.packed: dict[str, PackedImages] = {}
        self.loose = 0

    def plain(self, indices: Tensor) -> Tensor:
        """(B, 3, s, s) uint8: each whole image, made square."""
        if self.layout not in self.packed and self.loose + len(indices) <= len(self.files) // self.FEW:
            self.loose += len(indices)
            return _batch(self._decoded([self.files[i] for i in indices.tolist()], self.layout))
        return self._open(self.layout).batch(indices).permute(0, 3, 1, 2)

    def whole(self) -> Tensor:
        """All images, (N, 3, s, s) uint8, each made square; memory-mapped, not copied."""
        return self._open(self.layout).whole().permute(0, 3, 1, 2)

    def passing(self, count: int) -> Iterator[Tensor]:
        """All images in order, (B, 3, s, s) uint8 with B up to `count`, each made square; decoded for this one use."""
        images = self._decoded(self.files, self.layout)
        for start in range(0, len(self.files), count):
            yield _batch(itertools.islice(images, min(count, len(self.files) - start)))

    def content(self, quiet: bool = False) -> str:
        """A digest of all files' bytes in order, wherever they are; remembered as long as they do not change.

        quiet   without a progress bar
        """
        names = [str(file.absolute()) for file in self.files]
        pointer = self.folder / f"files_{digest(names, self.stats)[:32]}.txt"
        try:
            content, _, told = pointer.read_text(encoding="utf-8").strip().partition(" ")
        except (FileNotFoundError, UnicodeDecodeError):
            content = told = ""
        if told != _pointed(content):
            what = "" if quiet else f"reading {self.what} images"
            content = digest(list(self._mapped(file_digest, self.files, what)))
            write_text(pointer, f"{content} {_pointed(content)}\n")
        return content

    def augmented(self, indices: Tensor, rng: torch.Generator, device: torch.device | str) -> Tensor:
        """(B, 3, s, s) uint8 on `device`: the train transform of `augment`, all its chance from `rng`."""
        images = self._open("ragged")
        boxes = augment.random_boxes(images.table[indices, 1:], rng)

        def crop(index: int, box: Tensor) -> Tensor:
            return augment.resized_crop(images[index], box, self.size)

        batch = moved(torch.stack(list(self.pool.map(crop, indices.tolist(), boxes))), device)
        batch = augment.random_flip(batch, rng)
        return augment.rand_augment(batch, *augment.draw_ops(len(batch), rng))

    def prepare(self) -> None:
        """Have at hand what `augmented` reads."""
        self._open("ragged")

    def check(self) -> None:
        """UserError, as `picture` has it, for an image that cannot be decoded."""

        def look(file: Path) -> None:
            with picture(file, self.source) as image:
                image.load()

        for _ in self._mapped(look, self.files, f"looking at {self.what} images"):
            pass

    def packed_as(self, layout: str) -> PackedImages:
        """All images in this layout, decoded now if they never were."""
        return self._open(layout)

    def _open(self, layout: str) -> PackedImages:
        if layout not in self.packed:
            self.packed[layout] = self._find(layout) or self._build(layout)
        return self.packed[layout]

    def _path(self, layout: str, version: int = VERSION) -> Path:
        return self.folder / f"{layout}_{self.size}_v{version}_{self.content()[:32]}.images"

    def _find(self, layout: str) -> PackedImages | None:
        try:
            return PackedImages(self._path(layout), len(self.files))
        except FileNotFoundError:
            old = self._path(layout, 1)
            why = f"{old} has no checksums; its images are decoded again, and it may be removed" if old.exists() else ""
        except ValueError as error:
            why = f"{error}; it is made anew"
        if why and speaks():
            print(f"note: image cache {why}")
        return None

    def _build(self, layout: str) -> PackedImages:
        path, table, offset = self._path(layout), [], 0
        with atomic(path) as temporary, open(temporary, "wb") as file:
            for image in self._decoded(self.files, layout, f"decoding {self.what} images"):
                table.append((offset, *image.shape[:2], zlib.crc32(image)))
                offset += image.nbytes
                file.write(image.data)
            rows = np.array(table, dtype=np.int64)
            file.write(rows.data)
            file.write(np.array(zlib.crc32(rows), dtype=np.int64).data)
        return PackedImages(path, len(self.files))

    def _decoded(self, files: Sequence[Path], layout: str, what: str = "") -> Iterator[np.ndarray]:
        yield from self._mapped(lambda file: decode(file, layout, self.size, self.source), files, what)

    def _mapped(self, function: Callable[[Path], Any], files: Sequence[Path], what: str) -> Iterator[Any]:
        # In blocks, so that a slow disk is not outrun by decoded images waiting in memory.
        block = 16 * self.workers
        with progress(total=len(files), what=what, disable=not what) as bar:
            for start in range(0, len(files), block):
                for result in self.pool.map(function, files[start : start + block]):
                    bar.update()
                    yield result


def decode(file: Path, layout: str, size: int, source: Path) -> np.ndarray:
    """The image in `file` as (H, W, 3) uint8, resized for `layout` by PIL's bicubic or bilinear filter.

    UserError as `picture` has it.
    """
    from PIL import Image

    with picture(file, source) as image:
        target = _shrunk(image.size, size) if layout == "ragged" else (size, size)
        if layout == "ragged":
            image.draft(None, target)  # JPEG can be decoded at 1/2, 1/4 or 1/8, if that is still large enough
        image = image.convert("RGB")
        if layout == "centred":
            return _centred(image, size)
        box = _square(image.size) if layout == "cropped" else None
        plain = image.size == target
        way = Image.Resampling.BILINEAR if layout == "bilinear" else Image.Resampling.BICUBIC
        return np.asarray(image if plain else image.resize(target, way, box))


@contextmanager
def picture(file: Path, source: Path) -> Iterator[Any]:
    """The PIL image in `file`, opened and not yet decoded; what is done to it belongs in the block.

    UserError naming `source` when it cannot be decoded there, or is so large (PIL's limit, 89 million pixels), or so
    much longer than wide, that it may be meant to harm.
    """
    from PIL import UnidentifiedImageError

    content = file.read_bytes()
    try:
        image = open_image(content)
        check_sides(image)
        yield image
    except TooManyPixels:
        raise UserError(f"image {file} has too many pixels; shrink it or drop it from {source}") from None
    except Exception as error:  # PIL raises a dozen kinds for damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"it is none of {', '.join(FORMATS)}" if unknown else str(error) or type(error).__name__
        raise UserError(f"image {file} cannot be decoded ({reason}); fetch it again or drop it from {source}") from None


def _pointed(content: str) -> str:
    """What tells that a pointer's 64 digits are those that were written."""
    return digest(content)[:16]


def _batch(images: Iterable[np.ndarray]) -> Tensor:
    """(B, 3, H, W) uint8 of images (H, W, 3)."""
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)


def _shrunk(extent: tuple[int, int], size: int) -> tuple[int, int]:
    short = min(extent)
    target = min(short, math.ceil(size * math.sqrt(2)))
    width, height = (max(1, round(side * target / short)) for side in extent)
    return width, height


def _centred(image: Any, size: int) -> np.ndarray:
    from PIL import Image

    short = min(image.size)
    target = tuple(size if side == short else size * side // short for side in image.size)
    if image.size != target:
        image = image.resize(target, Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in target)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _square(extent: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest square in the middle: left, top, right, bottom."""
    width, height = extent
    side = min(extent)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _stats(files: Iterable[Path], source: Path, flag: str) -> list[tuple[int, ...]]:
    """Size and times of every file. A changed file has another, even where its old time was put back (`cp -p`)."""
    found, missing = [], []
    for file in files:
        try:
            info = os.stat(file)
        except (FileNotFoundError, NotADirectoryError):
            info = None
        if info is None or not stat.S_ISREG(info.st_mode):
            missing.append(file)
        else:
            found.append((info.st_size, info.st_mtime_ns, info.st_ctime_ns))
    if missing:
        raise UserError(
            f"{len(missing)} of {len(missing) + len(found)} images named in {source} are missing, "
            f"the first is {missing[0]}; unpack the image archive again or correct {flag}"
        )
    return found
