"""Files read at given places, by many threads and processes at once, and where their lines end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError

_BLOCK = 16 << 20  # bytes read at once where a whole file is gone through
LF, CR, TAB = b"\n"[0], b"\r"[0], b"\t"[0]


class ByteFile:
    """A file's bytes at any offset.

    `os.pread` takes the place as an argument and moves no shared position, so that one descriptor serves every thread,
    and a forked process goes on with the one it inherited. A spawned one opens the file anew.

    UserError, naming the file as `what`, where there is none.
    """

    def __init__(self, path: Path | str, what: str = "file") -> None:
        self.path, self.what = Path(path), what
        self._open()

    def _open(self) -> None:
        self._descriptor = -1
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"no {self.what} at {self.path}; correct the path, or fetch the file again") from None
        if self.path.is_dir():
            raise UserError(f"{self.what} {self.path} is a folder; name a file in it")
        self.size = os.fstat(self._descriptor).st_size

    def at(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; UserError where the file has become shorter than that."""
        content = os.pread(self._descriptor, length, offset)
        while len(content) < length:  # some file systems, and Linux beyond 2 GiB, give a part at a time
            more = os.pread(self._descriptor, length - len(content), offset + len(content))
            if not more:
                raise UserError(f"{self.what} {self.path} became shorter while it was read; fetch it again")
            content += more
        return content

    def blocks(self, start: int = 0) -> Iterator[np.ndarray]:
        """All bytes from `start` on, (n,) uint8, some millions at a time."""
        for offset in range(start, self.size, _BLOCK):
            yield np.frombuffer(self.at(offset, min(_BLOCK, self.size - offset)), dtype=np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "what": self.what}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.what = state["path"], state["what"]
        self._open()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)


def line_ends(file: ByteFile) -> np.ndarray:
    """The offset right behind each LF, (n,) int64. Nothing else ends a line; the last is the size of a whole file."""
    found, offset = [np.empty(0, dtype=np.int64)], 0
    for block in file.blocks():
        found.append(np.flatnonzero(block == LF) + (offset + 1))
        offset += len(block)
    return np.concatenate(found)
