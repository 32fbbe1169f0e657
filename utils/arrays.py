"""NumPy's files from anybody: what a header claims is held against the bytes that are there before any memory is
taken for it."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_HEADER = 1 << 14  # bytes; numpy itself believes none of more than 10,000
_SIDE = 1 << 48  # rows or columns; none at all of them would still be too many for numpy
_ROOM = 1 << 30  # bytes that a small archive may unpack to; beyond it, so many times its own
_PACKED = 100


def map_array(path: Path | str) -> Any:
    """What `np.load` maps; FileNotFoundError, or ValueError or EOFError for a file that is no array of plain numbers or
    claims more than it has. An archive is numpy's, unread: the caller's to refuse."""
    with open(path, "rb") as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            file.seek(0)
            _check_header(file, Path(path).stat().st_size)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def unpack_array(archive: Any, name: str) -> np.ndarray:
    """The array `name` of an open `.npz`; KeyError where there is none, ValueError where it claims more than it has, or
    unpacks to a hundred times that and more than a gigabyte."""
    entries = {record.filename: record for record in archive.zip.infolist()}
    if record := entries.get(name) or entries.get(f"{name}.npy"):
        there = min(record.compress_size, archive.zip.start_dir)
        limit = there if record.compress_type == zipfile.ZIP_STORED else max(_ROOM, _PACKED * there)
        if record.file_size > limit:
            raise ValueError(f"its {name} claims {record.file_size:,} bytes but is packed in {there:,}")
        with archive.zip.open(record) as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                with archive.zip.open(record) as again:
                    _check_header(again, record.file_size)
    return archive[name]


def _check_header(file: BinaryIO, size: int) -> None:
    """ValueError unless a header, from the file's beginning, is one of at most `size` bytes."""
    version = np.lib.format.read_magic(file)
    start = file.tell()
    length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
    if length > min(size, _HEADER):
        raise ValueError(f"its header claims {length:,} bytes")
    file.seek(start)
    if version not in ((1, 0), (2, 0)):  # the third is of arrays whose columns have names
        raise ValueError("it is no plain array")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(file)
    if not all(0 <= side < _SIDE for side in shape) or math.prod(shape) * kind.itemsize > size - file.tell():
        raise ValueError(f"it claims to be {_shown(shape)} of {kind} but has only {size - file.tell():,} bytes")


def _shown(shape: tuple[int, ...]) -> str:
    text = str(shape)
    return text if len(text) <= 60 else f"{text[:57]}..."
