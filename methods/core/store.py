"""Expert trajectories on disk: weights of networks trained on the real data, epoch by epoch. A store is a folder:

manifest.json                   format, weight groups (names, shapes), dtype, config, and of each expert its seed,
                                epochs, metrics and, from format 2 on, the SHA-256 of each snapshot file; of one that
                                is finished, also the company it was in (first expert, end)
expert_000/epoch_000.safetensors ...   one flat vector a group; a reader maps only the two snapshots it needs

What else is there while experts train, expert_files.py says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from methods.core.inner import Params
from utils.errors import UserError
from utils.files import check_readable, check_version, file_digest, read_json, save_vectors, write_signed

FORMAT = 2  # 1 had no digests
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Shapes = dict[str, list[tuple[str, list[int]]]]  # group → (parameter name, shape), in the order of the flat vector


@dataclass
class TrajectoryStore:
    """A folder of snapshots that this toolkit wrote; `create` begins one, `open_trajectories` finds one.

    silent   another process writes the manifest, this one only snapshots
    """

    folder: Path
    shapes: Shapes
    dtype: str
    config: dict[str, Any]
    experts: list[dict[str, Any]] = field(default_factory=list)
    version: int = FORMAT
    limit: int | None = None  # only the first so many experts are read
    silent: bool = False
    _kept: dict[tuple[int, int], Params] = field(default_factory=dict, repr=False)
    _sound: set[tuple[int, int]] = field(default_factory=set, repr=False)  # snapshots that were gone through once

    @classmethod
    def create(cls, folder: Path, shapes: Shapes, dtype: str, config: dict[str, Any]) -> TrajectoryStore:
        """A new, empty store. The folder may exist but may not hold a store."""
        if (folder / "manifest.json").exists():
            raise UserError(
                f"{folder} already holds trajectories; --resume goes on with them, or choose another folder"
            )
        store = cls(folder, shapes, dtype, config)
        store._write_manifest()
        return store

    @classmethod
    def begin(
        cls, folder: Path, shapes: Shapes, dtype: str, config: dict[str, Any], resumed: bool, silent: bool = False
    ) -> TrajectoryStore:
        """The store that a run fills: a new one, or where the run goes on, the one that it has begun."""
        if silent:
            return cls(folder, shapes, dtype, config, silent=True)
        if resumed and (folder / "manifest.json").exists():
            return cls.open(folder)
        return cls.create(folder, shapes, dtype, config)

    @classmethod
    def open(cls, folder: Path) -> TrajectoryStore:
        manifest = read_json(folder / "manifest.json", "trajectory manifest")
        try:
            check_version(folder, manifest["version"], FORMAT)
            shapes = {
                group: [(name, [int(size) for size in shape]) for name, shape in parts]
                for group, parts in manifest["shapes"].items()
            }
            experts = [as_entry(expert) for expert in manifest["experts"]]
            return cls(folder, shapes, manifest["dtype"], manifest["config"], experts)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{folder}/manifest.json is damaged ({error!r}); rebuild it with buffer.py") from None

    def add(self, expert: int, epoch: int, params: Params | None, seed: int, metrics: dict[str, float]) -> None:
        """Write the snapshot of an epoch (None: it is not kept), then name it and its metrics in the manifest."""
        entry = self.entry(expert)
        entry["seed"] = seed
        if params is not None:
            kept = {
                group: vector.detach().to("cpu", DTYPES[self.dtype]).contiguous() for group, vector in params.items()
            }
            save_vectors(self._path(expert, epoch), kept, digested=False)
            self._kept.pop((expert, epoch), None)
            self._sound.discard((expert, epoch))
            entry["epochs"] = sorted({*entry["epochs"], epoch})
            entry["digests"][epoch] = file_digest(self._path(expert, epoch))
        if metrics:
            entry["metrics"][epoch] = metrics
        self._write_manifest()

    def entry(self, expert: int) -> dict[str, Any]:
        """What the manifest says of an expert; where it says nothing yet, as of one that has not begun."""
        while expert >= len(self.experts):  # several processes do not begin experts in order
            self.experts.append(as_entry({"seed": 0, "epochs": [], "metrics": {}, "digests": {}, "done": False}))
        return self.experts[expert]

    def finish(self, expert: int, company: range | None = None) -> None:
        """Note that an expert has had all its epochs, side by side with these, or alone."""
        company = company or range(expert, expert + 1)
        self.entry(expert).update(done=True, company=[company.start, company.stop])
        self._write_manifest()

    def read(self, expert: int, epoch: int) -> Params:
        """One snapshot as float32 CPU vectors; the file is memory-mapped, so only its bytes are touched.

        The first time that a process reads a snapshot it goes through all of it: UserError where its bytes are not
        those that were written, or its numbers not finite.
        """
        if kept := self._kept.get((expert, epoch)):
            return {group: vector.to(torch.float32, copy=True) for group, vector in kept.items()}
        with self._open(expert, epoch) as file:
            found = {group: file.get_tensor(group) for group in self.shapes}
            self._go_through(expert, epoch, found)
            return {group: vector.float() for group, vector in found.items()}

    def preload(self) -> None:
        """Copy every snapshot into memory, so that no later reading waits for a disk."""
        for expert in range(self.count):
            for epoch in self.epochs(expert):
                with self._open(expert, epoch) as file:
                    kept = {group: file.get_tensor(group).clone() for group in self.shapes}
                    self._go_through(expert, epoch, kept)
                    self._kept[expert, epoch] = kept

    def check(self, expert: int, epoch: int) -> None:
        """UserError unless the snapshot is there, whole and of the shapes in the manifest; its numbers are not read."""
        with self._open(expert, epoch):
            pass

    def _go_through(self, expert: int, epoch: int, found: Params) -> None:
        if (expert, epoch) in self._sound:
            return
        path, known = self._path(expert, epoch), self.experts[expert]["digests"].get(epoch)
        if known and file_digest(path) != known:
            raise UserError(f"snapshot {path} is damaged (it is not what the manifest's digest says); {self._remedy}")
        for group, vector in found.items():
            if not torch.isfinite(vector.sum(dtype=torch.float64)):
                raise UserError(f"snapshot {path}: its {group} has numbers that are not finite; {self._remedy}")
        self._sound.add((expert, epoch))

    @property
    def _remedy(self) -> str:
        return f"restore it, or make the trajectories in {self.folder} again with buffer.py"

    @contextmanager
    def _open(self, expert: int, epoch: int) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        path, remedy = self._path(expert, epoch), self._remedy
        try:
            check_readable(path)
            with safe_open(path, framework="pt") as file:
                for group, parts in self.shapes.items():
                    if file.get_slice(group).get_shape() != [sum(_numel(shape) for _, shape in parts)]:
                        raise UserError(f"snapshot {path} does not fit its manifest ({group}); {remedy}")
                yield file
        except FileNotFoundError:
            raise UserError(f"snapshot {path} is gone; {remedy}") from None
        except SafetensorError as error:
            raise UserError(f"snapshot {path} is damaged ({error}); {remedy}") from None

    def epochs(self, expert: int) -> list[int]:
        return self.experts[expert]["epochs"]

    @property
    def count(self) -> int:
        return len(self.experts[: self.limit])

    def place(self, expert: int) -> Path:
        """The folder of an expert's snapshots."""
        return self.folder / f"expert_{expert:03d}"

    def _path(self, expert: int, epoch: int) -> Path:
        return self.place(expert) / f"epoch_{epoch:03d}.safetensors"

    def _write_manifest(self) -> None:
        if self.silent:
            return
        write_signed(
            self.folder / "manifest.json",
            {
                "version": self.version,
                "shapes": self.shapes,
                "dtype": self.dtype,
                "config": self.config,
                "experts": self.experts,
            },
        )


def as_entry(found: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of an expert, with numbers where JSON has none."""
    first, end = found.get("company", (0, 0))
    return {
        "seed": int(found["seed"]),
        "epochs": [int(epoch) for epoch in found["epochs"]],
        "metrics": {int(epoch): row for epoch, row in found["metrics"].items()},
        "digests": {int(epoch): str(told) for epoch, told in found.get("digests", {}).items()},
        "done": bool(found["done"]),
    } | ({"company": [int(first), int(end)]} if "company" in found else {})


def _numel(shape: Sequence[int]) -> int:
    return math.prod(shape)
