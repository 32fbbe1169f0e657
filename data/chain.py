"""Several files read as one, row after row, and what tells whether two such chains belong together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import digest
from utils.rng import generator

ALL_KEYS = 100_000  # up to so many rows every key counts, beyond the first, the last and a sample
_SAMPLED_KEYS = 1_000
_SAMPLED_ROWS = 64  # whose content is in a fingerprint


class Shard(Protocol):
    """One file (or folder) of rows."""

    path: Path

    def __len__(self) -> int: ...

    def key(self, row: int) -> str | None:
        """What the file calls a row; None where it calls it nothing."""

    def raw(self, row: int) -> Any:
        """A row's content as stored: bytes or an array, for fingerprints."""


class Chain:
    """Shards end to end; row 0 is the first one's first.

    what  the name of such rows in messages, such as images
    """

    def __init__(self, shards: Sequence[Shard], what: str) -> None:
        self.shards, self.what = tuple(shards), what
        self._ends = np.array(list(accumulate(len(shard) for shard in shards)), dtype=np.int64)
        if not len(self):
            raise UserError(f"there are no {what} in {self.name}; name a file or folder that has some")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def name(self) -> str:
        """The first file, and how many others there are."""
        more = f" and {len(self.shards) - 1} more" if len(self.shards) > 1 else ""
        return f"{self.shards[0].path}{more}" if self.shards else "an empty list"

    @property
    def counts(self) -> list[int]:
        """Rows of each shard."""
        return [len(shard) for shard in self.shards]

    def find(self, row: int) -> tuple[Any, int]:
        """The shard that has a row, and which of its rows that is."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} {self.what}")
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self.shards[number], row - int(self._ends[number - 1] if number else 0)

    def key(self, row: int) -> str | None:
        """What the file of a row calls it; None where it calls it nothing."""
        shard, inner = self.find(row)
        return shard.key(inner)

    def where(self, row: int) -> str:
        """A row's key and its file, for messages."""
        shard, inner = self.find(row)
        return f"{shard.key(inner)} of {shard.path}"

    def keys_digest(self) -> str:
        """A digest of the number of rows and of their keys: of all up to 100,000, else of the first, the last and a
        sample of 1,000, always the same."""
        return self._keys_digest

    @cached_property
    def _keys_digest(self) -> str:
        return digest(len(self), [self.key(row) for row in sampled(len(self))])

    def fingerprint(self) -> str:
        """A digest of the keys and of the content of 64 rows. It tells pools apart without reading gigabytes, and is no
        proof against a changed image among millions."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        rows = sampled(len(self), _SAMPLED_ROWS, _SAMPLED_ROWS)
        found = (self.find(row) for row in rows)
        return digest(self.what, self.counts, self.keys_digest(), *(shard.raw(inner) for shard, inner in found))


def sampled(count: int, every: int = ALL_KEYS, sample: int = _SAMPLED_KEYS) -> list[int]:
    """All rows where there are up to `every`, else the first, the last and `sample` others, always the same; sorted."""
    if count <= every:
        return list(range(count))
    some: Tensor = torch.randint(count, (sample,), generator=generator(0, "sampled rows", count))
    return sorted({0, count - 1, *some.tolist()})
