"""Files that are written whole or not at all, and read without running anything."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import UserError
from utils.parsing import parse_json
from utils.records import Damaged, check_records, check_tensors

VECTORS = 1  # the format that `save_vectors` notes
_CHECKSUM = "checksum"  # of all else in a JSON file
# What is half-written; from 0.8 on, safetensors writes beside the file that it is given, under a name of its own.
_LEFTOVERS = (".*.part", ".tmp??????")


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well and removed when it does not.

    Parents are made. The data is synced before the move and the folder after it, so a crash leaves the old file or the
    new one, and after the block the new one. A disk that is full raises OSError, whatever the library that writes
    inside the block makes of it.
    """
    path = Path(path)
    _make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a result should be as readable as any other file here.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except Exception as error:
        if not isinstance(error, OSError) or error.errno is None:
            _ask_disk(temporary)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str, once: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`, moved onto it when the block ends well and removed when it does not.

    once   leave a folder that another process has put there meanwhile; else one that is there is replaced
    Parents are made. To replace takes two moves: a crash between them leaves no folder, never half of one. A disk that
    is full raises OSError, whatever the library that writes inside the block makes of it.
    """
    path = Path(path)
    _make_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()  # unlike mkdtemp's own, as readable as any other folder here
        yield new
        for file in (new, *new.rglob("*")):
            if file.is_dir():
                _sync_folder(file)
            elif file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        if path.exists() and not once:
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if not (once and path.is_dir()):
                raise
        _sync_folder(path.parent)
    except Exception as error:
        if not isinstance(error, OSError) or error.errno is None:
            _ask_disk(temporary / "room")
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, so that a crash does not lose what is written there together with its name."""
    new = [place for place in (folder, *folder.parents) if not place.exists()] if not folder.is_dir() else []
    folder.mkdir(parents=True, exist_ok=True)
    for place in new:
        _sync_folder(place.parent)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk; where folders cannot be synced (Windows, some network disks) the system
    does it in its own time."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def sweep(folder: Path | str) -> None:
    """Remove what a killed `atomic` or `atomic_folder` left half-written in a folder and in those right below it."""
    for pattern in _LEFTOVERS:
        for leftover in (*Path(folder).glob(pattern), *Path(folder).glob(f"*/{pattern}")):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` (UTF-8), whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, sort_keys=False) + "\n")


def write_signed(path: Path | str, tree: dict[str, Any]) -> None:
    """A JSON file of keys and values with the checksum that `read_json` looks at, in a line that can be dropped."""
    write_json(path, {_CHECKSUM: _checksum(tree)} | tree)


def read_json(path: Path | str, what: str) -> Any:
    """The value in a JSON file; UserError naming `what` when it is missing, malformed, or not as it was signed."""
    try:
        found = parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {what} at {path}") from None
    except ValueError as error:
        raise UserError(f"{what} {path} is not valid JSON ({error}); restore or fetch it again") from None
    if isinstance(found, dict) and _CHECKSUM in found and found.pop(_CHECKSUM) != _checksum(found):
        raise UserError(
            f"{what} {path} is damaged (its checksum is another); restore it, or drop the line of the checksum to use "
            "it as it is"
        )
    return found


def _checksum(tree: dict[str, Any]) -> str:
    return digest(json.loads(json.dumps(tree)))  # keys that are numbers are texts in a file, and sorted as such


def check_kept(path: Path, what: str) -> None:
    """UserError for a pipe or a device, which is read once, in order, and waits for whoever writes; `what` names it."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{what} {path} are no file but a pipe or a device; write them to a file, for any row is read")


def check_version(path: Path | str, version: Any, known: int) -> None:
    """UserError for a file or folder of a newer format than `known`, the newest that is read here; TypeError where its
    version is no number."""
    if version > known:
        raise UserError(f"{path} is of format {version}, newer than this {known}; update the toolkit")


def check_written(path: Path | str, found: Any, known: int, names: Sequence[str], told: str, remedy: str) -> None:
    """UserError for what was read from `path` if its `format` is newer than `known`, or it lacks one of these entries;
    then it says `told`, why, and `remedy`."""
    try:
        check_version(path, found.get("format", 1), known)
        for name in names:
            found[name]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{told} ({error!r}); {remedy}") from None


def save_tensors(path: Path | str, state: dict[str, Any]) -> None:
    """`torch.save` of tensors and plain values, whole or not at all."""
    # Into an open file: given a name, PyTorch 2.8 does not tell that the disk was full when it closes it.
    with atomic(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def save_vectors(path: Path | str, vectors: dict[str, torch.Tensor], digested: bool = True) -> None:
    """A `.safetensors` file of contiguous CPU tensors, whole or not at all.

    digested   with a digest for `load_vectors`; False where something else tells what the file holds
    """
    from safetensors.torch import save_file

    # One entry: safetensors writes several in an order that changes from file to file, and files must not.
    note = {"vectors": f"{VECTORS} {_vectors_digest(vectors)}"} if digested else None
    with atomic(path) as temporary:
        save_file(vectors, temporary, note)


def load_vectors(path: Path | str, what: str, remedy: str) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` file; where `save_vectors` noted their digest, they are those that it saved.

    UserError naming `what` where it is missing or damaged, and then `remedy`, what can be done about it.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"no {what} at {path}; {remedy}")
    check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            note, vectors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        number, _, told = note.get("vectors", f"{VECTORS} ").partition(" ")
        version = int(number)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"{what} {path} cannot be read ({' '.join(str(error).split())}); {remedy}") from None
    check_version(path, version, VECTORS)
    if told not in ("", _vectors_digest(vectors)):
        raise UserError(f"{what} {path} cannot be read (it is not what its digest says); {remedy}")
    return vectors


def check_readable(path: Path | str) -> None:
    """OSError, with the path, where a file may not be read; what maps files says that there are none, or less."""
    with open(path, "rb"):
        pass


def _vectors_digest(vectors: dict[str, torch.Tensor]) -> str:
    """Of names, kinds, shapes and bytes; numpy lacks some kinds."""
    parts: list[Any] = []
    for name in sorted(vectors):
        tensor = vectors[name]
        parts += [[name, str(tensor.dtype), list(tensor.shape)], tensor.contiguous().view(-1).view(torch.uint8)]
    return digest(*parts)


def _ask_disk(path: Path) -> None:
    """Raise the OSError that a library has put in words of its own (torch, numpy and safetensors do), by a plain write
    to the same file."""
    with open(path, "ab") as file:
        file.write(b"\0" * (1 << 20))
        os.fsync(file.fileno())


def load_tensors(
    path: Path | str, what: str, mmap: bool = False, remedy: str = "it is damaged or not a tensor file"
) -> Any:
    """The tensors and plain values of a `torch.save` file, on the CPU. No pickled code is ever run.

    mmap   leave the numbers in the file until they are looked at; its checksums then are the caller's to look at

    UserError naming `what` when the file is missing, damaged, or holds anything but tensors and plain values, and then
    `remedy`, what can be done about it.
    """
    if not Path(path).is_file():
        raise UserError(f"no {what} at {path}")
    try:
        if not mmap:
            check_records(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sparse tensors, which are refused
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
        check_tensors(found)
        return found
    except Damaged as error:
        raise UserError(f"{what} {path} cannot be read ({error}); {remedy}") from None
    except Exception as error:  # torch raises a dozen kinds for a damaged file, a nameless OSError among them
        if isinstance(error, OSError) and error.filename:
            raise
        # The first sentence: torch goes on to advise a way that would run whatever is in the file.
        reason = str(error).strip().splitlines()[0].split(". ")[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{what} {path} cannot be read ({reason}); {remedy}") from None


def digest(*parts: Any) -> str:
    """A SHA-256 (64 hex digits) of strings, bytes, arrays, tensors and JSON-able values, in order and unambiguous."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous().numpy()
        if isinstance(part, np.ndarray):
            total.update(f"array {part.dtype} {part.shape};".encode())
            total.update(np.ascontiguousarray(part).data)
            continue
        kind = "bytes"
        if not isinstance(part, bytes):
            kind, part = "json", json.dumps(part, sort_keys=True).encode()
        total.update(f"{kind} {len(part)};".encode())
        total.update(part)
    return total.hexdigest()


def file_digest(path: Path | str) -> str:
    """The SHA-256 of a file's bytes."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()
