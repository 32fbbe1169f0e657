"""The segments of an outer step: drawn alike in every process, followed by one process each, their gradients averaged.

    torchrun --nproc_per_node 4 distill.py --segments 8     each process follows two of the eight

Which segments a step has, and on which draws each is followed, depends on their number alone: one process that follows
all eight learns the same, to float tolerance. While one segment is followed the next one is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import torch
from torch import Tensor

from methods.core.inner import Draw
from methods.core.trajectories import Place, Segment
from utils.ranks import ALONE, Ranks
from utils.run import Run

Numbers = dict[str, float]


class Share:
    """The parts of an outer step, each of which one process follows.

    count   of a step; 0: one for each process
    """

    def __init__(self, ranks: Ranks, count: int) -> None:
        self.ranks, self.count = ranks, count or ranks.world
        if self.count < ranks.world:
            print(f"note: --segments {self.count} keeps as many of {ranks.world} processes busy; the others only judge")

    @property
    def slice(self) -> slice:
        """Which of a step's parts are this process's."""
        return slice(self.ranks.rank, None, self.ranks.world)

    @property
    def own(self) -> int:
        """How many of them."""
        return len(range(self.count)[self.slice])

    def mean(self, leaves: Sequence[Tensor], parts: Iterable[Numbers]) -> Numbers:
        """The mean numbers of all parts of a step; the mean of their gradients is in `.grad` of the leaves.

        parts   this process's own, one after another: each adds its gradient to `.grad` of (some of) the leaves before
                it yields its numbers
        """
        if self.count == self.ranks.world == 1:
            (found,) = parts
            return found
        numbers, totals = [], [None] * len(leaves)
        for found in parts:
            numbers.append(found)
            totals = [_sum(total, leaf.grad) for total, leaf in zip(totals, leaves, strict=True)]
            for leaf in leaves:
                leaf.grad = None  # each part begins with none: what it does to its gradients is not for the others'
        everywhere = self.ranks.all((numbers, [total is not None for total in totals]))
        # A leaf without a gradient anywhere, as of a phase whose turn it is not, keeps none.
        touched = [any(flags) for flags in zip(*(flags for _, flags in everywhere), strict=True)]
        for leaf, total, learns in zip(leaves, totals, touched, strict=True):
            leaf.grad = (torch.zeros_like(leaf) if total is None else total) if learns else None
        self._average([leaf.grad for leaf in leaves if leaf.grad is not None])
        all_numbers = [everywhere[part % self.ranks.world][0][part // self.ranks.world] for part in range(self.count)]
        names = [name for name in all_numbers[0] if name != "expert"]  # of which there is no mean
        return {name: sum(found[name] for found in all_numbers) / self.count for name in names}

    def _average(self, grads: Sequence[Tensor]) -> None:
        self.ranks.add_(grads)
        for grad in grads:
            grad.div_(self.count)


ONE = Share(ALONE, 1)


class Segments(Share):
    """The segments of each outer step.

    place   step, generator → where a segment of that step lies, with no other chance than the generator's; it is also
            asked about the next step, with a copy of the generator, for what to read ahead
    """

    def __init__(self, run: Run, count: int, place: Callable[[int, torch.Generator], Place]) -> None:
        super().__init__(run.ranks, count)
        self.run, self.place = run, place
        self._ahead: tuple[Place, Future[Segment]] | None = None

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
        chances = [draws() for _ in range(self.count)][self.slice]
        return self.mean(leaves, (one(*part) for part in zip(self._read(step, places), chances, strict=True)))

    def _own(self, step: int, rng: torch.Generator) -> list[Place]:
        return [self.place(step, rng) for _ in range(self.count)][self.slice]

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
