"""The segments of an outer step: drawn alike in every process, followed by one process each, their gradients averaged.

    torchrun --nproc_per_node 4 distill.py --segments 8     each process follows two of the eight

Which segments a step has, and on which draws each is followed, depends on their number alone: one process that follows
all eight learns the same, to float tolerance. While one segment is followed the next one is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import torch
from torch import Tensor

from methods.core.inner import Draw
from methods.core.trajectories import Place, Segment
from utils.run import Run

Numbers = dict[str, float]


class Segments:
    """The segments of each outer step.

    count        of a step; 0: one for each process
    place        step, generator → where a segment of that step lies, with no other chance than the generator's; it is
                 also asked about the next step, with a copy of the generator, for what to read ahead
    """

    def __init__(self, run: Run, count: int, place: Callable[[int, torch.Generator], Place]) -> None:
        self.run, self.ranks, self.place = run, run.ranks, place
        self.count = count or run.ranks.world
        self._ahead: tuple[Place, Future[Segment]] | None = None
        if self.count < self.ranks.world:
            print(f"note: {self.count} of {self.ranks.world} processes have a segment to follow; the others only judge")

    def follow(
        self,
        step: int,
        leaves: Sequence[Tensor],
        draws: Callable[[], Sequence[Draw]],
        one: Callable[[Segment, Sequence[Draw]], Numbers],
    ) -> Numbers:
        """The mean numbers of a step's segments; the mean of their gradients is in `.grad` of the leaves.

        draws    the chance of one segment's inner loop; asked for all segments, in order, in every process
        one      follows a segment: adds its gradient to `.grad` of (some of) the leaves, and tells its numbers
        """
        places = self._own(step, self.run.rng("experts"))
        chances = [draws() for _ in range(self.count)][self._share]
        segments = self._read(step, places)
        if self.count == self.ranks.world == 1:
            return one(next(segments), *chances)
        numbers, totals = [], [None] * len(leaves)
        for segment, chance in zip(segments, chances, strict=True):
            numbers.append(one(segment, chance))
            totals = [_sum(total, leaf.grad) for total, leaf in zip(totals, leaves, strict=True)]
            for leaf in leaves:
                leaf.grad = None  # each segment begins with none: what it does to its gradients is not for the others'
        return self._mean(leaves, totals, numbers)

    @property
    def own(self) -> int:
        """How many of a step's segments this process follows."""
        return len(range(self.count)[self._share])

    @property
    def _share(self) -> slice:
        """Which of a step's segments this process follows."""
        return slice(self.ranks.rank, None, self.ranks.world)

    def _own(self, step: int, rng: torch.Generator) -> list[Place]:
        return [self.place(step, rng) for _ in range(self.count)][self._share]

    def _mean(self, leaves: Sequence[Tensor], totals: Sequence[Tensor | None], numbers: list[Numbers]) -> Numbers:
        everywhere = self.ranks.all((numbers, [total is not None for total in totals]))
        # A leaf without a gradient anywhere, as of a phase whose turn it is not, keeps none.
        touched = [any(flags) for flags in zip(*(found for _, found in everywhere), strict=True)]
        for leaf, total, learns in zip(leaves, totals, touched, strict=True):
            leaf.grad = (torch.zeros_like(leaf) if total is None else total) if learns else None
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        self.ranks.add_(grads)
        for grad in grads:
            grad.div_(self.count)
        found = [everywhere[number % self.ranks.world][0][number // self.ranks.world] for number in range(self.count)]
        names = [name for name in found[0] if name != "expert"]  # of which there is no mean
        return {name: sum(one[name] for one in found) / len(found) for name in names}

    def _read(self, step: int, places: Sequence[Place]) -> Iterator[Segment]:
        """The segments at these places; while one is used, the next is read, at last the first of the next step."""
        peeked = torch.Generator()
        peeked.set_state(self.run.rng("experts").get_state())
        for place, following in zip(places, [*places[1:], *self._own(step + 1, peeked)[:1]], strict=False):
            known, reading = self._ahead or (place, self._begin(place))
            if known.key != place.key:
                reading = self._begin(place)
            segment = reading.result()  # raises what reading raised
            self._ahead = following, self._begin(following)
            yield segment.to(self.run.device)

    def _begin(self, place: Place) -> Future[Segment]:
        return self._reader.submit(place.read, self.run.device.type == "cuda")

    @cached_property
    def _reader(self) -> ThreadPoolExecutor:
        """One thread: two would ask the same disk."""
        return ThreadPoolExecutor(1, "segments")


def _sum(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Both together; `total` may be changed."""
    if grad is None:
        return total
    return grad if total is None else total.add_(grad)
