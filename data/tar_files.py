"""Webdataset archives, read at random: a sample is the files of one name, such as 000.jpg and 000.txt."""

from __future__ import annotations

import tarfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from data.byte_files import ByteFile
from utils.errors import UserError


class TarFile:
    """The members of a .tar that end in one of `endings`, by row in the archive's order; indexed once, by its headers.

    endings  lower case without the dot, such as jpg: what follows the first dot of a member's own name
    what     the name of such members in messages

    UserError for archives that are missing, compressed, damaged or truncated.
    """

    def __init__(self, path: Path | str, endings: Collection[str], what: str) -> None:
        self.path = Path(path)
        self.file = ByteFile(path, f"archive of {what}")
        self.names, places = [], []
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    key, ending = split_name(member.name)
                    if member.isreg() and not member.issparse() and ending in endings:
                        self.names.append(key)
                        places.append((member.offset_data, member.size))
                        archive.members.clear()  # each would stay in memory, half a kilobyte
        except (tarfile.TarError, EOFError) as error:
            raise UserError(
                f"archive {path} cannot be read ({error}); it must be a whole .tar that is not compressed"
            ) from None
        self.places = np.array(places, dtype=np.int64).reshape(-1, 2)

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
