"""Labelled images: pixels, labels, the hold-out, and what is done to pixels before a network sees them.

A source (see `data.sources`) says where images are; here they become three splits. `val` is a share of the training
images, the same of each class and always the same ones, so preparing, distilling and judging agree on it without being
told. What comes out is normalised by channel statistics or whitened (`data.zca`), float32, on the device. Pixels are
kept there where they fit, and otherwise travel a batch at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from data.zca import EPS, KINDS, ZCA, fit_unit_zca, fit_zca
from utils.config import option
from utils.devices import moved
from utils.errors import UserError
from utils.files import digest
from utils.pictures import to_uint8
from utils.ranks import neighbours
from utils.rng import generator

SPLITS = ("train", "val", "test")
MOST_WHITENED = 16384  # values an image: beyond, the matrix has gigabytes and its making takes hours
SHARE = 0.25  # of the memory that is free on a device, for the images of one split
FEW = 20  # up to 1/20 of a split is prepared as asked, before all of it is put on the device
_ROWS = 2048  # images prepared at once

Stats = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class ImagesConfig:
    """Labelled images: which, where they are, and how they are prepared."""

    dataset: str = option(
        "CIFAR10",
        "CIFAR10, CIFAR100, SVHN, MNIST, FashionMNIST, Tiny, CUB200, ImageNet, folder (train/<class> and val or test), "
        "npz, digits or toy; the last two need no files",
    )
    subset: str = option("imagenette", "classes of ImageNet: a subset's name, one of --subsets, or all")
    subsets: str = option("", "YAML file of your own subsets, each `name: [class ids from 0 to 999]`")
    data_path: str = option("", "folder of the data set; for npz the file", aliases=("root",), free=True)
    download: bool = option(False, "fetch CIFAR, SVHN and MNIST sets into --data_path if they are not there", free=True)
    res: int = option(
        0, "side of the images in pixels; 0 is the set's own (128 for ImageNet and folder, 32 for CUB200)", low=0
    )
    fit: str = option(
        "squash",
        "how photographs become square: squash ignores their shape, as published; crop takes the middle",
        choices=("squash", "crop"),
    )
    norm: str = option(
        "data",
        "channel statistics: the set's own, or mtt, where CIFAR-100 has CIFAR-10's, as in MTT's released code",
        choices=("data", "mtt"),
    )
    zca: bool = option(False, "whiten the images (ZCA) instead of normalising their channels")
    zca_kind: str = option(
        "mtt",
        "how images are whitened: mtt about the mean image, podd each first centred and scaled to length 1 by itself",
        choices=KINDS,
    )
    holdout: float = option(0.1, "share of each class's training images held out as val; 0 is none", low=0)
    train_limit: int = option(0, "use only so many training images of each class, for a quick trial; 0 is all", low=0)
    toy_images: int = option(600, "training images of the toy set, the hold-out among them", low=10)
    cache_dir: str = option("cache", "folder for decoded images and whitening", free=True)
    workers: int = option(0, "threads that decode images; 0: the cores, shared by processes", low=0, free=True)

    def check(self) -> None:
        if self.holdout >= 1:
            raise UserError(f"--holdout is {self.holdout}; it is a share of the training images, such as 0.1")

    def idle(self) -> dict[str, str]:
        name = self.dataset.lower()
        found = {} if name == "imagenet" else dict.fromkeys(("subset", "subsets"), "--dataset ImageNet")
        found |= {} if name == "toy" else {"toy_images": "--dataset toy"}
        found |= {} if self.zca else {"zca_kind": "--zca"}
        return found | ({} if name == "cifar100" and not self.zca else {"norm": "--dataset CIFAR100 (not whitened)"})

    @property
    def threads(self) -> int:
        """`workers`, counted."""
        return self.workers or max((os.cpu_count() or 1) // neighbours(), 1)


class Pixels(Protocol):
    """The images of one split, uint8 on the CPU."""

    def batch(self, indices: Tensor) -> Tensor:
        """Some of them, (B, C, H, W); indices (B,) long."""

    def whole(self) -> Tensor:
        """All of them, (N, C, H, W)."""

    def content(self) -> str:
        """A digest of them: equal images have an equal one, wherever they are."""


@dataclass(frozen=True)
class Source:
    """A data set before it is split and prepared.

    name      as published, such as CIFAR100
    classes   their names; label k is the k-th
    channels  1 or 3
    size      side of its square images, in pixels
    stats     channel means and deviations of pixels in [0, 1]; None: those of the training images
    labels    "train" or "test" → (N,) long
    pixels    "train" or "test" and rows of it, (n,) long → their images
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    size: int
    stats: Stats | None
    labels: Callable[[str], Tensor]
    pixels: Callable[[str, Tensor], Pixels]


class MemoryPixels:
    """Rows (n,) long of images (N, C, H, W) uint8 in memory.

    original  the images before they were resized, which may round differently elsewhere; how: in which way they were
    """

    def __init__(self, images: Tensor, rows: Tensor, original: Tensor, how: str) -> None:
        self.images, self.rows, self.original, self.how = images, rows, original, how

    def batch(self, indices: Tensor) -> Tensor:
        return self.images[self.rows[indices]]

    def whole(self) -> Tensor:
        return self.images[self.rows]

    def content(self) -> str:
        return digest(self.original[self.rows], list(self.images.shape[1:]), self.how)


def square(images: Tensor, size: int, fit: str) -> Tensor:
    """Images (N, C, H, W) uint8 as (N, C, size, size), by an antialiased bicubic filter.

    fit  squash resizes the whole image, crop the largest square in its middle
    """
    height, width = images.shape[2:]
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        images = images[:, :, top : top + side, left : left + side]
    if images.shape[2:] == (size, size):
        return images
    resized = images.new_empty(*images.shape[:2], size, size)
    for start in range(0, len(images), _ROWS):
        part = images[start : start + _ROWS].contiguous()
        resized[start : start + _ROWS] = F.interpolate(part, (size, size), mode="bicubic", antialias=True)
    return resized


class ImageSplit:
    """The images of one split and their labels.

    labels    (N,) long, on the device
    shape     C, H, W of an image
    prepare   (B, C, H, W) uint8 on the device → float32, as networks see them
    whitened  whether preparing is so dear that prepared images are kept
    """

    def __init__(
        self,
        labels: Tensor,
        pixels: Pixels,
        shape: tuple[int, int, int],
        prepare: Callable[[Tensor], Tensor],
        whitened: bool,
        device: torch.device | str,
    ) -> None:
        self.labels, self.pixels = labels.to(device), pixels
        self._labels, self._shape, self._prepare, self._whitened = labels, shape, prepare, whitened
        self._device = torch.device(device)
        self._asked = 0  # images so far; below none where they do not fit
        self._held: Tensor | None = None

    def __len__(self) -> int:
        return len(self._labels)

    def indices_of(self, label: int) -> Tensor:
        """The images of class `label`, (n,) long on the CPU, in order."""
        return (self._labels == label).nonzero()[:, 0]

    def images(self, indices: Tensor) -> Tensor:
        """Images (B, C, H, W) float32 on the device, normalised or whitened.

        indices  (B,) long on any device, repeats allowed
        """
        self._asked += len(indices)
        if self._held is None and self._asked * FEW > len(self):
            self._hold()
        if self._held is None:
            return self._prepare(moved(self.pixels.batch(indices.cpu()), self._device))
        images = self._held[moved(indices, self._device)]
        return images if self._held.is_floating_point() else self._prepare(images)

    def _hold(self) -> None:
        """Keep the images on the device, whitened or as they are, if they fit."""
        size, free = math.prod(self._shape) * len(self), self._free()
        if self._whitened and 4 * size <= free:
            whole = self.pixels.whole()
            self._held = torch.empty(whole.shape, device=self._device)
            for start in range(0, len(whole), _ROWS):
                part = whole[start : start + _ROWS].to(self._device)
                self._held[start : start + _ROWS] = self._prepare(part)
        elif self._device.type != "cpu" and size <= free:
            self._held = self.pixels.whole().to(self._device)
        else:
            self._asked = -(1 << 62)

    def _free(self) -> float:
        if self._device.type == "cuda":
            return SHARE * torch.cuda.mem_get_info(self._device)[0]
        return SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / neighbours()


class ImageData:
    """A labelled data set; each split is read when it is first asked for.

    name      as published, such as CIFAR100
    classes   the classes' names, label k the k-th
    channels  1 or 3
    size      side of the square images, in pixels
    device    where images and labels are delivered

    zca   a transformation to use (one that was saved with a result); None with `cfg.zca` fits one
    """

    def __init__(self, source: Source, cfg: ImagesConfig, device: torch.device | str, zca: ZCA | None = None) -> None:
        self.name, self.classes, self.channels, self.size = source.name, source.classes, source.channels, source.size
        self.device = torch.device(device)
        self._source, self._cfg, self._splits = source, cfg, {}
        width = self.channels * self.size**2
        if cfg.zca and width > MOST_WHITENED:
            raise UserError(
                f"--zca of {width} values an image ({self.channels} x {self.size} x {self.size}) needs a matrix of "
                f"{4 * width**2 / 1e9:.1f} GB and several times that to make it; leave out --zca or lower --res"
            )
        if zca is not None:
            if len(zca.mean) != width:
                raise UserError(f"a whitening of {len(zca.mean)} values does not fit images of {width}; correct --res")
            self.zca = zca.to(self.device)

    def __getitem__(self, split: str) -> ImageSplit:
        """The split train, val or test; UserError for val where nothing is held out."""
        if split not in self._splits:
            self._splits[split] = self._split(split)
        return self._splits[split]

    def decode(self, *splits: str) -> None:
        """Have all images of these splits at hand; image files are decoded once, into a cache."""
        for split in splits:
            self[split].pixels.whole()

    @property
    def mean(self) -> tuple[float, ...]:
        """Channel means by which images are normalised; zeros where they are whitened."""
        return self._stats[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Channel deviations by which images are normalised; ones where they are whitened."""
        return self._stats[1]

    @cached_property
    def zca(self) -> ZCA | None:
        """The whitening, fitted to the training images once and then found in the cache; None without `--zca`."""
        if not self._cfg.zca:
            return None
        pixels = self["train"].pixels
        name = digest(pixels.content(), EPS, *self._other_kind)
        path = Path(self._cfg.cache_dir) / "zca" / f"{name[:32]}.safetensors"
        try:
            return ZCA.load(path).to(self.device)
        except UserError:  # none, or one that a full disk cut off
            fit = fit_unit_zca if self._other_kind else fit_zca
            zca = fit(pixels.whole().to("cpu" if self.device.type == "mps" else self.device))  # mps has no float64
            zca.save(path)
            # As a resumed run will find it, whose inverse is worked out of the saved matrix, to the last bit.
            return ZCA.from_state(zca.state()).to(self.device)

    def fingerprint(self) -> str:
        """A digest of what is trained on: the training images without those held out, their labels, and their
        preparation. Equal for equal data anywhere; a whitening has a digest of its own."""
        train = self["train"]
        preparation = ["zca", EPS, *self._other_kind] if self._whitened else [self.mean, self.std]
        return digest(train.pixels.content(), train.labels, list(self.classes), self.size, preparation)

    def pictures(self, images: Tensor, fit: bool = False) -> Tensor:
        """Pictures (..., 3, H, W) uint8 on the CPU of prepared or learned images (..., C, H, W); `fit` as `to_uint8`
        has it."""
        images = images.detach()
        if self.zca is not None:
            images = self.zca.visible(images.to(self.device))
        pictures = to_uint8(images, self.mean, self.std, fit)
        return pictures.expand(*pictures.shape[:-3], 3, *pictures.shape[-2:])

    @property
    def _whitened(self) -> bool:
        return self._cfg.zca or self.__dict__.get("zca") is not None

    @property
    def _other_kind(self) -> list[str]:
        """The kind of whitening where it is not the one that was there first, which names of old files leave out."""
        given = self.__dict__.get("zca")
        kind = given.kind if given is not None else self._cfg.zca_kind
        return [] if kind == "mtt" else [kind]

    @cached_property
    def _stats(self) -> Stats:
        if self._whitened:
            return (0.0,) * self.channels, (1.0,) * self.channels
        return self._source.stats or channel_stats(self["train"].pixels.whole())

    def _split(self, split: str) -> ImageSplit:
        if split not in SPLITS:
            raise UserError(f"unknown split '{split}'; known: {', '.join(SPLITS)}")
        part = "test" if split == "test" else "train"
        labels = self._source.labels(part)
        rows = torch.arange(len(labels))
        if split != "test":
            rows = self._rows(labels, split)
        pixels = self._source.pixels(part, rows)
        shape = self.channels, self.size, self.size
        return ImageSplit(labels[rows], pixels, shape, self._prepare, self._whitened, self.device)

    def _rows(self, labels: Tensor, split: str) -> Tensor:
        """The training images that are in `split`, (n,) long, in order."""
        share, limit = self._cfg.holdout, self._cfg.train_limit
        found = []
        for label, name in enumerate(self.classes):
            rows = (labels == label).nonzero()[:, 0]
            if not len(rows):
                raise UserError(f"{self.name}: class '{name}' has no training images")
            # Fixed: not the run's chance, so that buffers, results and judgements hold out the same images.
            order = torch.randperm(len(rows), generator=generator(0, "holdout", label))
            held = min(max(1, int(share * len(rows) + 0.5)), len(rows) - 1) if share else 0
            kept = order[held:].sort().values
            found.append(rows[order[:held]] if split == "val" else rows[kept[:limit] if limit else kept])
        rows = torch.cat(found).sort().values
        if not len(rows):
            reason = "--holdout is 0; give a share such as 0.1" if not share else "no class has more than one image"
            raise UserError(f"{self.name} has no validation images: {reason}")
        return rows

    def _prepare(self, images: Tensor) -> Tensor:
        images = images.to(torch.float32, memory_format=torch.contiguous_format)
        if self.zca is not None:
            return self.zca.whiten(images.div_(255))
        factor, offset = self._affine
        return images.mul_(factor).sub_(offset)

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, device=self.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return 1 / (255 * std), mean / std


def channel_stats(images: Tensor) -> Stats:
    """Mean and deviation of each channel of (N, C, H, W) uint8 images, as shares of 255, to six decimals.

    The last bits of a sum are not the same on all machines; these figures are.
    """
    tones = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        share = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        share /= share.sum()
        mean = share @ tones
        means.append(round(float(mean), 6))
        # A channel of one tone would be divided by zero; one tone apart is as close as pixels come.
        deviations.append(round(max(float((share @ (tones - mean) ** 2).sqrt()), 1 / 255), 6))
    return tuple(means), tuple(deviations)
