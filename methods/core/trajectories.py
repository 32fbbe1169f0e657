"""Expert trajectories: weights of networks trained on the real data, epoch by epoch, and how closely a student follows.

A store is a folder:

    manifest.json                   format, weight groups (names, shapes), dtype, config, and of each expert its seed,
                                    epochs and metrics
    expert_000/epoch_000.safetensors ...   one flat vector a group; a reader maps only the two snapshots it needs

The folders published by MTT and VLDD (`*replay_buffer_<n>.pt`) are read too: `published.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.core.inner import Params
from methods.core.published import PublishedTrajectories, published_name, published_numbers
from utils.errors import UserError
from utils.files import digest, read_json, save_vectors, write_json

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Shapes = dict[str, list[tuple[str, list[int]]]]  # group → (parameter name, shape), in the order of the flat vector


@dataclass(frozen=True)
class Segment:
    """A piece of an expert's way: where the student starts and where it should arrive."""

    start: Params
    target: Params
    epoch: int
    expert: int


def gaps(final: Params, segment: Segment) -> Params:
    """Per group ‖final − target‖² / ‖start − target‖²: 0 on the target, 1 where the student is no closer than it began.

    Source: MTT (Cazenavette et al., CVPR 2022), eq. 2; VLDD takes one such term a tower.
    """
    result = {}
    for group, target in segment.target.items():
        travelled = (segment.start[group] - target).square().sum()
        result[group] = (final[group] - target).square().sum() / travelled
    return result


def matching_loss(final: Params, segment: Segment) -> tuple[Tensor, Params]:
    """The sum over the groups of their `gaps`, and the gaps."""
    branches = gaps(final, segment)
    return torch.stack(list(branches.values())).sum(), branches


@dataclass
class TrajectoryStore:
    """A folder of snapshots that this toolkit wrote; `create` begins one, `open_trajectories` finds one."""

    folder: Path
    shapes: Shapes
    dtype: str
    config: dict[str, Any]
    experts: list[dict[str, Any]] = field(default_factory=list)
    version: int = FORMAT
    limit: int | None = None  # only the first so many experts are read
    _kept: dict[tuple[int, int], Params] = field(default_factory=dict, repr=False)

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
    def begin(cls, folder: Path, shapes: Shapes, dtype: str, config: dict[str, Any], resumed: bool) -> TrajectoryStore:
        """The store that a run fills: a new one, or where the run goes on, the one that it has begun."""
        if resumed and (folder / "manifest.json").exists():
            return cls.open(folder)
        return cls.create(folder, shapes, dtype, config)

    @classmethod
    def open(cls, folder: Path) -> TrajectoryStore:
        manifest = read_json(folder / "manifest.json", "trajectory manifest")
        try:
            if manifest["version"] > FORMAT:
                raise UserError(
                    f"{folder} is of format {manifest['version']}, newer than this {FORMAT}; update the toolkit"
                )
            shapes = {
                group: [(name, list(shape)) for name, shape in parts] for group, parts in manifest["shapes"].items()
            }
            experts = [
                {
                    "seed": int(expert["seed"]),
                    "epochs": [int(epoch) for epoch in expert["epochs"]],
                    "metrics": {int(epoch): row for epoch, row in expert["metrics"].items()},
                    "done": bool(expert["done"]),
                }
                for expert in manifest["experts"]
            ]
            return cls(folder, shapes, manifest["dtype"], manifest["config"], experts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder}/manifest.json is damaged ({error!r}); rebuild it with buffer.py") from None

    def add(self, expert: int, epoch: int, params: Params | None, seed: int, metrics: dict[str, float]) -> None:
        """Write the snapshot of an epoch (None: it is not kept), then name it and its metrics in the manifest."""
        if expert == len(self.experts):
            self.experts.append({"seed": seed, "epochs": [], "metrics": {}, "done": False})
        entry = self.experts[expert]
        if params is not None:
            kept = {
                group: vector.detach().to("cpu", DTYPES[self.dtype]).contiguous() for group, vector in params.items()
            }
            save_vectors(self._path(expert, epoch), kept)
            self._kept.pop((expert, epoch), None)
            entry["epochs"] = sorted({*entry["epochs"], epoch})
        if metrics:
            entry["metrics"][epoch] = metrics
        self._write_manifest()

    def finish(self, expert: int) -> None:
        """Note that an expert has had all its epochs."""
        self.experts[expert]["done"] = True
        self._write_manifest()

    def read(self, expert: int, epoch: int) -> Params:
        """One snapshot as float32 CPU vectors; the file is memory-mapped, so only its bytes are touched."""
        if kept := self._kept.get((expert, epoch)):
            return {group: vector.to(torch.float32, copy=True) for group, vector in kept.items()}
        with self._open(expert, epoch) as file:
            return {group: file.get_tensor(group).float() for group in self.shapes}

    def preload(self) -> None:
        """Copy every snapshot into memory, so that no later reading waits for a disk."""
        for expert in range(self.count):
            for epoch in self.epochs(expert):
                with self._open(expert, epoch) as file:
                    self._kept[expert, epoch] = {group: file.get_tensor(group).clone() for group in self.shapes}

    def check(self, expert: int, epoch: int) -> None:
        """UserError unless the snapshot is there, whole and of the shapes in the manifest; its numbers are not read."""
        with self._open(expert, epoch):
            pass

    @contextmanager
    def _open(self, expert: int, epoch: int) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        path = self._path(expert, epoch)
        remedy = f"restore it, or make the trajectories in {self.folder} again with buffer.py"
        try:
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

    def _path(self, expert: int, epoch: int) -> Path:
        return self.folder / f"expert_{expert:03d}" / f"epoch_{epoch:03d}.safetensors"

    def _write_manifest(self) -> None:
        write_json(
            self.folder / "manifest.json",
            {
                "version": self.version,
                "shapes": self.shapes,
                "dtype": self.dtype,
                "config": self.config,
                "experts": self.experts,
            },
        )


Trajectories = TrajectoryStore | PublishedTrajectories


def open_trajectories(
    folder: Path | str,
    groups: Sequence[str],
    below: Sequence[str] = (),
    max_files: int | None = None,
    max_experts: int | None = None,
) -> Trajectories:
    """The trajectories in `folder`, or in the first of the sub-folders `below` that has any.

    max_files     of replay buffers, only the first so many
    max_experts   only the first so many experts, of replay buffers in each file

    UserError says where it looked. A pattern such as `flickr/nfnet_bert/*` among `below` stands for its first match.
    """
    root = Path(folder)
    places = [root, *(match for pattern in below for match in sorted(root.glob(pattern)))]
    for place in places:
        if (place / "manifest.json").is_file():
            if max_files is not None:
                raise UserError(
                    f"{place} holds trajectories of buffer.py, no replay buffers; max_files {max_files} means nothing "
                    "there, max_experts limits them"
                )
            store = TrajectoryStore.open(place)
            store.limit = max_experts
            return store
        if place.is_dir() and any(True for _ in published_numbers(place, groups[0])):
            return PublishedTrajectories(place, groups, max_files, max_experts)
    looked = f"manifest.json or {published_name(groups[0], '*')}, here and in {', '.join(below) or 'nothing else'}"
    raise UserError(f"no trajectories in {root} (looked for {looked}); run buffer.py first")


def trajectories_digest(store: Trajectories) -> str:
    """A name for these experts, wherever they lie and however many have joined: the first steps of the first."""
    return digest(*(vector for epoch in store.epochs(0)[:2] for vector in store.read(0, epoch).values()))


def check_trajectories(
    store: Trajectories, shapes: Shapes, max_start_epoch: int, expert_epochs: int, min_start_epoch: int = 0
) -> None:
    """UserError unless the store is of networks with these `shapes`, long enough for every start epoch, and whole."""
    if min_start_epoch >= max_start_epoch:
        raise UserError(f"min_start_epoch {min_start_epoch} leaves no epoch below max_start_epoch {max_start_epoch}")
    for group, wanted in shapes.items():
        if group not in store.shapes:
            raise UserError(f"{store.folder} records {' and '.join(store.shapes)}, not the group {group}")
        found = store.shapes[group]
        for (name, shape), (other, size) in zip(wanted, found, strict=False):
            if list(shape) != list(size) or (other and other != name):
                raise UserError(
                    f"{store.folder} is of another network: {group} has {other or 'a weight'} {list(size)} where "
                    f"{name} {list(shape)} is needed; use the network and sizes that buffer.py had"
                )
        if len(wanted) != len(found):
            raise UserError(
                f"{store.folder} is of another network: {group} has {len(found)} weights, {len(wanted)} are needed"
            )
    needed = _needed(min_start_epoch, max_start_epoch, expert_epochs)
    usable = _usable(store, needed)
    for expert in usable:
        for epoch in sorted(needed):
            store.check(expert, epoch)
    if usable:
        return
    kept = store.epochs(0) if store.count else []
    raise UserError(
        f"max_start_epoch {max_start_epoch} + expert_epochs {expert_epochs} need epochs up to "
        f"{max_start_epoch - 1 + expert_epochs}, but the experts in {store.folder} keep {kept or 'none'}; "
        "lower them or train longer experts"
    )


def sample_segment(
    store: Trajectories,
    rng: torch.Generator,
    max_start_epoch: int,
    expert_epochs: int,
    device: torch.device,
    min_start_epoch: int = 0,
) -> Segment:
    """A random expert and start epoch s, `min_start_epoch` ≤ s < `max_start_epoch`; the target is the same expert at
    s + `expert_epochs`. DATM moves this window while it learns."""
    usable = _usable(store, _needed(min_start_epoch, max_start_epoch, expert_epochs))
    expert = usable[int(torch.randint(len(usable), (), generator=rng))]
    epoch = int(torch.randint(min_start_epoch, max_start_epoch, (), generator=rng))
    start, target = store.read(expert, epoch), store.read(expert, epoch + expert_epochs)
    for group in start:
        if torch.equal(start[group], target[group]):
            raise UserError(
                f"expert {expert} of {store.folder} did not move from epoch {epoch}; train it at a higher rate"
            )
    return Segment(_to(start, device), _to(target, device), epoch, expert)


def _usable(store: Trajectories, needed: set[int]) -> list[int]:
    return [expert for expert in range(store.count) if needed <= set(store.epochs(expert))]


def _needed(min_start_epoch: int, max_start_epoch: int, expert_epochs: int) -> set[int]:
    return {epoch for start in range(min_start_epoch, max_start_epoch) for epoch in (start, start + expert_epochs)}


def _numel(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _to(params: Params, device: torch.device) -> Params:
    return {group: vector.to(device) for group, vector in params.items()}
