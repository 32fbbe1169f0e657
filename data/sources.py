"""Where labelled images come from: published sets, folders of photographs, `.npz` files, and two sets without files.

Each function reads what a config names and returns a `Source`. Classes and labels are read at once, so that a mistake
is told before anything is trained; photographs are decoded when they are first looked at, once, into a cache.
"""

from __future__ import annotations

import os
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
from data.subsets import IMAGENET, subset_classes, wordnet_names
from utils.errors import UserError
from utils.rng import generator

CIFAR_STATS: Stats = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_STATS: Stats = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)
SVHN_STATS: Stats = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
MNIST_STATS: Stats = (0.1307,), (0.3081,)
FASHION_STATS: Stats = (0.2861,), (0.3530,)
IMAGENET_STATS: Stats = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPH = 128  # side of ImageNet's and folders' images where --res does not say
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


# --- images in memory ---

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

    root = _root(cfg, kind.name, kind.wanted, made=cfg.download)
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


# --- folders of photographs ---


def files_source(
    cfg: ImagesConfig,
    name: str,
    classes: Sequence[str],
    side: int,
    listed: dict[str, list[tuple[Path, int]]],
    root: Path,
) -> Source:
    """A source of image files.

    side    of the images where `--res` does not say
    listed  "train" and "test" → each file and its label
    """
    size = cfg.res or side

    def pixels(split: str, rows: Tensor) -> Pixels:
        return FilePixels([listed[split][row][0] for row in rows.tolist()], size, cfg, split, root)

    def labels(split: str) -> Tensor:
        return torch.tensor([label for _, label in listed[split]])

    return Source(name, tuple(classes), 3, size, IMAGENET_STATS, labels, pixels)


class FilePixels:
    """Photographs, decoded when first asked for: a few as asked, else all of them once, into the cache."""

    def __init__(self, files: list[Path], size: int, cfg: ImagesConfig, what: str, root: Path) -> None:
        from data.cache import ImageFiles

        layout = {"squash": "squashed", "crop": "cropped"}[cfg.fit]
        folder = Path(cfg.cache_dir) / "images"
        self.files = ImageFiles(files, size, folder, cfg.threads, what, root, layout, "--data_path")

    def batch(self, indices: Tensor) -> Tensor:
        return self.files.plain(indices)

    def whole(self) -> Tensor:
        return self.files.whole()

    def content(self) -> str:
        return f"{self.files.layout} {self.files.size} {self.files.content()}"


def folder_source(cfg: ImagesConfig) -> Source:
    """A folder with `train/<class>/...` and `test/<class>/...`, or `val/<class>/...` where there is no test folder.

    Classes are in the order of their names. Images may be in folders below their class's.
    """
    root = _root(cfg, "data set", "train/<class>/...")
    tested = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if tested is None:
        raise UserError(f"no test images in {root}: it needs a folder test (or val) with a folder for each class")
    train, test = _folders(root / "train"), _folders(root / tested)
    classes = list(train)
    _same_classes(root / tested, classes, list(test))
    listed = {"train": _files(train), "test": _files(test)}
    return files_source(cfg, "folder", classes, PHOTOGRAPH, listed, root)


def imagenet_source(cfg: ImagesConfig) -> Source:
    """Some of ImageNet's classes, in the layout `train/<wnid>/...` and `val/<wnid>/...`.

    A class id counts the 1000 WordNet names (wnids) in sorted order. A folder with only some of the classes will do, as
    long as the subset's are there; folders by other names are counted too, where there are 1000 of them.
    """
    ids, names = subset_classes(cfg.subset, cfg.subsets)
    root = _root(cfg, "ImageNet", "train/<wnid>/...")
    train, test = _folders(root / "train"), _folders(root / "val")
    order: Sequence[str] = wordnet_names()[0]
    if not set(train) & set(order) and len(train) == IMAGENET:
        order = list(train)
    wanted = [order[number] for number in ids]
    for place, found in ((root / "train", train), (root / "val", test)):
        missing = [wnid for wnid in wanted if wnid not in found]
        if missing:
            number, what = len(missing), names[wanted.index(missing[0])]
            raise UserError(
                f"{number} of the {len(wanted)} classes of {cfg.subset} are not in {place}, such as {missing[0]} "
                f"({what}); it needs a folder for each class, by its WordNet name"
            )
    listed = {
        "train": _files({wnid: train[wnid] for wnid in wanted}),
        "test": _files({wnid: test[wnid] for wnid in wanted}),
    }
    return files_source(cfg, "ImageNet", names, PHOTOGRAPH, listed, root)


def tiny_source(cfg: ImagesConfig) -> Source:
    """Tiny ImageNet, 64 x 64, as its archive unpacks or with its `val` folder sorted into classes.

    Training images are in `train/<wnid>/images` or `train/<wnid>`; test images, the archive's val, in `val/images` with
    `val/val_annotations.txt`, in `val/images/<wnid>` or in `val/<wnid>`. `words.txt` names the classes, if it is there.
    """
    root = _root(cfg, "Tiny ImageNet", "train/<wnid>/...")
    if not (root / "train").is_dir() and (root / "tiny-imagenet-200" / "train").is_dir():
        root = root / "tiny-imagenet-200"
    train = _folders(root / "train")
    classes = list(train)
    listed = root / "wnids.txt"
    if listed.is_file():
        _same_classes(root / "train", listed.read_text(encoding="utf-8").split(), classes)
    flat, notes = root / "val" / "images", root / "val" / "val_annotations.txt"
    if flat.is_dir() and any(entry.is_dir() for entry in os.scandir(flat)):
        test = _sorted(flat, classes)
    elif flat.is_dir() and notes.is_file():
        test = _annotated(notes, flat, classes)
    else:
        test = _sorted(root / "val", classes)
    names = _words(root / "words.txt", classes)
    return files_source(cfg, "Tiny", names, 64, {"train": _files(train), "test": test}, root)


def _sorted(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    found = {name: path for name, path in _folders(folder).items() if name != "images"}
    _same_classes(folder, classes, list(found))
    return _files(found)


def _annotated(notes: Path, folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Files and labels of an annotation file, whose lines start with a file's name, a tab and its class."""
    labels = {wnid: label for label, wnid in enumerate(classes)}
    found = []
    for number, line in enumerate(notes.read_text(encoding="utf-8").splitlines(), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in labels or Path(name).name != name:
            raise UserError(f"line {number} of {notes} is '{line[:60]}'; it needs a file, a tab and a class of train")
        found.append((folder / name, labels[wnid]))
    if not found:
        raise UserError(f"{notes} is empty; unpack the archive again")
    return found


def _words(file: Path, wnids: list[str]) -> list[str]:
    if not file.is_file():
        return wnids
    names = dict(line.split("\t", 1) for line in file.read_text(encoding="utf-8").splitlines() if "\t" in line)
    return [names.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]


def _root(cfg: ImagesConfig, name: str, wanted: str, made: bool = False) -> Path:
    """The folder `--data_path`; UserError when there is none, unless it is `made` by a download."""
    root = Path(cfg.data_path)
    if not cfg.data_path:
        raise UserError(f"no folder of images; give --data_path, where {wanted} of {name} is (or try --dataset digits)")
    if not root.is_dir() and not made:
        raise UserError(f"no folder {root}; correct --data_path, where {wanted} of {name} is")
    return root


def _folders(root: Path) -> dict[str, Path]:
    """The folders of classes in `root`, by name in sorted order."""
    if not root.is_dir():
        raise UserError(f"no folder {root}; it must hold a folder of images for each class (correct --data_path)")
    found = {entry.name: Path(entry.path) for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."}
    if not found:
        raise UserError(f"{root} has no folders; it must hold a folder of images for each class")
    return dict(sorted(found.items()))


def _files(folders: dict[str, Path]) -> list[tuple[Path, int]]:
    """Every image in the folders of classes, sorted, with the number of its folder; UserError for an empty one."""
    found = []
    for label, folder in enumerate(folders.values()):
        inside = sorted(
            Path(place, name)
            for place, _, names in os.walk(folder, followlinks=True)
            for name in names
            if name[0] != "." and Path(name).suffix.lower() in SUFFIXES
        )
        if not inside:
            raise UserError(f"class folder {folder} holds no images ({', '.join(sorted(SUFFIXES))}); fill or remove it")
        found += [(file, label) for file in inside]
    return found


def _same_classes(place: Path, wanted: list[str], found: list[str]) -> None:
    lacking, foreign = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if lacking or foreign:
        parts = [f"lacks '{lacking[0]}'"] if lacking else []
        parts += [f"has an unknown '{foreign[0]}'"] if foreign else []
        raise UserError(
            f"classes of {place} do not fit: it {' and '.join(parts)}; training and test classes must be equal"
        )
