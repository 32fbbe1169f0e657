"""The one ordinary training loop: experts, and the fresh networks that judge a data set."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from utils.errors import RunError
from utils.progress import progress
from utils.rng import derive_seed, seeded

Batch = TypeVar("Batch")
CHECK_EVERY = 20  # steps between looks at the loss: each look waits for the device


@dataclass(frozen=True)
class Recipe:
    """SGD for so many epochs.

    lr               rate of each parameter group
    milestones       epochs after which every rate is multiplied by `gamma`
    reset_momentum   whether the momentum is lost there, as where released code makes a new optimiser
    """

    lr: dict[str, float]
    epochs: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    reset_momentum: bool = False


OnEpoch = Callable[[int, float], None]


class EpochLoop(ABC):
    """What training is, whatever a step does: epochs with their own chance, a progress bar, an eye on the loss.

    net     is put in training mode before each epoch
    seed    of dropout, so that a run that stopped between two epochs goes on as if it had not
    names   of the networks trained side by side, to tell which one failed; one network needs none
    """

    def __init__(self, net: nn.Module, recipe: Recipe, seed: int, names: Sequence[str] = ()) -> None:
        self.net, self.recipe, self.seed, self.names, self.epoch = net, recipe, seed, names, 0

    @abstractmethod
    def _step(self, batch: Any) -> Tensor:
        """One step of the optimiser; the loss before it, a scalar or one a network (K,), without a graph."""

    @abstractmethod
    def _epoch_over(self) -> None:
        """What the optimiser does between two epochs."""

    def _run(
        self, batches: Callable[[int], Iterable[Any]], on_epoch: Callable[[int, Tensor], None] | None, what: str
    ) -> None:
        device = next(self.net.parameters()).device
        with progress(total=self.recipe.epochs, initial=self.epoch, what=what, leave=False, disable=not what) as bar:
            while self.epoch < self.recipe.epochs:
                self.net.train()
                with seeded(derive_seed(self.seed, "epoch", self.epoch), device):
                    loss = self._one_epoch(batches(self.epoch), bar, what)
                self._epoch_over()
                self.epoch += 1
                bar.update()
                bar.set_postfix(loss=f"{float(loss.mean()):.3f}", refresh=False)
                if on_epoch is not None:
                    on_epoch(self.epoch, loss)

    def _one_epoch(self, batches: Iterable[Any], bar: progress, what: str) -> Tensor:
        total, step = torch.zeros(()), 0
        for step, batch in enumerate(batches, 1):
            loss = self._step(batch)
            total = total.to(loss.device) + loss
            if step % CHECK_EVERY == 0:
                self._finite(total, step, what)
                bar.set_postfix(step=step, loss=f"{float(total.mean()) / step:.3f}", refresh=False)
        if not step:
            raise RunError(f"epoch {self.epoch} has no batches; the data is smaller than one batch")
        self._finite(total, step, what)
        return total / step

    def _finite(self, total: Tensor, step: int, what: str) -> None:
        if not torch.isfinite(total).all():
            first = int((~torch.isfinite(total.reshape(-1))).nonzero()[0])
            who = ", ".join(filter(None, [what, self.names[first] if self.names else ""]))
            where = f"{who or 'training'}, epoch {self.epoch + 1}, by step {step}"
            raise RunError(f"{where}: the loss is not finite; lower the rate")


class Trainer(EpochLoop):
    """A network under training whose whole state (weights, momentum, epoch) can be saved between two epochs."""

    def __init__(self, net: nn.Module, groups: dict[str, list[nn.Parameter]], recipe: Recipe, seed: int) -> None:
        super().__init__(net, recipe, seed)
        parts = [{"params": params, "lr": recipe.lr[group]} for group, params in groups.items()]
        self.optimizer = torch.optim.SGD(parts, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, list(recipe.milestones), recipe.gamma)

    def fit(
        self,
        batches: Callable[[int], Iterable[Batch]],
        loss_fn: Callable[[Batch], Tensor],
        on_epoch: OnEpoch | None = None,
        what: str = "",
    ) -> None:
        """Train from the present epoch to the last; `on_epoch(epochs done, mean loss)` after each.

        batches(epoch) gives the batches of an epoch; dropout follows the seed and the epoch, so a run that stopped
        between two epochs goes on as if it had not. RunError names the epoch and step of a loss that is not finite.
        """
        self._loss_fn = loss_fn
        self._run(batches, on_epoch and (lambda epoch, loss: on_epoch(epoch, float(loss))), what)

    def _step(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss_fn(batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _epoch_over(self) -> None:
        self.schedule.step()
        if self.recipe.reset_momentum and self.epoch + 1 in self.recipe.milestones:
            self.optimizer.state.clear()

    def state_dict(self) -> dict[str, object]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch = state["epoch"]


def partition(count: int, size: int, rng: torch.Generator, drop_last: bool = False) -> Iterator[Tensor]:
    """Shuffled index batches that cover 0 … count−1 once; `drop_last` leaves out a last, smaller batch."""
    order = torch.randperm(count, generator=rng)
    if drop_last and count >= size:
        order = order[: count - count % size]
    return iter(order.split(size))


def prefetch(
    make: Callable[[Tensor], Batch], indices: Iterable[Tensor], ahead: int = 2, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """`make(i)` for each i in order, prepared up to `ahead` batches early in one background thread.

    device   of the batches' tensors; a GPU prepares them beside its other work, not behind it
    """
    aside = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
    if aside is not None:
        aside.wait_stream(torch.cuda.current_stream(device))  # of which it may use what was computed before

    def prepared(item: Tensor) -> tuple[Batch, Any]:
        if aside is None:
            return make(item), None
        with torch.cuda.stream(aside):
            return make(item), aside.record_event()

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        source = iter(indices)
        waiting = [pool.submit(prepared, item) for item in itertools.islice(source, ahead)]
        while waiting:
            batch, ready = waiting.pop(0).result()
            waiting += [pool.submit(prepared, item) for item in itertools.islice(source, 1)]
            if ready is not None:
                here = torch.cuda.current_stream(device)
                here.wait_event(ready)
                for part in batch:
                    if isinstance(part, Tensor) and part.is_cuda:
                        part.record_stream(here)  # or its memory would be taken again while it is still read here
            yield batch
