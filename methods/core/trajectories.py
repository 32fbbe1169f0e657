"""Following experts: segments of their trajectories, and how closely a student follows one.

Trajectories lie in a store of ours (`store.py`) or as MTT and VLDD published them (`published.py`); `open_trajectories`
finds either. Either can be straightened (`shortcut.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from methods.core.inner import Params
from methods.core.published import PublishedTrajectories, published_name, published_numbers
from methods.core.shortcut import Shortcut
from methods.core.store import Shapes, TrajectoryStore
from utils.errors import UserError
from utils.files import digest


@dataclass(frozen=True)
class Segment:
    """A piece of an expert's way: where the student starts and where it should arrive.

    apart   the start epoch of each group where each has drawn its own; `epoch` is the first one's then
    """

    start: Params
    target: Params
    epoch: int
    expert: int
    apart: dict[str, int] = field(default_factory=dict)

    def to(self, device: torch.device) -> Segment:
        """The same on a device; from pinned memory, work that is already under way there does not wait for it."""
        start, target = (
            {group: vector.to(device, non_blocking=vector.is_pinned()) for group, vector in params.items()}
            for params in (self.start, self.target)
        )
        return replace(self, start=start, target=target)

    def travelled(self) -> Params:
        """‖start − target‖² of each group."""
        return {group: (self.start[group] - target).square().sum() for group, target in self.target.items()}


def gaps(final: Params, segment: Segment) -> Params:
    """Per group ‖final − target‖² / ‖start − target‖²: 0 on the target, 1 where the student is no closer than it began.

    Source: MTT (Cazenavette et al., CVPR 2022), eq. 2; VLDD takes one such term a tower.
    """
    travelled = segment.travelled()
    return {
        group: (final[group] - target).square().sum() / travelled[group] for group, target in segment.target.items()
    }


def matching_loss(final: Params, segment: Segment, merged: bool = False) -> tuple[Tensor, Params]:
    """The sum over the groups of their `gaps`, and the gaps.

    merged   one gap of all groups together, as if they were one: the one that travelled further weighs more
             (`--merge_loss_branches` of LoRS)
    """
    branches = gaps(final, segment)
    if not merged:
        return torch.stack(list(branches.values())).sum(), branches
    travelled = segment.travelled()
    weighed = [gap * travelled[group] for group, gap in branches.items()]
    return torch.stack(weighed).sum() / sum(travelled.values()), branches


Trajectories = TrajectoryStore | PublishedTrajectories | Shortcut


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


def check_shapes(store: Trajectories, shapes: Shapes) -> None:
    """UserError unless the store is of networks with these `shapes`."""
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
    for group in store.shapes:
        if group not in shapes:  # as where a tower is frozen that learned there
            raise UserError(
                f"{store.folder} is of another network: {group} learned there, and nothing of it learns here; use the "
                "network and sizes that buffer.py had"
            )


def check_trajectories(
    store: Trajectories, shapes: Shapes, max_start_epoch: int, expert_epochs: int, min_start_epoch: int = 0
) -> None:
    """UserError unless the store is of networks with these `shapes`, long enough for every start epoch, and whole."""
    if min_start_epoch >= max_start_epoch:
        raise UserError(f"min_start_epoch {min_start_epoch} leaves no epoch below max_start_epoch {max_start_epoch}")
    check_shapes(store, shapes)
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


@dataclass(frozen=True, eq=False)
class Place:
    """Where a segment lies: which expert's, from which epoch to `length` epochs later.

    starts   the epoch of all groups or, `apart`, of each
    """

    store: Trajectories
    expert: int
    starts: tuple[int, ...]
    length: int
    apart: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for places that hold the same."""
        return id(self.store), self.expert, self.starts, self.length

    def read(self, pinned: bool = False) -> Segment:
        """The segment on the CPU, in memory of its own; UserError where the expert stands still in it.

        pinned   in memory that a GPU reads by itself
        """
        epochs = {epoch for start in self.starts for epoch in (start, start + self.length)}
        snapshots = {epoch: self.store.read(self.expert, epoch) for epoch in sorted(epochs)}
        groups = list(snapshots[self.starts[0]])
        starts = dict(zip(groups, self.starts if self.apart else self.starts * len(groups), strict=True))
        start = {group: _copy(snapshots[epoch][group], pinned) for group, epoch in starts.items()}
        target = {group: _copy(snapshots[epoch + self.length][group], pinned) for group, epoch in starts.items()}
        for group, epoch in starts.items():
            if torch.equal(start[group], target[group]):
                raise UserError(
                    f"expert {self.expert} of {self.store.folder} did not move from epoch {epoch}; train it at a "
                    "higher rate"
                )
        return Segment(start, target, self.starts[0], self.expert, starts if self.apart else {})


def draw_place(
    store: Trajectories,
    rng: torch.Generator,
    max_start_epoch: int,
    expert_epochs: int,
    min_start_epoch: int = 0,
    apart: bool = False,
) -> Place:
    """A random expert and start epoch s, `min_start_epoch` ≤ s < `max_start_epoch`; the target is the same expert at
    s + `expert_epochs`. DATM moves this window while it learns.

    apart   each group draws an epoch of its own (AMD, ICLR 2026)
    """
    usable = _usable(store, _needed(min_start_epoch, max_start_epoch, expert_epochs))
    expert = usable[int(torch.randint(len(usable), (), generator=rng))]
    count = len(store.shapes) if apart else 1
    drawn = torch.randint(min_start_epoch, max_start_epoch, (count,), generator=rng).tolist()
    return Place(store, expert, tuple(drawn), expert_epochs, apart)


def _usable(store: Trajectories, needed: set[int]) -> list[int]:
    return [expert for expert in range(store.count) if needed <= set(store.epochs(expert))]


def _needed(min_start_epoch: int, max_start_epoch: int, expert_epochs: int) -> set[int]:
    return {epoch for start in range(min_start_epoch, max_start_epoch) for epoch in (start, start + expert_epochs)}


def _copy(vector: Tensor, pinned: bool) -> Tensor:
    """A vector in memory of its own: of a mapped file nothing is read before it is looked at."""
    return torch.empty(vector.shape, dtype=vector.dtype, pin_memory=pinned).copy_(vector)
