"""Where labelled images in memory come from: published sets of small ones, `.npz` files, and two sets without files.

Each function reads what a config names and returns a `Source`. Classes and labels are read at once, so that a mistake
is told before anything is trained. Photographs are in `data.photographs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.images import ImagesConfig, MemoryPixels, Pixels, Source, Stats, square
from data.npz import check_labels, read_arrays
from utils.errors import UserError
from utils.rng import generator

CIFAR_STATS: Stats = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_STATS: Stats = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)
SVHN_STATS: Stats = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
MNIST_STATS: Stats = (0.1307,), (0.3081,)
FASHION_STATS: Stats = (0.2861,), (0.3530,)


Arrays = tuple[Tensor, Tensor]  # images (N, C, H, W) uint8 and labels (N,) long


def memory_source(
    cfg: ImagesConfig, name: str, classes: Sequence[str], stats: Stats | None, read: Callable[[str], Arrays]
) -> Source:
    """A source of images in memory, made square and of side `--res`.

    read  "train" or "test" → images and labels, called once each; "train" at once
    """

    @cache
    def part(split: str) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = read(split)
        height, width = images.shape[2:]
        if height != width and not cfg.res:
            raise UserError(
                f"{name}: {split} images are {height} x {width} pixels, not square; give a side, --res {height}"
            )
        return square(images, cfg.res or height, cfg.fit), labels, images

    def pixels(split: str, rows: Tensor) -> Pixels:
        images, _, original = part(split)
        if images.shape[1:] != shape:
            raise UserError(f"{name}: test images are {tuple(images.shape[1:])}, training images {tuple(shape)}")
        oblong = original.shape[2] != original.shape[3]
        return MemoryPixels(images, rows, original, cfg.fit if oblong else "")

    shape = part("train")[0].shape[1:]
    return Source(name, tuple(classes), shape[0], shape[2], stats, lambda split: part(split)[1], pixels)


@dataclass(frozen=True)
class Fetched:
    """One of torchvision's sets: its class there, what it leaves in its folder, and its statistics."""

    name: str
    wanted: str
    stats: Stats
    by_word: bool = False  # SVHN says split="train" where the others say train=True


FETCHED = {
    "cifar10": Fetched("CIFAR10", "cifar-10-batches-py", CIFAR_STATS),
    "cifar100": Fetched("CIFAR100", "cifar-100-python", CIFAR100_STATS),
    "svhn": Fetched("SVHN", "train_32x32.mat and test_32x32.mat", SVHN_STATS, by_word=True),
    "mnist": Fetched("MNIST", "MNIST/raw", MNIST_STATS),
    "fashionmnist": Fetched("FashionMNIST", "FashionMNIST/raw", FASHION_STATS),
}


def fetched_source(cfg: ImagesConfig) -> Source:
    """CIFAR-10 and -100, SVHN, MNIST or Fashion-MNIST, as torchvision stores them; fetched only with `--download`."""
    kind = FETCHED[cfg.dataset.lower()]
    stats = CIFAR_STATS if kind.name == "CIFAR100" and cfg.norm == "mtt" else kind.stats
    sets = {"train": _fetch(cfg, kind, "train")}

    def read(split: str) -> Arrays:
        found = sets.pop(split, None) or _fetch(cfg, kind, split)
        images = torch.as_tensor(found.data)
        labels = torch.as_tensor(found.labels if kind.by_word else found.targets).long()
        if images.ndim == 3:
            return images[:, None], labels
        return (images if kind.by_word else images.permute(0, 3, 1, 2)).contiguous(), labels

    digits = kind.name in ("SVHN", "MNIST")
    classes = [str(digit) for digit in range(10)] if digits else sets["train"].classes
    return memory_source(cfg, kind.name, classes, stats, read)


def _fetch(cfg: ImagesConfig, kind: Fetched, split: str) -> Any:
    from torchvision import datasets

    root = data_folder(cfg, kind.name, kind.wanted, made=cfg.download)
    below = root / cfg.dataset.lower()  # where PoDD keeps it in a folder of all sets
    if not (root / kind.wanted).exists() and (below / kind.wanted).exists():
        root = below
    part = {"split": split} if kind.by_word else {"train": split == "train"}
    try:
        return getattr(datasets, kind.name)(str(root), download=cfg.download, **part)
    except (RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, say; no network has no number
            raise
        if cfg.download:
            raise UserError(
                f"{kind.name} could not be fetched into {root} ({error}); try again or copy it there"
            ) from None
        raise UserError(
            f"no whole {kind.name} in {root} (looked for {kind.wanted}); correct --data_path or give --download"
        ) from None


def npz_source(cfg: ImagesConfig) -> Source:
    """A `.npz` file: train_images (N, H, W, C) or (N, H, W) uint8, train_labels, the same two of test, and perhaps
    `classes`, the names of labels 0, 1 and so on."""
    path = Path(cfg.data_path)
    if not cfg.data_path:
        raise UserError("no file of images; give --data_path, a .npz file with train_images, train_labels and the like")
    if path.is_dir():
        raise UserError(f"--data_path {path} is a folder; name the .npz file in it")
    words = [f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels")]
    # At once: to name an array that lacks or does not fit before anything is trained.
    arrays = read_arrays(path, words, ("classes",))
    parts = {split: _npz_part(path, split, arrays) for split in ("train", "test")}
    highest = max(int(labels.max()) for _, labels in parts.values())
    if "classes" in arrays:
        classes = arrays["classes"]
        if classes.ndim != 1 or len(classes) <= highest:
            raise UserError(f"{path}: label {highest} has no name among the {classes.size} classes")
        names = [str(name) for name in classes]
    else:
        names = [str(label) for label in range(int(parts["train"][1].max()) + 1)]
        if highest >= len(names):
            raise UserError(
                f"{path}: test label {highest} is out of range; the training labels end at {len(names) - 1}"
            )
    return memory_source(cfg, "npz", names, None, parts.__getitem__)


def _npz_part(path: Path, split: str, arrays: dict[str, np.ndarray]) -> Arrays:
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    labels = check_labels(path, split, images, labels)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UserError(
            f"{path}: {split}_images are {images.shape}; they must be (N, H, W, 3), (N, H, W, 1) or (N, H, W)"
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def digits_source(cfg: ImagesConfig) -> Source:
    """scikit-learn's 1797 handwritten digits, 8 x 8 grey pixels; they come with the package and need no files.

    Its 17 tones are spread over 0 to 255. It has no split of its own: here a fifth of each digit's images, drawn once
    and for all, is the test set (359 images), and 1438 are left.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(np.rint(found.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(found.target).long()
    tested = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        rows = (labels == digit).nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=generator(0, "digits", digit))
        tested[rows[order[: round(len(rows) / 5)]]] = True

    def read(split: str) -> Arrays:
        chosen = tested if split == "test" else ~tested
        return images[chosen], labels[chosen]

    return memory_source(cfg, "digits", [str(digit) for digit in range(10)], None, read)


def toy_source(cfg: ImagesConfig) -> Source:
    """Drawn shapes; the shape is the class, while colour, size, place, angle and background tell nothing."""
    from data.toy import SHAPES, draw_shapes

    # A drawn image has any size: no resizing, so small ones are sharp.
    size = cfg.res or 32
    return memory_source(cfg, "toy", list(SHAPES), None, lambda split: draw_shapes(split, cfg.toy_images, size))


def data_folder(cfg: ImagesConfig, name: str, wanted: str, made: bool = False) -> Path:
    """The folder `--data_path`; UserError when there is none, unless it is `made` by a download."""
    root = Path(cfg.data_path)
    if not cfg.data_path:
        raise UserError(f"no folder of images; give --data_path, where {wanted} of {name} is (or try --dataset digits)")
    if not root.is_dir() and not made:
        raise UserError(f"no folder {root}; correct --data_path, where {wanted} of {name} is")
    return root
