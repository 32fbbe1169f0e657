"""What the teacher and the student see of an image: whole, or a random part of it; and many images at once.

Sizes are as published for 224 pixels, where the short side is first made 256, and scale with the size.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data.image_pools import BadImage, ImagePool

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RATIOS = (3 / 4, 4 / 3)  # width to height of a crop
_TRIES = 10  # to draw a crop that fits, before the middle is taken

Make = Callable[[Any, int], Tensor]


def training_view(image: Image, rng: torch.Generator, size: int, min_scale: float = 0.08) -> Tensor:
    """A random crop of an image, (3, size, size) uint8, mirrored half the time; all chance from `rng`.

    min_scale  least share of the area that a crop may have

    The short side becomes size · 256/224 (bicubic) before a crop of `min_scale` to all of the area, 3/4 to 4/3 as wide
    as high, is resized to the size (bilinear).
    """
    from PIL import Image

    image = _short_side(image, round(size * 256 / 224))
    left, top, width, height = random_crop(image.size, rng, min_scale)
    # Cropped before it is resized: the filter must not see beyond the edge.
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = _pixels(image)
    return pixels.flip(2) if torch.rand((), generator=rng) < 0.5 else pixels


def plain_view(image: Image, size: int, crop: bool = True) -> Tensor:
    """The middle of an image, (3, size, size) uint8: its short side made `size` (bicubic), the long one cut.

    crop  false squeezes all of it into the square instead
    """
    from PIL import Image

    if not crop:
        return _pixels(image.resize((size, size), Image.Resampling.BICUBIC))
    image = _short_side(image, size)
    left, top = (round((side - size) / 2) for side in image.size)
    return _pixels(image.crop((left, top, left + size, top + size)))


def normalised(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Images (B, 3, S, S) uint8 as float32, less the channel means and over the deviations, on their device."""
    shift, scale = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images.float() / 255 - shift) / scale


def random_crop(extent: tuple[int, int], rng: torch.Generator, min_scale: float) -> tuple[int, int, int, int]:
    """Left, top, width and height of a crop of an image (width, height), as torchvision's RandomResizedCrop draws it:
    area uniform, logarithm of the shape uniform, ten tries, then the largest middle part of an allowed shape."""
    whole_width, whole_height = extent
    low, high = (math.log(ratio) for ratio in RATIOS)
    for share, shape in torch.rand(_TRIES, 2, generator=rng, dtype=torch.float64).tolist():
        area = whole_width * whole_height * (min_scale + (1 - min_scale) * share)
        ratio = math.exp(low + (high - low) * shape)
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= whole_width and 0 < height <= whole_height:
            left = int(torch.randint(whole_width - width + 1, (), generator=rng))
            top = int(torch.randint(whole_height - height + 1, (), generator=rng))
            return left, top, width, height
    width = min(whole_width, round(whole_height * RATIOS[1]))
    height = min(whole_height, round(whole_width / RATIOS[0]))
    return (whole_width - width) // 2, (whole_height - height) // 2, width, height


class Reader:
    """Views of a pool's images, by threads.

    workers  threads; 0 is one a core
    bad      row → why its image could not be decoded, of all that were asked for so far
    """

    def __init__(self, pool: ImagePool, workers: int = 0) -> None:
        self.pool, self.workers = pool, workers or os.cpu_count() or 1
        self.bad: dict[int, str] = {}
        self._threads = ThreadPoolExecutor(self.workers)

    def batch(self, rows: Tensor | Sequence[int], make: Make) -> tuple[Tensor, Tensor]:
        """What `make(image, row)` makes of these rows, (n, ...), and which of them are there, (B,) bool.

        An image that cannot be decoded is left out and noted in `bad`; where none can be, the first tensor is empty.
        """
        return self._gather(self._begin(rows, make))

    def stream(
        self, jobs: Iterable[tuple[Tensor | Sequence[int], Make]], ahead: int = 2
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`batch` of each job in order, `ahead` of them begun before they are asked for."""
        waiting: deque[list[Future]] = deque()
        for rows, make in jobs:
            waiting.append(self._begin(rows, make))
            if len(waiting) > ahead:
                yield self._gather(waiting.popleft())
        while waiting:
            yield self._gather(waiting.popleft())

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _begin(self, rows: Tensor | Sequence[int], make: Make) -> list[Future]:
        rows = rows.tolist() if isinstance(rows, Tensor) else rows
        return [self._threads.submit(self._one, row, make) for row in rows]

    def _one(self, row: int, make: Make) -> Tensor | None:
        try:
            return make(self.pool.image(row), row)
        except BadImage as error:
            self.bad[row] = f"{self.pool.where(row)} ({error.reason})"
            return None

    def _gather(self, futures: list[Future]) -> tuple[Tensor, Tensor]:
        made = [future.result() for future in futures]
        there = [view for view in made if view is not None]
        ok = torch.tensor([view is not None for view in made], dtype=torch.bool)
        return torch.stack(there) if there else torch.empty(0, dtype=torch.uint8), ok


def _short_side(image: Image, size: int) -> Image:
    """An image whose short side is `size`, the long one in proportion, rounded down as torchvision's Resize does."""
    from PIL import Image

    short = min(image.size)
    target = tuple(size if side == short else size * side // short for side in image.size)
    return image if image.size == target else image.resize(target, Image.Resampling.BICUBIC)


def _pixels(image: Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
