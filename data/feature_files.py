"""Features of images and sentences on disk: written once, row by row, and read in any order.

`<name>.npy` is a plain array (count, dim) that `np.load(..., mmap_mode="r")` opens; `<name>.tsv` with its index is how
DIME-FM's data are packed. Beside either, `<name>.json` tells what the numbers are: the network and its layer, whether
they are normalised, their type, width and number, the digest of the file, the pool they are of and which of its images
could not be decoded. It is written last, so there is no half of a file that has one; until then rows are appended to
`<name>.unfinished.npy` or `.tsv`, and a killed run goes on behind its last whole row. Whoever opens a file with such a
note goes through all of it once (at 0.7 GB/s, or the disk's rate) and refuses what is not of that digest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from data.byte_files import ByteFile, line_ends
from data.chain import Chain
from data.payloads import read_vector, vector_payload
from data.tsv import TsvFile, record
from utils.arrays import map_array
from utils.errors import RunError, UserError, first_line
from utils.files import atomic, check_kept, check_version, digest, file_digest, read_json, write_signed

FORMATS = ("npy", "tsv")
VERSION = 1  # of the note beside the numbers; one that has none is of the first
DTYPES = ("float32", "float16")  # of numbers in a .npy file; a TSV file's are float32


_SOUND: set[tuple[Any, ...]] = set()  # files that this process went through, as they were then


class FeatureWriter:
    """Appends features to a file that is resumed where it was left.

    folder  where; made if need be
    name    of the file, without its ending
    count   rows that there will be
    dim     numbers a row
    note    plain values for the sidecar: model, layer, normalised, pool, keys, ...; `dtype` float16 halves a .npy file
    form    npy or tsv
    keys    row → its key, which a TSV file needs

    `done` rows are there already; `add` goes on behind them, and writes nothing before. UserError where the file was
    begun, or finished, with another note.
    """

    def __init__(
        self,
        folder: Path | str,
        name: str,
        count: int,
        dim: int,
        note: dict[str, Any],
        form: str = "npy",
        keys: Callable[[int], str] | None = None,
    ) -> None:
        if form not in FORMATS:
            raise UserError(f"features are not written as '{form}'; choose from {', '.join(FORMATS)}")
        if form == "tsv" and keys is None:
            raise ValueError("a TSV file of features needs keys")
        self.path = Path(folder) / f"{name}.{form}"
        self.count, self.dim, self.form, self.keys = count, dim, form, keys
        dtype = note.get("dtype", "float32") if form == "npy" else "float32"
        self.dtype = np.dtype(dtype).newbyteorder("<")
        made = {"format": form, "dtype": dtype, "dim": dim, "count": count}
        self.note = json.loads(json.dumps(note | made))
        self.part = self.path.with_name(f"{name}.unfinished.{form}")
        self._sidecar, self._state = self.path.with_suffix(".json"), self.part.with_suffix(".json")
        self._file: BinaryIO | None = None
        self.bad: set[int] = set()
        self.done = 0
        if not self._finished():
            self._resume()

    def add(self, rows: np.ndarray | Tensor, bad: Sequence[int] = ()) -> None:
        """Append features (n, dim); they are on their way to the disk when this returns.

        bad  which of them, counted from 0 here, are of items that could not be decoded: they should be zeros
        """
        rows = np.asarray(rows.detach().cpu() if isinstance(rows, Tensor) else rows, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.dim or self.done + len(rows) > self.count:
            raise ValueError(f"{rows.shape} is not some rows of {self.dim}, {self.count - self.done} at most")
        with np.errstate(over="ignore"):
            finite = np.isfinite(rows.astype(self.dtype)).all(axis=1)
        if not finite.all():
            row = self.done + int(np.flatnonzero(~finite)[0])
            raise RunError(f"row {row} of the features for {self.path} is not finite as {self.dtype.name}")
        if self._file is None:
            self._begin()
        if len(bad):  # first, so that a row that is there is also known to be bad
            self.bad |= {self.done + int(place) for place in bad}
            self._save_state()
        self._file.write(self._encoded(rows))
        self._file.flush()
        self.done += len(rows)

    def finish(self) -> Path:
        """Give the file its name and write the sidecar; the file's path."""
        if self.done != self.count:
            raise ValueError(f"{self.done} of {self.count} rows of {self.path} are written")
        if not self._sidecar.is_file():
            if self.part.is_file():
                os.fsync(self._file.fileno())
                self.close()
                if self.form == "tsv":
                    _write_index(self.part, self.path.with_suffix(".lineidx"))
                os.replace(self.part, self.path)
            write_signed(
                self._sidecar,
                {"version": VERSION} | self.note | {"digest": file_digest(self.path), "bad": sorted(self.bad)},
            )
        self._state.unlink(missing_ok=True)
        return self.path

    def close(self) -> None:
        """Leave the file as it is, to be resumed."""
        if self._file is not None:
            self._file.close()

    def _finished(self) -> bool:
        if not (self.path.is_file() and self._sidecar.is_file()):
            return False
        found = _read_note(self.path)
        self._refuse_another(
            self._sidecar, {name: found[name] for name in found if name not in ("version", "digest", "bad")}
        )
        _check_digest(self.path, found, "features")
        self.bad, self.done = set(found.get("bad", ())), self.count
        return True

    def _resume(self) -> None:
        """Open the unfinished file behind its last whole row."""
        begun, whole = self.part.is_file(), self.path.is_file()
        if not self._state.is_file() or not (begun or whole):
            return  # `add` begins
        state = read_json(self._state, "note on unfinished features")
        if not isinstance(state, dict) or not isinstance(state.get("note"), dict) or not _are_rows(state.get("bad")):
            raise UserError(f"{self._state} is no note on features; remove {self.part.stem}.* to begin them anew")
        self._refuse_another(self._state, state["note"])
        self.done, size = self._whole_rows() if begun else (self.count, 0)  # else killed just before the sidecar
        self.bad = {row for row in state["bad"] if row < self.done}
        if begun:
            os.truncate(self.part, size)
            self._file = open(self.part, "ab")  # noqa: SIM115

    def _begin(self) -> None:
        self._sidecar.unlink(missing_ok=True)  # of a file that is gone
        with atomic(self.part) as temporary, open(temporary, "wb") as file:
            if self.form == "npy":
                header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count, self.dim)}
                np.lib.format.write_array_header_1_0(file, header)
        self._save_state()
        self._file = open(self.part, "ab")  # noqa: SIM115

    def _whole_rows(self) -> tuple[int, int]:
        """Rows that are there, and the bytes up to the last one's end."""
        if self.form == "tsv":
            ends = line_ends(ByteFile(self.part, "unfinished features"))
            return len(ends), int(ends[-1]) if len(ends) else 0
        with open(self.part, "rb") as file:
            try:
                np.lib.format.read_magic(file)
                header = np.lib.format.read_array_header_1_0(file)
            except ValueError:
                header = None
            start = file.tell()
        if header != ((self.count, self.dim), False, self.dtype):
            raise UserError(f"unfinished features {self.part} are damaged; restore them, or remove it to begin anew")
        width = self.dim * self.dtype.itemsize
        done = min(self.count, (self.part.stat().st_size - start) // width)
        return done, start + done * width

    def _encoded(self, rows: np.ndarray) -> bytes:
        if self.form == "npy":
            return rows.astype(self.dtype).tobytes()
        lines = (record(self.keys(self.done + i), vector_payload(row), self.path) for i, row in enumerate(rows))
        return b"".join(lines)

    def _save_state(self) -> None:
        write_signed(self._state, {"note": self.note, "bad": sorted(self.bad)})

    def _refuse_another(self, path: Path, note: dict[str, Any]) -> None:
        for name in sorted(self.note.keys() | note.keys()):
            if note.get(name) != self.note.get(name):
                raise UserError(
                    f"{path} is of other features: its {name} is {_shown(note.get(name))}, now it is "
                    f"{_shown(self.note.get(name))}; choose another folder, or remove {self.path.stem}.* in this one"
                )


class Features(Chain):
    """Features of many items, in one file or in several end to end.

    dim   numbers a row
    note  the first file's sidecar; empty where there is none
    bad   rows of items that could not be decoded

    UserError for files that are none, are not what their sidecars say, or differ in width.
    """

    def __init__(self, paths: Sequence[Path | str], what: str = "features") -> None:
        super().__init__([_open(Path(path), what) for path in paths], what)
        self.dim, self.note = self.shards[0].dim, self.shards[0].note
        for shard in self.shards:
            if shard.dim != self.dim:
                raise UserError(
                    f"{shard.path} has {shard.dim} numbers a row, and {self.shards[0].path} {self.dim}; "
                    f"{what} are of one network: extract one of them again"
                )
        starts = [0, *self._ends[:-1].tolist()]
        self.bad = frozenset(
            start + row for start, shard in zip(starts, self.shards, strict=True) for row in shard.note.get("bad", ())
        )

    def rows(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Features of these rows, (B, dim) float32."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of {len(self)} {self.what}")
        found = np.empty((len(indices), self.dim), dtype=np.float32)
        owner = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(owner).tolist():
            places = np.flatnonzero(owner == number)
            start = self._ends[number - 1] if number else 0
            found[places] = self.shards[number].rows(indices[places] - start)
        if not np.isfinite(found).all():
            row = int(indices[~np.isfinite(found).all(axis=1)][0])
            raise UserError(f"row {row} of {self.what} {self.name} is not finite; extract the features again")
        return torch.from_numpy(found)

    def fingerprint(self) -> str:
        """A digest of all numbers, by the sidecars, or without them of the keys and of some rows."""
        digests = [shard.note.get("digest") for shard in self.shards]
        return digest(*digests) if all(digests) else super().fingerprint()


class _Array:
    """A .npy file of features."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.note, self.what = path, _read_note(path), what
        try:
            self.array = map_array(path)
        except FileNotFoundError:
            raise UserError(f"no {what} at {path}; correct the path, or run buffer.py") from None
        except (ValueError, EOFError) as error:
            raise UserError(f"{what} {path} cannot be read ({first_line(error)}); extract them again") from None
        if not isinstance(self.array, np.ndarray) or self.array.ndim != 2 or self.array.dtype.kind != "f":
            shape, kind = getattr(self.array, "shape", "?"), getattr(self.array, "dtype", "?")
            raise UserError(f"{path} is an array {shape} of {kind}; {what} are (count, dim) of float32 or float16")
        self.dim = self.array.shape[1]
        _check_note(self, len(self.array))

    def __len__(self) -> int:
        return len(self.array)

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return type(self), (self.path, self.what)  # else all numbers would travel to another process

    def key(self, row: int) -> None:
        return None

    def raw(self, row: int) -> np.ndarray:
        return np.asarray(self.array[row])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        return self.array[indices]


class _Tsv:
    """A TSV file of features."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.note, self.what = path, _read_note(path), what
        self.file = TsvFile(path, what)
        self.dim = len(read_vector(self.file.payload(0), self.file.where(0))) if len(self.file) else 0
        self.key, self.raw = self.file.key, self.file.payload
        _check_note(self, len(self.file))

    def __len__(self) -> int:
        return len(self.file)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        found = np.empty((len(indices), self.dim), dtype=np.float32)
        for place, row in enumerate(indices.tolist()):
            found[place] = self._vector(row)
        return found

    def _vector(self, row: int) -> np.ndarray:
        return read_vector(self.file.payload(row), self.file.where(row), self.dim)


def _open(path: Path, what: str) -> _Array | _Tsv:
    if path.suffix not in (".npy", ".tsv"):
        raise UserError(f"{what} {path} end in neither .npy nor .tsv; name a file of features, or a .list of them")
    check_kept(path, what)
    shard = _Array(path, what) if path.suffix == ".npy" else _Tsv(path, what)
    _check_digest(path, shard.note, what)
    return shard


def _check_digest(path: Path, note: dict[str, Any], what: str) -> None:
    told, now = note.get("digest"), path.stat()
    seen = (str(path.absolute()), now.st_size, now.st_mtime_ns, now.st_ctime_ns, str(told))
    if told is None or seen in _SOUND:
        return
    if file_digest(path) != told:
        raise UserError(
            f"{what} {path} are damaged (not what the digest in {path.with_suffix('.json').name} says); restore it, or "
            "take both away and extract them again with buffer.py"
        )
    _SOUND.add(seen)


def _read_note(path: Path) -> dict[str, Any]:
    sidecar = path.with_suffix(".json")
    note = read_json(sidecar, "note on features") if sidecar.is_file() else {}
    if not isinstance(note, dict) or not _are_rows(note.get("bad", [])):
        raise UserError(f"{sidecar} is no note on features; remove or restore it")
    version = note.get("version", 1)
    if not isinstance(version, int):
        raise UserError(f"{sidecar}: its version is {version!r}, which is no number; remove or restore it")
    check_version(sidecar, version, VERSION)
    return note


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(type(row) is int and row >= 0 for row in value)


def _check_note(shard: _Array | _Tsv, count: int) -> None:
    for name, value in (("count", count), ("dim", shard.dim)):
        if shard.note.get(name, value) != value:
            raise UserError(
                f"{shard.path} has {name} {value}, and its note {shard.path.with_suffix('.json').name} "
                f"{shard.note[name]}; extract the features again"
            )


def _write_index(path: Path, index: Path) -> None:
    starts = np.insert(line_ends(ByteFile(path)), 0, 0)[:-1]
    with atomic(index) as temporary, open(temporary, "w", encoding="ascii", newline="\n") as file:
        for first in range(0, len(starts), 1 << 20):
            file.write("".join(f"{start}\n" for start in starts[first : first + (1 << 20)].tolist()))


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
