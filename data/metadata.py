"""Captions of training images: `metadata.jsonl`, lines of JSON, `{"file_name": "<class>/<file>", "text": ...}`.

It is read and checked against the images before any network is loaded: a caption that lacks would otherwise be noticed
hours later. The file is what the `imagefolder` loader of Hugging Face's datasets reads too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.files import atomic, digest
from utils.parsing import is_below, is_utf8, parse_json

if TYPE_CHECKING:
    from data.catalogue import Catalogue

METADATA = "metadata.jsonl"
_SHOWN = 3  # offenders named in a message


def write_metadata(path: Path | str, captions: dict[str, str]) -> None:
    """Write captions, file name → text, sorted by name; whole or not at all."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for name in sorted(captions):
            file.write(json.dumps({"file_name": name, "text": captions[name]}, ensure_ascii=False) + "\n")


def metadata_file(path: Path | str) -> Path:
    """The file of captions at `path`, which may be its folder."""
    return Path(path) / METADATA if Path(path).is_dir() else Path(path)


def captions_digest(captions: dict[str, str]) -> str:
    """A digest of captions, in whatever order they are held."""
    return digest(sorted(captions.items()))


def read_metadata(path: Path | str, catalogue: Catalogue, allow_missing: bool = False) -> dict[str, str]:
    """Captions of the catalogue's training images: their names, as in `catalogue.train` → text, stripped.

    path           a file, or a folder with a metadata.jsonl
    allow_missing  images without a caption are left out instead of refused

    A name may be `<class>/<file>` below anything that ends in train/, the class spelt as the catalogue knows it, or a
    bare file name where only one image has it. Published captions write MM for each _ of a file's name; that is
    understood. Lines of classes that the catalogue has not, and of images that --train_limit leaves out, are passed
    over; those with `..` in their names are of no image.

    UserError for lines that are no JSON or lack a name or text, and for empty texts, two captions of one image,
    captions of no image and images without one; it counts the offenders and names the first three.
    """
    path = metadata_file(path)
    finder = _Finder(catalogue)
    captions: dict[str, str] = {}
    empty, twice, strange, others = [], [], [], 0
    for number, name, text in _lines(path):
        found = finder.find(name)
        if found is None:
            if finder.elsewhere(name):
                others += 1
            else:
                strange.append(f"{name} (line {number})")
        elif not text.strip():
            empty.append(f"{name} (line {number})")
        elif found in captions:
            twice.append(f"{name} (line {number})")
        else:
            captions[found] = text.strip()
    missing = [] if allow_missing else [name for files in catalogue.train for name in files if name not in captions]
    unknown = f" in {catalogue.train_root}; remove these lines or correct them"
    _refuse(path, "captions of no image, or of several at once", strange, unknown)
    _refuse(path, "empty captions", empty, "; write a text or remove the lines")
    _refuse(path, "second captions of an image", twice, "; keep one line an image")
    passed = f" ({others} lines are of other images)" if others else ""
    _refuse(path, "images without a caption", missing, f"{passed}; caption them too, or give --allow_missing")
    if not captions:
        raise UserError(f"{path} has no caption of an image in {catalogue.train_root}{passed}; correct either path")
    return {name: captions[name] for files in catalogue.train for name in files if name in captions}


class _Finder:
    """Which image a file name of a caption means."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.names = {name for files in catalogue.train for name in files}
        # Without the folders in between, and without the class; None where several images share it.
        self.flat: dict[tuple[int, str], str | None] = {}
        self.bare: dict[str, str | None] = {}
        for k, files in enumerate(catalogue.train):
            for name in files:
                base = name.rpartition("/")[2]
                self.flat[k, base] = None if (k, base) in self.flat else name
                self.bare[base] = None if base in self.bare else name

    def find(self, name: str) -> str | None:
        """The image in `catalogue.train`, or None."""
        return next((found for spelt in _spellings(name) if (found := self._find(spelt))), None)

    def elsewhere(self, name: str) -> bool:
        """Whether this is an image of another class, or one that the catalogue leaves out."""
        name = _below_train(name)
        folder, slash, _ = name.rpartition("/")
        if not is_below(name.lstrip("/")):
            return False
        if not slash:
            return self.bare.get(name, name) is not None and any(spelt in self._all for spelt in _spellings(name))
        if self.catalogue.class_number(folder.partition("/")[0]) is None:
            return True
        return any((self.catalogue.train_root / spelt).is_file() for spelt in _spellings(name))

    def _find(self, name: str) -> str | None:
        if name in self.names:
            return name
        name = _below_train(name)
        folder, slash, rest = name.partition("/")
        if not slash:
            return self.bare.get(name)
        k = self.catalogue.class_number(folder)
        if k is None:
            return None
        spelt = f"{self.catalogue.kinds[k].ident}/{rest}"
        return spelt if spelt in self.names else self.flat.get((k, rest))

    @cached_property
    def _all(self) -> set[str]:
        return {file for _, _, files in os.walk(self.catalogue.train_root) for file in files}


def _below_train(name: str) -> str:
    """What follows the first train/ in a path, if that is a class and a file; a class may be called train as well."""
    parts = name.removeprefix("./").split("/")
    start = parts.index("train") + 1 if "train" in parts[:-2] else 0
    return "/".join(parts[start:])


def _spellings(name: str) -> tuple[str, str]:
    """A path as it is, and with the file's own name before it was changed for the published captions."""
    folder, slash, base = name.rpartition("/")
    return name, f"{folder}{slash}{base.replace('MM', '_')}"


def _refuse(path: Path, what: str, offenders: list[str], remedy: str) -> None:
    if offenders:
        first = ", ".join(offenders[:_SHOWN]) + (", ..." if len(offenders) > _SHOWN else "")
        raise UserError(f"{path}: {len(offenders)} {what}: {first}{remedy}")


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, file name and text of each line that is not empty."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield number, *_entry(path, number, raw)
    except FileNotFoundError:
        raise UserError(f"no captions at {path}; run buffer.py first, or correct --metajson_file") from None


def _entry(path: Path, number: int, raw: bytes) -> tuple[str, str]:
    try:
        entry = parse_json(raw.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"line {number} of {path} is not valid JSON ({error}); correct or remove it") from None
    fields = [entry.get(key) for key in ("file_name", "text")] if isinstance(entry, dict) else [None]
    if not all(isinstance(field, str) for field in fields) or not fields[0] or not is_utf8(fields[1]):
        shown = raw.decode("utf-8-sig").strip()[:60]
        raise UserError(f'line {number} of {path} is {shown}; it needs "file_name" and "text", both texts')
    return fields[0], fields[1]
