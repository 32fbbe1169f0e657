"""The published layouts of ELEVATER's data sets and of ImageNet's relatives, as their archives unpack.

Each reader is given a folder, says by `wanted` what must be in it, and reads one split. What torchvision reads is read
by torchvision (nothing is ever downloaded); the rest is here. Every set may also lie in plain folders of classes or in
tables (data/benchmark_files.py).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.benchmark_files import ArrayPictures, FilePictures, Listing, labelled_files, many_hot
from data.photographs import class_files, class_folders
from data.subsets import IMAGENET, wordnet_names
from utils.errors import UserError, first_line
from utils.files import read_json
from utils.parsing import is_below, is_plain, parse_json
from utils.rng import generator


@dataclass(frozen=True)
class Layout:
    """How a data set's archive unpacks.

    wanted   what is there, below the folder of the set or of all sets; the first that is found counts
    read     (folder that holds `wanted`, that path itself, split) → the split
    splits   those that it has
    """

    wanted: tuple[str, ...]
    read: Callable[[Path, Path, str], Listing]
    splits: tuple[str, ...] = ("train", "val", "test")


# --- by torchvision --------------------------------------------------------------------------------------------------


def by_torchvision(
    name: str, wanted: str, splits: dict[str, Any], files: str = "_image_files", labels: str = "_labels"
) -> Layout:
    """A set of torchvision's whose images are files.

    splits   our names of the splits → the arguments that choose them there
    files    its attribute with the paths, or with (path, label) where `labels` is empty
    """

    def read(root: Path, found: Path, split: str) -> Listing:
        data = _torchvision(name, root, splits[split])
        rows = getattr(data, files)
        owned = list(map(int, getattr(data, labels) if labels else [label for _, label in rows]))
        paths = rows if labels else [path for path, _ in rows]
        top = os.path.abspath(root.expanduser())
        outside = next((path for path in paths if not Path(os.path.abspath(path)).is_relative_to(top)), "")
        if outside:
            raise UserError(f"{found} has the image {str(outside)!r}, which is not below {root}; unpack the set again")
        classes = getattr(data, "classes", None) or [str(number) for number in range(max(owned) + 1)]
        return Listing(FilePictures(map(Path, paths)), torch.tensor(owned), tuple(map(str, classes)))

    return Layout((wanted,), read, tuple(splits))


def arrays_by_torchvision(name: str, wanted: str, digits: bool = False) -> Layout:
    """A small set of torchvision's that is arrays in memory."""

    def read(root: Path, found: Path, split: str) -> Listing:
        data = _torchvision(name, root, {"train": split == "train"})
        classes = [str(digit) for digit in range(10)] if digits else [name.replace("_", " ") for name in data.classes]
        return Listing(ArrayPictures(data.data), torch.as_tensor(data.targets).long(), tuple(classes))

    return Layout((wanted,), read, ("train", "test"))


def _torchvision(name: str, root: Path, options: dict[str, Any]) -> Any:
    from torchvision import datasets

    try:
        return getattr(datasets, name)(str(root), download=False, **options)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        reason = str(error).split(". You can use download")[0]
        raise UserError(f"{name} in {root} is not whole ({reason}); unpack its archives again") from None


# --- others ----------------------------------------------------------------------------------------------------------


def drawn_split(*wanted: str, train: int, val: int = 0, test: int = 0) -> Layout:
    """Folders of classes without a split: so many images of each class, drawn once and for all; test 0 is the rest."""
    note = "it comes without a split; ours is drawn, so its images are not those that others train and test on"

    rows = {"train": slice(train), "val": slice(train, train + val), "test": slice(train + val, None)}
    if test:
        rows["test"] = slice(train + val, train + val + test)

    def read(root: Path, found: Path, split: str) -> Listing:
        folders = class_folders(found)
        files: list[Path] = []
        labels: list[int] = []
        for number, (name, folder) in enumerate(folders.items()):
            own = [file for file, _ in class_files({name: folder})]
            order = torch.randperm(len(own), generator=generator(0, "benchmark split", name))
            chosen = [own[place] for place in order[rows[split]].tolist()]
            files, labels = files + chosen, labels + [number] * len(chosen)
        return Listing(FilePictures(files), torch.tensor(labels), tuple(folders), note)

    return Layout(wanted, read, tuple(split for split in rows if split != "val" or val))


_FER_USAGE = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
# The numbers of fer2013.csv. ELEVATER's own list has them in another order; here names follow the numbers.
_FER = ("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral")


def _fer2013(root: Path, found: Path, split: str) -> Listing:
    with open(found, encoding="utf-8", newline="") as file:
        rows = [{name.strip(): value for name, value in row.items()} for row in csv.DictReader(file)]
    try:
        chosen = [row for row in rows if row["Usage"] == _FER_USAGE[split]]
        bits = (bytes(map(int, row["pixels"].split())) for row in chosen)  # refuse what is not 0 to 255
        pixels = np.array([np.frombuffer(row, dtype=np.uint8).reshape(48, 48) for row in bits])
        labels = torch.tensor([int(row["emotion"]) for row in chosen])
    except (KeyError, ValueError, OverflowError, AttributeError, TypeError) as error:
        raise UserError(
            f"{found} is not FER-2013's table of emotion, pixels and Usage ({error}); fetch it again"
        ) from None
    return Listing(ArrayPictures(pixels), labels, _FER)


def _hateful_memes(root: Path, found: Path, split: str) -> Listing:
    # Its test images have no published labels; ELEVATER tests on dev.
    names = ("train.jsonl",) if split == "train" else ("dev.jsonl", "dev_seen.jsonl")
    file = next((root / name for name in names if (root / name).is_file()), root / names[0])
    try:
        rows = [parse_json(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        strange = next((row["img"] for row in rows if not is_below(row["img"])), "")
        if strange:
            raise UserError(f"{file} has the image {strange!r}, which is not below {root}; correct the path")
        files, labels = [root / row["img"] for row in rows], [int(row["label"]) for row in rows]
    except FileNotFoundError:
        raise UserError(f"no {file}; unpack Hateful Memes again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} lacks img and label in a line ({error!r}); fetch it again") from None
    return Listing(FilePictures(files), torch.tensor(labels), ("meme", "hatespeech meme"))


_CAMELYON = 262_144  # training images, the most that one of its files has


class _CamelyonPictures:
    """Patch-Camelyon's images, in an HDF5 file."""

    def __init__(self, path: Path) -> None:
        self.path, self.images = path, _hdf5(path, "x", (_CAMELYON, 96, 96, 3))

    def __len__(self) -> int:
        return len(self.images)

    def image(self, row: int) -> Any:
        from PIL import Image

        try:
            return Image.fromarray(self.images[row])
        except OSError as error:
            raise UserError(f"{self.path} is damaged at image {row} ({first_line(error)}); fetch it again") from None

    def content(self, cache_dir: Path | str, workers: int) -> str:
        return FilePictures([self.path]).content(cache_dir, workers)


def _hdf5(path: Path, name: str, most: tuple[int, ...]) -> Any:
    """The bytes called `name` in an HDF5 file, of at most this shape, (N, ...), and exactly so but for N; they are read
    when asked for. UserError for what is none, or lies in another file."""
    try:
        import h5py
    except ImportError:
        raise UserError("Patch-Camelyon is HDF5 files, which need the package h5py; pip install h5py") from None
    try:
        file = h5py.File(path, "r")
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name} is missing, or a link")
        found = file[name]
        if found.is_virtual or found.external:
            raise ValueError(f"{name} lies in other files")
        if found.dtype != np.uint8 or found.shape[1:] != most[1:] or not 0 < found.shape[0] <= most[0]:
            raise ValueError(f"{name} is {found.dtype} {found.shape}, not uint8 of at most {most}")
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is no file of Patch-Camelyon ({first_line(error)}); fetch it again") from None
    return found


def _camelyon(root: Path, found: Path, split: str) -> Listing:
    word = "valid" if split == "val" else split
    images, labels = (found.with_name(f"camelyonpatch_level_2_split_{word}_{part}.h5") for part in "xy")
    pictures, told = _CamelyonPictures(images), _hdf5(labels, "y", (_CAMELYON, 1, 1, 1))
    try:
        owned = torch.from_numpy(told[:, 0, 0, 0].astype(np.int64))
    except OSError as error:
        raise UserError(f"{labels} is damaged ({first_line(error)}); fetch it again") from None
    if len(owned) != len(pictures):
        raise UserError(f"{labels} has {len(owned)} labels, {images.name} {len(pictures)} images; fetch them again")
    return Listing(pictures, owned, ("0", "1"))


def _voc(root: Path, found: Path, split: str) -> Listing:
    """VOC's classification task: an image has the classes of which its lists say 1; those of difficult objects only
    (0) it has not."""
    main = found / "ImageSets" / "Main"
    names = (main / f"{split}.txt").read_text(encoding="utf-8").split()
    strange = next((name for name in names if not is_plain(name)), "")
    if strange:
        raise UserError(f"{main / split}.txt has the image {strange!r}, which is no name of VOC's; unpack it again")
    classes = tuple(sorted(path.name.removesuffix("_test.txt") for path in main.glob("*_test.txt")))
    rows = {name: place for place, name in enumerate(names)}
    owned: list[list[int]] = [[] for _ in names]
    for number, name in enumerate(classes):
        for line in (main / f"{name}_{split}.txt").read_text(encoding="utf-8").splitlines():
            image, _, flag = line.partition(" ")
            if image not in rows or flag.strip() not in ("1", "0", "-1"):
                raise UserError(f"{main / name}_{split}.txt has a line '{line}', which VOC has not; unpack it again")
            if flag.strip() == "1":
                owned[rows[image]].append(number)
    files = FilePictures(found / "JPEGImages" / f"{name}.jpg" for name in names)
    return Listing(files, many_hot(owned, len(classes)), classes)


# --- ImageNet and its relatives --------------------------------------------------------------------------------------


def by_wordnet(listing: Listing, place: Path) -> Listing:
    """A split whose classes are WordNet names; numbers from 0 to 999, as ImageNetV2 has them, count their order."""
    wnids, classes = wordnet_names()[0], listing.classes
    if all(name.isdecimal() and int(name) < IMAGENET for name in classes):
        classes = tuple(wnids[int(name)] for name in classes)
    foreign = sorted({*classes} - {*wnids})
    if foreign:
        raise UserError(
            f"folder {foreign[0]} in {place} has no WordNet name of ImageNet's; such names, or the numbers 0 to 999, "
            "tell the classes"
        )
    return Listing(listing.pictures, listing.labels, classes)


def _objectnet(root: Path, maps: Path, split: str) -> Listing:
    """The classes of ObjectNet that ImageNet has, by the tables of its archive."""
    called = read_json(maps / "folder_to_objectnet_label.json", "ObjectNet's table of folders")
    shared = read_json(maps / "objectnet_to_imagenet_1k.json", "ObjectNet's table of ImageNet's classes")
    if not isinstance(called, dict) or not isinstance(shared, dict):
        raise UserError(f"{maps} has no tables of ObjectNet's classes; unpack its archive again")
    strange = next((name for name in called if not is_plain(name)), "")
    if strange:
        raise UserError(f"{maps} has the folder {strange!r}, which is not below its images; unpack its archive again")
    folders = {label: maps.parent / "images" / name for name, label in called.items() if label in shared}
    return labelled_files(folders, sorted(folders))


def _of(split: Sequence[str], **renamed: str) -> dict[str, dict[str, str]]:
    return {name: {"split": renamed.get(name, name)} for name in split}


LAYOUTS: dict[str, Layout] = {
    "caltech101": drawn_split("101_ObjectCategories", "caltech101/101_ObjectCategories", train=30),
    "cifar10": arrays_by_torchvision("CIFAR10", "cifar-10-batches-py"),
    "cifar100": arrays_by_torchvision("CIFAR100", "cifar-100-python"),
    "dtd": by_torchvision("DTD", "dtd/dtd/labels", _of(("train", "val", "test"))),
    "eurosat-clip": drawn_split("2750", "eurosat/2750", train=500, val=500, test=500),
    "fer2013": Layout(("fer2013.csv", "fer2013/fer2013.csv", "icml_face_data.csv"), _fer2013),
    "fgvc-aircraft-2013b": by_torchvision("FGVCAircraft", "fgvc-aircraft-2013b/data", _of(("train", "val", "test"))),
    "flower102": by_torchvision("Flowers102", "flowers-102/setid.mat", _of(("train", "val", "test"))),
    "food101": by_torchvision("Food101", "food-101/meta", _of(("train", "test"))),
    "gtsrb": by_torchvision("GTSRB", "gtsrb/GTSRB", _of(("train", "test")), "_samples", ""),
    "hateful-memes": Layout(("train.jsonl", "dev.jsonl", "dev_seen.jsonl"), _hateful_memes, ("train", "test")),
    "mnist": arrays_by_torchvision("MNIST", "MNIST/raw", digits=True),
    "oxford-iiit-pets": by_torchvision(
        "OxfordIIITPet", "oxford-iiit-pet/annotations", _of(("train", "test"), train="trainval"), "_images"
    ),
    "patchcamelyon": Layout(
        tuple(f"{place}camelyonpatch_level_2_split_test_x.h5" for place in ("", "pcam/")), _camelyon
    ),
    "resisc45-clip": drawn_split("NWPU-RESISC45", train=70, val=70, test=560),
    "stanfordcar": by_torchvision("StanfordCars", "stanford_cars/devkit", _of(("train", "test")), "_samples", ""),
    "voc2007classification": Layout(("VOCdevkit/VOC2007", "VOC2007"), _voc),
    "objectnet": Layout(("mappings", "objectnet-1.0/mappings"), _objectnet, ("test",)),
}
