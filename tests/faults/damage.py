"""What can happen to the bytes of a file, and which files there are."""

from __future__ import annotations

import os
import random
from pathlib import Path

KINDS = ("truncate", "zero", "flip")
# What the user brings: a flipped byte in it is other data, which nobody can tell from what was meant.
DATA = ("images/*", "notes/*", "data.npz", "pics/*", "set/*", "texts.txt", "*.tsv", "row.yaml")


def harm(path: Path, kind: str, rng: random.Random) -> str:
    """Damage a file in place; what was done. Half of the time its date does not tell."""
    data, before = bytearray(path.read_bytes()), path.stat()
    at = rng.randrange(len(data))
    if kind == "truncate":
        del data[at:]
        what = f"cut to {at} bytes"
    elif kind == "zero":
        size = min(len(data) - at, rng.choice((1, 16, 512, len(data))))
        data[at : at + size] = bytes(size)
        what = f"{size} bytes zeroed at {at}"
    else:
        places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 1, 4)))]
        for place in places:
            data[place] ^= 1 << rng.randrange(8)
        what = f"bits flipped at {places}"
    path.write_bytes(data)
    if rng.random() < 0.5:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return what


def is_data(name: str) -> bool:
    """Whether a file, by its place in a world, is the user's."""
    return any(Path(name).match(pattern) or name.startswith(pattern.rstrip("*")) for pattern in DATA)


def sort(name: str) -> str:
    """The kind of a file: one of each is as likely to be damaged as one of any other."""
    path = Path(name)
    stem = path.stem.rstrip("0123456789").rstrip("_")
    group = "data" if is_data(name) else "cache" if name.startswith("cache") else "ours"
    if path.suffix in (".json", ".yaml", ".jsonl", ".pt", ".npz", ".npy", ".txt", ".tsv", ".lineidx"):
        stem = stem if len(stem) < 24 else ""
        return f"{group} {stem}{path.suffix}"
    return f"{group} {path.suffix}"


def pick(folder: Path, rng: random.Random) -> str:
    """A file of some bytes below a folder, by its place there."""
    sorts: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not path.is_symlink() and path.stat().st_size and not path.name.endswith(".part"):
            sorts.setdefault(sort(name), []).append(name)
    return rng.choice(sorts[rng.choice(sorted(sorts))])
