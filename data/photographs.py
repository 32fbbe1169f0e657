"""Labelled images that are files: any folder of classes, ImageNet and its subsets, Tiny ImageNet and CUB-200-2011.

Each function reads what a config names and returns a `Source`. Classes and labels are read at once, so that a mistake
is told before anything is trained; photographs are decoded when they are first looked at, once, into a cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.images import ImagesConfig, Pixels, Source, Stats
from data.sources import data_folder
from data.subsets import IMAGENET, subset_classes, wordnet_names
from utils.errors import UserError

IMAGENET_STATS: Stats = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPH = 128  # side of ImageNet's and folders' images where --res does not say
BIRD = 32  # side of CUB's, as PoDD has it
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


_ANEW = "unpack the archive again"
Listed = dict[str, list[tuple[Path, int]]]  # "train" and "test" → each file and its label


def files_source(
    cfg: ImagesConfig,
    name: str,
    classes: Sequence[str],
    side: int,
    listed: Listed,
    root: Path,
    layout: str = "squashed",
) -> Source:
    """A source of image files.

    side    of the images where `--res` does not say
    root    the folder or table that lists them, for error messages
    layout  how they become square where `--fit` is squash: squashed or bilinear
    """
    size = cfg.res or side

    def pixels(split: str, rows: Tensor) -> Pixels:
        return FilePixels([listed[split][row][0] for row in rows.tolist()], size, cfg, split, root, layout)

    def labels(split: str) -> Tensor:
        return torch.tensor([label for _, label in listed[split]])

    return Source(name, tuple(classes), 3, size, IMAGENET_STATS, labels, pixels)


class FilePixels:
    """Photographs, decoded when first asked for: a few as asked, else all of them once, into the cache."""

    def __init__(self, files: list[Path], size: int, cfg: ImagesConfig, what: str, root: Path, layout: str) -> None:
        from data.cache import ImageFiles

        layout = {"squash": layout, "crop": "cropped"}[cfg.fit]
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
    root = data_folder(cfg, "data set", "train/<class>/...")
    classes, listed = _both_splits(root)
    return files_source(cfg, "folder", classes, PHOTOGRAPH, listed, root)


def _both_splits(root: Path) -> tuple[list[str], Listed]:
    """The classes in `root`/train and in test (or val) beside it, sorted, and their files."""
    tested = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if tested is None:
        raise UserError(f"no test images in {root}: it needs a folder test (or val) with a folder for each class")
    train, test = class_folders(root / "train"), class_folders(root / tested)
    classes = list(train)
    _same_classes(root / tested, classes, list(test))
    return classes, {"train": class_files(train), "test": class_files(test)}


def imagenet_source(cfg: ImagesConfig) -> Source:
    """Some of ImageNet's classes, in the layout `train/<wnid>/...` and `val/<wnid>/...`.

    A class id counts the 1000 WordNet names (wnids) in sorted order. A folder with only some of the classes will do, as
    long as the subset's are there; folders by other names are counted too, where there are 1000 of them.
    """
    ids, names = subset_classes(cfg.subset, cfg.subsets)
    root = data_folder(cfg, "ImageNet", "train/<wnid>/...")
    train, test = class_folders(root / "train"), class_folders(root / "val")
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
        "train": class_files({wnid: train[wnid] for wnid in wanted}),
        "test": class_files({wnid: test[wnid] for wnid in wanted}),
    }
    return files_source(cfg, "ImageNet", names, PHOTOGRAPH, listed, root)


def tiny_source(cfg: ImagesConfig) -> Source:
    """Tiny ImageNet, 64 x 64, as its archive unpacks or with its `val` folder sorted into classes.

    Training images are in `train/<wnid>/images` or `train/<wnid>`; test images, the archive's val, in `val/images` with
    `val/val_annotations.txt`, in `val/images/<wnid>` or in `val/<wnid>`. `words.txt` names the classes, if it is there.
    """
    root = data_folder(cfg, "Tiny ImageNet", "train/<wnid>/...")
    while not (root / "train").is_dir() and (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    train = class_folders(root / "train")
    classes = list(train)
    listed = root / "wnids.txt"
    if listed.is_file():
        _same_classes(root / "train", listed.read_text(encoding="utf-8", errors="replace").split(), classes)
    test = tiny_tests(root, classes)
    names = _words(root / "words.txt", classes)
    return files_source(cfg, "Tiny", names, 64, {"train": class_files(train), "test": test}, root)


def tiny_tests(root: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Tiny ImageNet's test images in `root`/val, in any layout of `tiny_source`, and which of `classes` each is."""
    flat, notes = root / "val" / "images", root / "val" / "val_annotations.txt"
    if flat.is_dir() and any(entry.is_dir() for entry in os.scandir(flat)):
        return _sorted(flat, classes)
    if flat.is_dir() and notes.is_file():
        return _annotated(notes, flat, classes)
    return _sorted(root / "val", classes)


def _sorted(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    found = {name: path for name, path in class_folders(folder).items() if name != "images"}
    _same_classes(folder, classes, list(found))
    return class_files(found)


def _annotated(notes: Path, folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Files and labels of an annotation file, whose lines start with a file's name, a tab and its class."""
    labels = {wnid: label for label, wnid in enumerate(classes)}
    found = []
    for number, line in enumerate(notes.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
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
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    names = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return [names.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]


def cub_source(cfg: ImagesConfig) -> Source:
    """CUB-200-2011, kinds of birds, as its archive unpacks or in `train/<class>/...` and `test/<class>/...`.

    Label k is class k + 1 of the archive's tables, whose split is kept. Classes' names lose their number: that of
    `001.Black_footed_Albatross` is Black_footed_Albatross. Images are squashed by a bilinear filter, as PoDD does.
    """
    root = data_folder(cfg, "CUB200", "CUB_200_2011")
    for name in ("CUB200", "CUB_200_2011"):  # the first as PoDD keeps it in a folder of all sets
        root = root / name if (root / name).is_dir() else root
    table = root / "images.txt"
    if not table.is_file() and not (root / "train").is_dir():
        raise UserError(
            f"no CUB200 in {root} (looked for images.txt and train/<class>/...); unpack the archive again or correct "
            "--data_path"
        )
    classes, listed = _tabled(table, root / "images") if table.is_file() else _both_splits(root)
    names = [name.partition(".")[2] if _numbered(name) else name for name in classes]
    return files_source(cfg, "CUB200", names, BIRD, listed, table if table.is_file() else root, "bilinear")


def _tabled(table: Path, folder: Path) -> tuple[list[str], Listed]:
    """The classes, in the order of their numbers, and the files that CUB's tables list; UserError where these differ.

    table   images.txt, beside image_class_labels.txt and train_test_split.txt: lines of an image's number and a value
    folder  what the first table's paths, `<class number>.<class>/<file>`, start from
    """
    paths = _values(table, "a path such as 001.Black_footed_Albatross/1.jpg")
    kinds, sides = table.with_name("image_class_labels.txt"), table.with_name("train_test_split.txt")
    labels, trained = _values(kinds, "a class"), _values(sides, "1 for training or 0 for test")
    for file, values in ((kinds, labels), (sides, trained)):
        for one, other, place, missing in ((paths, values, table, file), (values, paths, file, table)):
            for image, (line, _) in one.items():
                if image not in other:
                    raise UserError(f"line {line} of {place} has image {image}, which {missing.name} lacks; {_ANEW}")
    classes: dict[int, str] = {}
    listed: Listed = {"train": [], "test": []}
    for image, (line, path) in paths.items():
        name, _, file = path.partition("/")
        number = int(name.partition(".")[0]) if _numbered(name) else 0
        if not number or not file or Path(file).name != file or classes.setdefault(number, name) != name:
            known = f" (class {number} is {classes[number]})" if number in classes else ""
            raise UserError(f"line {line} of {table} has '{path[:80]}', not <number>.<class>/<file>{known}; {_ANEW}")
        line, label = labels[image]
        if label != str(number):
            raise UserError(f"line {line} of {kinds} has class {label} for image {image}, which is in {name}; {_ANEW}")
        line, side = trained[image]
        if side not in ("0", "1"):
            raise UserError(f"line {line} of {sides} has {side} for image {image}, neither 1 nor 0; {_ANEW}")
        listed["train" if side == "1" else "test"].append((folder / path, number - 1))
    for number in range(1, len(classes) + 1):
        if number not in classes:
            raise UserError(f"{kinds} has no image of class {number}, but one of class {max(classes)}; {_ANEW}")
    for split, files in listed.items():
        if not files:
            raise UserError(f"{sides} has no {split} image; {_ANEW}")
    return [classes[number] for number in sorted(classes)], listed


def _values(file: Path, what: str) -> dict[str, tuple[int, str]]:
    """A table of CUB: an image's number → the line and its second field, `what` that should be."""
    if not file.is_file():
        raise UserError(f"no {file}; {_ANEW}")
    found: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or fields[0] in found:
            again = "; that image came before" if len(fields) == 2 else ""
            raise UserError(f"line {number} of {file} is '{line[:60]}'; it needs an image's number and {what}{again}")
        found[fields[0]] = number, fields[1]
    if not found:
        raise UserError(f"{file} is empty; {_ANEW}")
    return found


def _numbered(name: str) -> bool:
    number, _, rest = name.partition(".")
    return number.isdecimal() and bool(rest)


def class_folders(root: Path) -> dict[str, Path]:
    """The folders of classes in `root`, by name in sorted order."""
    if not root.is_dir():
        raise UserError(f"no folder {root}; it must hold a folder of images for each class (correct --data_path)")
    found = {entry.name: Path(entry.path) for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."}
    if not found:
        raise UserError(f"{root} has no folders; it must hold a folder of images for each class")
    return dict(sorted(found.items()))


def class_files(folders: dict[str, Path]) -> list[tuple[Path, int]]:
    """Every image in the folders of classes, sorted, with the number of its folder; UserError for an empty one."""
    found = []
    for label, folder in enumerate(folders.values()):
        inside = sorted(Path(place, name) for place, name in image_names(folder))
        if not inside:
            raise UserError(f"class folder {folder} holds no images ({', '.join(sorted(SUFFIXES))}); fill or remove it")
        found += [(file, label) for file in inside]
    return found


def image_names(folder: Path) -> Iterator[tuple[str, str]]:
    """Folder and name of each image in `folder` and below it, links followed; UserError for links that go in a circle:
    two of them in a folder would make 2⁴⁰ paths before the system says so."""
    for place, below, names in os.walk(folder, followlinks=True):
        for name in below:
            path = os.path.join(place, name)
            if os.path.islink(path) and Path(os.path.realpath(place)).is_relative_to(os.path.realpath(path)):
                raise UserError(f"{path} is a link to a folder that it is in; remove it")
        yield from ((place, name) for name in names if name[0] != "." and _ending(name) in SUFFIXES)


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _same_classes(place: Path, wanted: list[str], found: list[str]) -> None:
    lacking, foreign = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if lacking or foreign:
        parts = [f"lacks '{lacking[0]}'"] if lacking else []
        parts += [f"has an unknown '{foreign[0]}'"] if foreign else []
        raise UserError(
            f"classes of {place} do not fit: it {' and '.join(parts)}; training and test classes must be equal"
        )
