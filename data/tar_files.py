"""Webdataset archives, read at random: a sample is the files of one name, such as 000.jpg and 000.txt.

An archive has no table of its members; it is gone through from header to header, a minute for some millions of them.
What was found is kept in the cache, under the archive's path, size and time.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from data.byte_files import ByteFile
from utils.arrays import unpack_array
from utils.errors import UserError, first_line
from utils.files import atomic, digest
from utils.parsing import is_below

_VERSION = 2  # of the files in the cache
_FEW = 1000  # members: going through so few takes no longer than to look for what is known


class TarFile:
    """The members of a .tar that end in one of `endings`, by row in the archive's order.

    endings  lower case without the dot, such as jpg: what follows the first dot of a member's own name
    what     the name of such members in messages
    cache    folder where the places of many members are remembered

    UserError for archives that are missing, compressed, damaged or truncated, and for such members that are links or
    devices or have a name that leads elsewhere. Nothing is ever unpacked.
    """

    def __init__(self, path: Path | str, endings: Collection[str], what: str, cache: Path | str = "") -> None:
        self.path = Path(path)
        self.file = ByteFile(path, f"archive of {what}")
        info = os.stat(path)
        name = digest(_VERSION, str(self.path.absolute()), info.st_size, info.st_mtime_ns, sorted(endings))
        known = Path(cache) / "archives" / f"{name[:32]}.npz" if cache else None
        recalled = _recalled(known) if known else None
        self.names, self.places = recalled or _members(path, endings)
        if known and not recalled and len(self.names) >= _FEW:
            with atomic(known) as temporary, open(temporary, "wb") as file:
                np.savez(file, names=np.frombuffer(_joined(self.names), dtype=np.uint8), places=self.places)

    def __len__(self) -> int:
        return len(self.names)

    def key(self, row: int) -> str:
        """A member's path without its ending."""
        return self.names[row]

    def raw(self, row: int) -> bytes:
        """A member's content."""
        offset, size = self.places[row].tolist()
        return self.file.at(offset, size)


def split_name(name: str) -> tuple[str, str]:
    """A sample's key and the ending of one of its files: `a/0.seg.png` → `a/0`, `seg.png`."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _members(path: Path | str, endings: Collection[str]) -> tuple[list[str], np.ndarray]:
    """Keys, and places (n, 2) int64: offset and size of their content."""
    names, places = [], []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.size < 0:  # the next would be this one, or one before it, without end
                    raise tarfile.ReadError(f"its member {member.name!r} claims {member.size} bytes")
                key, ending = split_name(member.name)
                if ending in endings and not member.isdir():
                    _check(member, path)
                    names.append(key)
                    places.append((member.offset_data, member.size))
                archive.members.clear()  # each would stay in memory, half a kilobyte
    except (OSError, UserError):
        raise
    except Exception as error:  # tarfile's own, and half a dozen kinds for what headers should not say
        raise UserError(
            f"archive {path} cannot be read ({first_line(error)}); it must be a whole .tar that is not compressed"
        ) from None
    return names, np.array(places, dtype=np.int64).reshape(-1, 2)


def _check(member: tarfile.TarInfo, path: Path | str) -> None:
    """UserError for a member without content of its own, or a name that would lead out of a folder."""
    where = f"archive {path}: its member {member.name!r}"
    if not is_below(member.name):
        raise UserError(f"{where} has a name that leads elsewhere; pack it again by names below one folder")
    if member.issym() or member.islnk():
        raise UserError(f"{where} is a link to {member.linkname!r}; pack it again with files in place of links")
    if not member.isreg() or member.issparse():
        raise UserError(f"{where} is no plain file; pack it again without it")


def _recalled(known: Path) -> tuple[list[str], np.ndarray] | None:
    try:
        with np.load(known, allow_pickle=False) as found:
            names, places = bytes(unpack_array(found, "names")), unpack_array(found, "places")
    except (FileNotFoundError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    return os.fsdecode(names).split("\0"), places


def _joined(names: list[str]) -> bytes:
    return os.fsencode("\0".join(names))  # no name has a NUL
