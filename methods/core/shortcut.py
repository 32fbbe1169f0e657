"""A straight way in place of an expert's own: from its first weights to later ones, at the pace at which it went.

    θ_l(t) = (1 − β_l(t)) θ_l(0) + β_l(t) θ_l(K),     β_l(t) = Σ_{p<t} ‖θ_l(p+1) − θ_l(p)‖ / Σ_{p<K} ‖θ_l(p+1) − θ_l(p)‖

for each layer l. Late in its training an expert turns here and there, and what students learn from one stretch undoes
the last; on the straight way all stretches lead the same way. Source: PTM-ST (Guo et al., ICLR 2026, arXiv 2603.25388).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from methods.core.inner import Params
from methods.core.published import PublishedTrajectories
from methods.core.store import Shapes, TrajectoryStore
from utils.errors import UserError


class Shortcut:
    """The trajectories of `store`, each replaced by its straight way from epoch 0 to epoch `last`."""

    def __init__(self, store: TrajectoryStore | PublishedTrajectories, last: int) -> None:
        self.store, self.last = store, last
        self.folder: Path = store.folder
        self.shapes: Shapes = store.shapes
        self.experts = [expert for expert in range(store.count) if {*range(last + 1)} <= set(store.epochs(expert))]
        if last < 1 or not self.experts:
            kept = store.epochs(0) if store.count else "none"
            raise UserError(
                f"shortcut {last} needs epochs 0 to {last}, but the experts in {self.folder} keep {kept}; lower it, or "
                "train longer experts and keep all epochs"
            )
        self._places: dict[int, dict[str, Tensor]] = {}

    @property
    def count(self) -> int:
        return len(self.experts)

    def epochs(self, expert: int) -> list[int]:
        return list(range(self.last + 1))

    def check(self, expert: int, epoch: int) -> None:
        for recorded in range(self.last + 1):
            self.store.check(self.experts[expert], recorded)

    def read(self, expert: int, epoch: int) -> Params:
        """A snapshot on the straight way, as `TrajectoryStore.read`."""
        own = self.experts[expert]
        first, last = self.store.read(own, 0), self.store.read(own, self.last)
        if expert not in self._places:
            self._places[expert] = self._measure(own)
        return {
            group: torch.cat(list(map(torch.lerp, *self._layers(group, first, last), places[epoch])))
            for group, places in self._places[expert].items()
        }

    def _measure(self, own: int) -> dict[str, Tensor]:
        """β of each group (epochs, layers)."""
        before, steps = self.store.read(own, 0), {group: [] for group in self.shapes}
        for epoch in range(1, self.last + 1):
            after = self.store.read(own, epoch)
            for group, lengths in steps.items():
                both = zip(*self._layers(group, before, after), strict=True)
                lengths.append(torch.stack([(one - other).norm() for one, other in both]))
            before = after
        places = {}
        for group, lengths in steps.items():
            travelled = torch.cat([torch.zeros(1, len(lengths[0])), torch.stack(lengths).cumsum(0)])
            # A layer that never moves is where it is, whatever its place on a way of no length.
            places[group] = travelled / travelled[-1].clamp_min(torch.finfo(torch.float32).tiny)
        return places

    def _layers(self, group: str, *snapshots: Params) -> list[tuple[Tensor, ...]]:
        sizes = [math.prod(shape) for _, shape in self.shapes[group]]
        return [snapshot[group].split(sizes) for snapshot in snapshots]
