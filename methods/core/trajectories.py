"""Expert trajectories: weights of networks trained on the real data, epoch by epoch, and how closely a student follows.

A store is a folder:

    manifest.json                   format, weight groups (names, shapes), dtype, config, and of each expert its seed,
                                    epochs and metrics
    expert_000/epoch_000.safetensors ...   one flat vector a group; a reader maps only the two snapshots it needs

The folders published by MTT and VLDD (`*replay_buffer_<n>.pt`) are read too, without running any pickled code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.core.inner import Params
from utils.errors import UserError
from utils.files import load_tensors, read_json, save_tensors, save_vectors, write_json

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
        with self._open(expert, epoch) as file:
            return {group: file.get_tensor(group).float() for group in self.shapes}

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
        return len(self.experts)

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


class PublishedTrajectories:
    """The folders of MTT and VLDD: `<group>_replay_buffer_<n>.pt`, a list of experts, each a list of epochs, each a
    list of tensors in `parameters()` order. Nothing names the parameters, so only their shapes can be checked."""

    def __init__(self, folder: Path, groups: Sequence[str]) -> None:
        self.folder = folder
        # Image and text files are paired by their number, never by the order in which the folder lists them.
        numbers = set.intersection(*({int(n) for n in _numbers(folder, group)} for group in groups))
        if not numbers:
            raise UserError(f"{folder} has no replay buffers that share a number for {' and '.join(groups)}")
        self._experts: list[dict[str, list[list[Tensor]]]] = []
        for number in sorted(numbers):
            files = {group: _read_published(folder / _published_name(group, number)) for group in groups}
            counts = {len(experts) for experts in files.values()}
            if len(counts) > 1:
                raise UserError(f"{folder}: replay buffers {number} hold different numbers of experts a group")
            self._experts += [{group: files[group][item] for group in groups} for item in range(counts.pop())]
        if not self._experts:
            raise UserError(f"the replay buffers in {folder} are empty; fetch or make them again")
        self.shapes: Shapes = {
            group: [("", list(tensor.shape)) for tensor in epochs[0]] for group, epochs in self._experts[0].items()
        }

    @property
    def count(self) -> int:
        return len(self._experts)

    def epochs(self, expert: int) -> list[int]:
        return list(range(min(len(epochs) for epochs in self._experts[expert].values())))

    def check(self, expert: int, epoch: int) -> None:
        """UserError unless the snapshot has the shapes of the first one."""
        for group, parts in self.shapes.items():
            if [list(tensor.shape) for tensor in self._experts[expert][group][epoch]] != [size for _, size in parts]:
                raise UserError(
                    f"{self.folder}: expert {expert}, epoch {epoch} ({group}) has other shapes than the first"
                )

    def read(self, expert: int, epoch: int) -> Params:
        return {
            group: torch.cat([tensor.reshape(-1).float() for tensor in epochs[epoch]])
            for group, epochs in self._experts[expert].items()
        }


Trajectories = TrajectoryStore | PublishedTrajectories


def open_trajectories(folder: Path | str, groups: Sequence[str], below: Sequence[str] = ()) -> Trajectories:
    """The trajectories in `folder`, or in the first of the sub-folders `below` that has any.

    UserError says where it looked. A pattern such as `flickr/nfnet_bert/*` among `below` stands for its first match.
    """
    root = Path(folder)
    places = [root, *(match for pattern in below for match in sorted(root.glob(pattern)))]
    for place in places:
        if (place / "manifest.json").is_file():
            return TrajectoryStore.open(place)
        if place.is_dir() and any(True for _ in _numbers(place, groups[0])):
            return PublishedTrajectories(place, groups)
    looked = f"manifest.json or {_published_name(groups[0], '*')}, here and in {', '.join(below) or 'nothing else'}"
    raise UserError(f"no trajectories in {root} (looked for {looked}); run buffer.py first")


def check_trajectories(store: Trajectories, shapes: Shapes, max_start_epoch: int, expert_epochs: int) -> None:
    """UserError unless the store is of networks with these `shapes`, long enough for every start epoch, and whole."""
    for group, wanted in shapes.items():
        if group not in store.shapes:
            raise UserError(f"{store.folder} records {' and '.join(store.shapes)}, not the group {group}")
        found = store.shapes[group]
        for (name, shape), (other, size) in zip(wanted, found, strict=False):
            if list(shape) != list(size) or (other and other != name):
                raise UserError(
                    f"{store.folder} is of another network: {group} has {other or 'a weight'} {list(size)} where "
                    f"{name} {list(shape)} is needed; use the encoders and sizes that buffer.py had"
                )
        if len(wanted) != len(found):
            raise UserError(
                f"{store.folder} is of another network: {group} has {len(found)} weights, {len(wanted)} are needed"
            )
    usable = _usable(store, max_start_epoch, expert_epochs)
    for expert in usable:
        for epoch in _needed(max_start_epoch, expert_epochs):
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
    store: Trajectories, rng: torch.Generator, max_start_epoch: int, expert_epochs: int, device: torch.device
) -> Segment:
    """A random expert and start epoch s < `max_start_epoch`; the target is the same expert at s + `expert_epochs`."""
    usable = _usable(store, max_start_epoch, expert_epochs)
    expert = usable[int(torch.randint(len(usable), (), generator=rng))]
    epoch = int(torch.randint(max_start_epoch, (), generator=rng))
    start, target = store.read(expert, epoch), store.read(expert, epoch + expert_epochs)
    for group in start:
        if torch.equal(start[group], target[group]):
            raise UserError(
                f"expert {expert} of {store.folder} did not move from epoch {epoch}; train it at a higher rate"
            )
    return Segment(_to(start, device), _to(target, device), epoch, expert)


def export_published(store: TrajectoryStore, folder: Path) -> int:
    """Write a store as `<group>_replay_buffer_<n>.pt` for the published scripts; the number of experts written.

    Those scripts index epochs by position, so every epoch from 0 on must have been kept.
    """
    for expert in range(store.count):
        epochs = store.epochs(expert)
        if not store.experts[expert]["done"]:
            raise UserError(f"expert {expert} of {store.folder} is not finished; buffer.py --resume goes on with it")
        if epochs != list(range(len(epochs))):
            raise UserError(f"expert {expert} keeps epochs {epochs}; the published layout needs all from 0 on")
        for group in store.shapes:
            path = folder / _published_name(group, expert)
            if path.exists():
                raise UserError(f"{path} exists already; choose another folder")
            snapshots = []
            for epoch in epochs:
                parts = store.read(expert, epoch)[group].split([_numel(shape) for _, shape in store.shapes[group]])
                snapshots.append(
                    [part.view(shape).clone() for part, (_, shape) in zip(parts, store.shapes[group], strict=True)]
                )
            save_tensors(path, [snapshots])
    return store.count


def _usable(store: Trajectories, max_start_epoch: int, expert_epochs: int) -> list[int]:
    needed = _needed(max_start_epoch, expert_epochs)
    return [expert for expert in range(store.count) if needed <= set(store.epochs(expert))]


def _needed(max_start_epoch: int, expert_epochs: int) -> set[int]:
    return {epoch for start in range(max_start_epoch) for epoch in (start, start + expert_epochs)}


def _published_name(group: str, number: int | str) -> str:
    return f"{'' if group == 'net' else group + '_'}replay_buffer_{number}.pt"


def _numbers(folder: Path, group: str) -> Iterator[str]:
    pattern = re.compile(_published_name(group, r"(\d+)").replace(".pt", r"\.pt"))
    return (match[1] for path in folder.iterdir() if (match := pattern.fullmatch(path.name)))


def _read_published(path: Path) -> list[list[list[Tensor]]]:
    buffer = load_tensors(path, "replay buffer", mmap=True)
    sound = isinstance(buffer, list) and all(
        isinstance(expert, list)
        and expert
        and all(isinstance(epoch, (list, tuple)) and all(torch.is_tensor(t) for t in epoch) for epoch in expert)
        for expert in buffer
    )
    if not sound:
        raise UserError(f"{path} is not a list of experts of epochs of tensors; it is no published replay buffer")
    return buffer


def _numel(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _to(params: Params, device: torch.device) -> Params:
    return {group: vector.to(device) for group, vector in params.items()}
