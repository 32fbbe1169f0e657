"""Labelled photographs as the protocols of real-sized images want them: squares, or their own shapes to crop from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.cache import ImageFiles, PackedImages
from utils.errors import UserError
from utils.files import digest

RESIDENT = 1 << 30  # bytes of squares that are kept on the device; more come from the cache, batch by batch


class Photos:
    """N photographs and their classes; each is decoded once, into a memory-mapped cache.

    files      paths in order; UserError when one is missing or cannot be decoded
    labels     (N,) long
    cache_dir  where caches are kept, in a folder `photographs`
    workers    threads that decode
    what       what they are, for progress bars and errors
    """

    def __init__(self, files: Sequence[Path], labels: Tensor, cache_dir: Path | str, workers: int, what: str) -> None:
        if not len(files) or len(files) != len(labels):
            raise UserError(f"there are no {what} images" if not len(files) else f"{what} images lack labels")
        self.files, self.labels, self.what = [Path(file) for file in files], labels, what
        self._folder, self._workers = Path(cache_dir) / "photographs", max(1, workers)
        self._open: dict[tuple[str, int], ImageFiles] = {}

    def __len__(self) -> int:
        return len(self.files)

    def squares(self, size: int, resize: int = 0) -> Tensor:
        """(N, 3, size, size) uint8, memory-mapped: the short side resized to `resize` (bilinear), then the middle.

        resize   0 for `size`; at least that, as in Resize(256), CenterCrop(224)
        """
        resize = max(size, resize)
        whole = self._files("centred", resize).whole()
        first = round((resize - size) / 2)
        return whole[:, :, first : first + size, first : first + size]

    def natives(self, side: int) -> PackedImages:
        """Each in its own shape, `natives[i]` (H, W, 3) uint8; where the short side is over √2 · `side`, shrunk to
        that."""
        return self._files("ragged", side).packed_as("ragged")

    def content(self) -> str:
        """A digest of all files' bytes in order, and of their classes."""
        return digest(self._files("centred", 1).content(), self.labels)

    def _files(self, layout: str, size: int) -> ImageFiles:
        key = layout, size
        if key not in self._open:
            source = Path(os.path.commonpath([file.parent for file in self.files]))
            self._open[key] = ImageFiles(
                self.files, size, self._folder, self._workers, self.what, source, layout, "the folder of images"
            )
        return self._open[key]


class Resident:
    """Images of one shape (N, 3, H, W) uint8 on a device: all of them there at once if they are few, else as asked."""

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self._images = images.to(device).contiguous() if images.numel() <= RESIDENT else images
        self.device = device

    def __len__(self) -> int:
        return len(self._images)

    def images(self, rows: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1] on the device."""
        return self._images[rows.to(self._images.device)].to(self.device).float() / 255


class Batches(Resident):
    """Squares on a device, with their labels (N,) long."""

    def __init__(self, squares: Tensor, labels: Tensor, device: torch.device) -> None:
        super().__init__(squares, device)
        self.labels = labels.to(device)


class ShapedBatches:
    """Images in their own shapes, on a device.

    sizes  (N, 2) long: heights and widths
    """

    def __init__(self, natives: PackedImages, device: torch.device) -> None:
        self._natives, self.device, self.sizes = natives, device, natives.table[:, 1:]
        alike = bool((self.sizes == self.sizes[0]).all())
        self._alike = Resident(natives.whole().permute(0, 3, 1, 2), device) if alike else None

    def images(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch in groups of one shape: places in `rows` (G,), images (G, 3, H, W) float in [0, 1]."""
        if self._alike is not None:
            yield torch.arange(len(rows)), self._alike.images(rows)
            return
        shapes: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows.tolist()):
            shapes.setdefault(tuple(self.sizes[row].tolist()), []).append(place)
        for places in shapes.values():
            group = torch.stack([self._natives[int(rows[place])] for place in places])
            yield torch.tensor(places), group.to(self.device).permute(0, 3, 1, 2).float() / 255
