"""Folders of files whose digests are known: looked at when they are used, and made anew where one is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from utils.errors import UserError
from utils.files import atomic_folder, file_digest, read_json, write_json
from utils.ranks import speaks


def made_folder(folder: Path, write: Callable[[Path], None], what: str) -> Path:
    """A folder that `write` makes: as it was made, by the digests of its files that are kept beside it, or made anew;
    a note says then that `what`."""
    told = _beside(folder)
    there = folder.is_dir()
    if there:
        if not (odd := _odd(folder, told)):
            return folder
        if speaks():
            print(f"note: {odd}; {what}")
    with atomic_folder(folder, once=not there) as temporary:
        write(temporary)
        write_json(told, folder_digests(temporary))  # first: no new folder is ever without
    return folder


def remove_made(folder: Path) -> None:
    """Remove a made folder, if it is there, and its digests."""
    shutil.rmtree(folder, ignore_errors=True)
    _beside(folder).unlink(missing_ok=True)


def folder_digests(folder: Path | str) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its place there."""
    found = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in found}


def check_folder(folder: Path | str, known: dict[str, str], remedy: str) -> None:
    """UserError, that ends with `remedy`, for a file that is not as it was when `folder_digests` looked."""
    if odd := _changed(Path(folder), known):
        raise UserError(f"{odd}; {remedy}")


def _beside(folder: Path) -> Path:
    return folder.with_name(f"digests_of_{folder.name}.json")


def _odd(folder: Path, told: Path) -> str:
    """What is wrong with a folder or its digests; nothing with one that was made when none were kept."""
    try:
        known = read_json(told, "digests of a folder") if told.exists() else {}
    except UserError as error:
        return str(error)
    return _changed(folder, known) if isinstance(known, dict) else f"{told} holds no digests"


def _changed(folder: Path, known: dict[str, str]) -> str:
    for name, told in known.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is gone"
        if file_digest(path) != told:
            return f"{path} is damaged (its digest is another)"
    return ""
