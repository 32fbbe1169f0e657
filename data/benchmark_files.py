"""Labelled images of a split, from any folder of classes, any CSV table, or arrays in memory.

A split is read without decoding an image; an image is decoded when it is asked for, and one that cannot be decoded is
a mistake to be told, not to be skipped: scores on fewer images are other scores.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data.cache import ImageFiles
from data.photographs import class_files, class_folders
from utils.errors import UserError
from utils.files import digest
from utils.pictures import FORMATS, check_sides, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

# A split by the names that its folder or table may have; where there is no test split, val takes its place.
PARTS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
_FILES, _LABELS = ("file", "filepath", "path", "image", "filename"), ("label", "labels", "class")


class Pictures(Protocol):
    """N images in order."""

    def __len__(self) -> int: ...

    def image(self, row: int) -> Image:
        """One image, RGB, in its own size; UserError when it cannot be decoded."""

    def content(self, cache_dir: Path | str, workers: int) -> str:
        """A digest of them all; remembered in `cache_dir` where it takes reading files."""


class FilePictures:
    """Images that are files."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, row: int) -> Image:
        file = self.files[row]
        try:
            image = open_image(file.read_bytes(), (*FORMATS, "PPM"))
            check_sides(image)
            return image.convert("RGB")
        except FileNotFoundError:
            raise UserError(f"no image {file}; unpack the data set again") from None
        except Exception as error:  # PIL raises a dozen kinds for damaged files
            raise UserError(f"image {file} cannot be decoded ({error}); fetch it again") from None

    def content(self, cache_dir: Path | str, workers: int) -> str:
        source = Path(os.path.commonpath([file.parent.absolute() for file in self.files]))
        place = Path(cache_dir) / "images"
        return ImageFiles(self.files, 1, place, workers, "labelled", source, flag="--data_path").content()


class ArrayPictures:
    """Images in memory, (N, H, W, 3) or (N, H, W) uint8."""

    def __init__(self, images: Any) -> None:
        self.images = np.asarray(images)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, row: int) -> Image:
        from PIL import Image

        return Image.fromarray(np.asarray(self.images[row])).convert("RGB")

    def content(self, cache_dir: Path | str, workers: int) -> str:
        return digest(self.images)


@dataclass(frozen=True)
class Listing:
    """A split as it was found.

    labels    (N,) long, or (N, K) bool where an image may have several
    classes   what label k is called where the set is from: a folder's name, a word
    note      what a reader of its numbers should know
    """

    pictures: Pictures
    labels: Tensor
    classes: tuple[str, ...]
    note: str = ""


Splits = dict[str, Callable[[], Listing]]  # "train", "val" and "test", those that there are → what reads them


def from_folders(place: Path, bare: bool = True) -> Splits | None:
    """The splits `<split>/<class>/...` in a folder, or, without any, its own folders of classes as the test split.

    bare   whether its own folders may be classes

    Classes are all that any split has, in the order of their names, or of their numbers where all are numbers. None
    where there are no folders of classes.
    """
    splits = _splits(place, "") or ({"test": place} if bare and _has_folders(place) else {})
    folders = {split: class_folders(found) for split, found in splits.items()}
    classes = in_order(name for found in folders.values() for name in found)
    notes = {split: _note(split, found) for split, found in splits.items()}
    return {split: partial(labelled_files, found, classes, notes[split]) for split, found in folders.items()} or None


def labelled_files(folders: Mapping[str, Path], classes: Sequence[str], note: str = "") -> Listing:
    """All images in the folders of classes; those of one class follow each other by name."""
    order = [name for name in classes if name in folders]
    found = class_files({name: folders[name] for name in order})
    places = torch.tensor([classes.index(name) for name in order])
    return Listing(FilePictures(file for file, _ in found), places[[k for _, k in found]], tuple(classes), note)


def from_tables(place: Path) -> Splits | None:
    """The splits `<split>.csv` in a folder, or one table, which is the test split; None where there is none.

    A table has a column of files (relative to the table, which is its user's own and may name any) and one of labels,
    by the names of _FILES and _LABELS. Several labels of an image are parted by semicolons. Classes are in order as
    those of folders are.
    """
    tables = {"test": place} if place.is_file() and place.suffix == ".csv" else _splits(place, ".csv")
    if not tables:
        return None
    rows = {split: _read_table(path) for split, path in tables.items()}
    several = any(len(labels) != 1 for found in rows.values() for _, labels in found)
    classes = in_order(name for found in rows.values() for _, labels in found for name in labels)
    notes = {split: _note(split, path) for split, path in tables.items()}
    return {split: partial(_tabled, found, classes, several, notes[split]) for split, found in rows.items()}


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names sorted, as numbers where all of them are: 2 before 10."""
    unique = set(names)
    return tuple(sorted(unique, key=int) if all(name.isdecimal() for name in unique) else sorted(unique))


def many_hot(labels: Iterable[Iterable[int]], classes: int) -> Tensor:
    """(N, K) bool of each image's classes."""
    rows = [list(row) for row in labels]
    hot = torch.zeros(len(rows), classes, dtype=torch.bool)
    for place, row in enumerate(rows):
        hot[place, row] = True
    return hot


def _splits(place: Path, ending: str) -> dict[str, Path]:
    """The splits that are in a folder, as folders or as files of an ending; val is test where that lacks."""
    found = {}
    for split, names in PARTS.items():
        for path in (place / f"{name}{ending}" for name in names):
            if path.is_file() if ending else _has_folders(path):
                found.setdefault(split, path)
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    return found


def _note(split: str, place: Path) -> str:
    """What a reader of numbers on a split should know of where it is from."""
    taken = split == "test" and place.stem in PARTS["val"]
    return f"it has no test images here; those of {place.name} are taken" if taken else ""


def _has_folders(place: Path) -> bool:
    return place.is_dir() and any(entry.is_dir() and entry.name[0] != "." for entry in os.scandir(place))


def _read_table(path: Path) -> list[tuple[Path, list[str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            known = {str(name).strip().lower(): name for name in rows.fieldnames or ()}
            where, what = (next((known[name] for name in names if name in known), None) for names in (_FILES, _LABELS))
            if where is None or what is None:
                raise UserError(
                    f"table {path} has columns {', '.join(known) or 'none'}; it needs file and label (or filepath)"
                )
            found = []
            for row in rows:
                if not row[where] or row[what] is None:
                    raise UserError(f"line {rows.line_num} of {path} is not whole; it needs a file and a label")
                labels = [name.strip() for name in row[what].split(";") if name.strip()]
                found.append((path.parent / row[where].strip(), labels))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"table {path} is not CSV text in UTF-8 ({error}); save it as such") from None
    if not found:
        raise UserError(f"table {path} lists no image; it needs a line for each")
    return found


def _tabled(rows: Sequence[tuple[Path, list[str]]], classes: Sequence[str], several: bool, note: str) -> Listing:
    numbers = {name: k for k, name in enumerate(classes)}
    owned = [[numbers[name] for name in labels] for _, labels in rows]
    labels = many_hot(owned, len(classes)) if several else torch.tensor([own[0] for own in owned])
    return Listing(FilePictures(file for file, _ in rows), labels, tuple(classes), note)
