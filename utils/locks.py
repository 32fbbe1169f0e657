"""One process at a time in a folder, by a lock that the system takes back when its holder ends, however that comes."""

from __future__ import annotations

import contextlib
import os
import socket
import weakref
from pathlib import Path

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"  # hidden: not a file of the run, and gone when the run ends


class Lock:
    """A folder that is this process's as long as the lock is kept or, in the end, until `release`."""

    def __init__(self, folder: str, handle: int) -> None:
        self.release = weakref.finalize(self, _let_go, folder, handle, os.getpid())


_held: weakref.WeakValueDictionary[str, Lock] = weakref.WeakValueDictionary()


def hold(folder: Path | str, where: str) -> Lock | None:
    """Keep other processes out of a folder; UserError, naming the option `where`, if one is in it.

    Whoever is in there already, as this process or as one that it was forked from, shares that lock. None where the
    disk knows no locks, or takes no file: what comes next will say what is wrong with it.
    """
    key = os.path.realpath(folder)
    if fcntl is None or key in _held:
        return _held.get(key)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        while (handle := _try(Path(folder) / LOCK)) is None:
            pass
    except BlockingIOError:
        raise UserError(
            f"{folder} is being filled by {_holder(Path(folder) / LOCK)}; wait until it ends, or choose another {where}"
        ) from None
    except OSError:
        return None
    _held[key] = lock = Lock(key, handle)
    return lock


def release() -> None:
    """Let go of all that this process holds."""
    for lock in list(_held.values()):
        lock.release()
    _held.clear()


def _let_go(folder: str, handle: int, process: int) -> None:
    if process == os.getpid():  # what a fork has of it is its parent's
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder, LOCK))  # before others may have it, so that it is never theirs
        os.close(handle)


def _try(path: Path) -> int | None:
    """The file, open and locked; None where whoever held it has just removed it. BlockingIOError where it is held."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(path, handle):
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle
    except OSError:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"
