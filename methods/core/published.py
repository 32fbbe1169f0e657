"""Expert trajectories as MTT and VLDD publish them: read where they lie, and written for their scripts.

    <group>_replay_buffer_<n>.pt    a list of experts, each a list of epochs (before training, then after each), each a
                                    list of tensors in `parameters()` order; `replay_buffer_<n>.pt` for a single network

Files are memory-mapped and nothing pickled is run. Those from before torch 1.6 cannot be mapped and are read whole.
The first time that a process reads a snapshot it compares its bytes with the checksums in the file, where it has any.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from methods.core.inner import Params
from methods.core.store import Shapes, TrajectoryStore
from utils.errors import UserError
from utils.files import load_tensors, save_tensors
from utils.records import Damaged, is_known, known_records

Expert = dict[str, list[list[Tensor]]]  # group → epochs → tensors


class PublishedTrajectories:
    """The replay buffers in a folder. Nothing in them names the parameters, so only their shapes can be checked.

    max_files     only the files of the lowest numbers, so many of them (of each group)
    max_experts   only the first so many experts of each file
    """

    def __init__(
        self, folder: Path, groups: Sequence[str], max_files: int | None = None, max_experts: int | None = None
    ) -> None:
        self.folder = folder
        # Image and text files are paired by their number, never by the order in which the folder lists them.
        numbers = set.intersection(*({int(n) for n in published_numbers(folder, group)} for group in groups))
        if not numbers:
            raise UserError(f"{folder} has no replay buffers that share a number for {' and '.join(groups)}")
        self._experts: list[Expert] = []
        self._records: list[dict[str, set[tuple[int, int]]]] = []  # of each expert: sizes and checksums in its files
        self._sound: set[tuple[int, int]] = set()  # snapshots that were gone through once
        for number in sorted(numbers)[:max_files]:
            files = {group: _read_file(folder / published_name(group, number)) for group in groups}
            counts = {len(experts) for experts in files.values()}
            if len(counts) > 1:
                raise UserError(f"{folder}: replay buffers {number} hold different numbers of experts a group")
            kept = range(counts.pop())[:max_experts]
            records = {group: _records(folder / published_name(group, number)) for group in groups}
            self._records += [records for _ in kept]
            self._experts += [{group: files[group][item] for group in groups} for item in kept]
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
        """One snapshot as float32 CPU vectors of their own; only its bytes of the file are touched.

        The first time: UserError where its bytes are not those that were written, or its numbers not finite.
        """
        self._go_through(expert, epoch)
        return {
            group: torch.cat([tensor.reshape(-1).float() for tensor in epochs[epoch]])
            for group, epochs in self._experts[expert].items()
        }

    def _go_through(self, expert: int, epoch: int) -> None:
        if (expert, epoch) in self._sound:
            return
        for group, epochs in self._experts[expert].items():
            where, records = f"{self.folder}: expert {expert}, epoch {epoch} ({group})", self._records[expert][group]
            if not all(is_known(tensor, records) for tensor in epochs[epoch]):
                raise UserError(f"{where} is not what the checksums of its replay buffer say; fetch or make it again")
            if not all(torch.isfinite(tensor.sum(dtype=torch.float64)) for tensor in epochs[epoch]):
                raise UserError(f"{where} has numbers that are not finite; fetch or make its replay buffer again")
        self._sound.add((expert, epoch))

    def preload(self) -> None:
        """Copy everything into memory, so that no later reading waits for a disk."""
        for expert in range(self.count):
            for epoch in self.epochs(expert):
                self._go_through(expert, epoch)
        self._experts = [
            {group: [[tensor.clone() for tensor in epoch] for epoch in epochs] for group, epochs in expert.items()}
            for expert in self._experts
        ]


def export_published(store: TrajectoryStore, folder: Path, per_file: int = 1) -> int:
    """Write a store as replay buffers for the published scripts; the number of experts written.

    per_file   experts in a file (MTT's --save_interval); the last file has those that are left

    Those scripts index epochs by position, so every epoch from 0 on must have been kept. They also append to what they
    find in a folder, whatever made it; here a folder that has buffers already is refused.
    """
    for expert in range(store.count):
        epochs = store.epochs(expert)
        if not store.experts[expert]["done"]:
            raise UserError(f"expert {expert} of {store.folder} is not finished; buffer.py --resume goes on with it")
        if epochs != list(range(len(epochs))):
            raise UserError(f"expert {expert} keeps epochs {epochs}; the published layout needs all from 0 on")
    for group in store.shapes:
        for number in published_numbers(folder, group) if folder.is_dir() else ():
            raise UserError(f"{folder / published_name(group, number)} exists already; choose another folder")
    for number, first in enumerate(range(0, store.count, per_file)):
        experts = range(first, min(first + per_file, store.count))
        for group in store.shapes:
            buffer = [[_tensors(store, group, expert, epoch) for epoch in store.epochs(expert)] for expert in experts]
            save_tensors(folder / published_name(group, number), buffer)
    return store.count


def published_name(group: str, number: int | str) -> str:
    """The file of a group's replay buffer."""
    return f"{'' if group == 'net' else group + '_'}replay_buffer_{number}.pt"


def published_numbers(folder: Path, group: str) -> Iterator[str]:
    """The numbers of a group's replay buffers in a folder, in no order."""
    pattern = re.compile(published_name(group, r"(\d+)").replace(".pt", r"\.pt"))
    return (match[1] for path in folder.iterdir() if (match := pattern.fullmatch(path.name)))


def _tensors(store: TrajectoryStore, group: str, expert: int, epoch: int) -> list[Tensor]:
    shapes = [shape for _, shape in store.shapes[group]]
    parts = store.read(expert, epoch)[group].split([math.prod(shape) for shape in shapes])
    # Each has bytes of its own: a view would be saved with the whole vector.
    return [part.view(shape).clone() for part, shape in zip(parts, shapes, strict=True)]


def _records(path: Path) -> set[tuple[int, int]]:
    try:
        return known_records(path)
    except Damaged as error:
        raise UserError(f"replay buffer {path} cannot be read ({error}); fetch or make it again") from None


def _read_file(path: Path) -> list[list[list[Tensor]]]:
    buffer = load_tensors(path, "replay buffer", mmap=True)
    sound = isinstance(buffer, list) and all(
        isinstance(expert, list)
        and expert
        and all(isinstance(epoch, (list, tuple)) and all(torch.is_tensor(t) for t in epoch) for epoch in expert)
        for expert in buffer
    )
    if not sound:
        raise UserError(f"{path} is not a list of experts of epochs of tensors; it is no published replay buffer")
    # Saved parameters come back as parameters, which would carry a graph into every loss.
    return [[[tensor.detach() for tensor in epoch] for epoch in expert] for expert in buffer]
