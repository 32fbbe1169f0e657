"""Fresh networks on labelled photographs: what the protocols with hard and with soft labels have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.core.evaluation import Scores, State
from methods.core.photos import Batches, Photos
from methods.core.training import EpochLoop, Recipe, partition
from networks import has_batch_norm
from utils.config import option
from utils.errors import UserError
from utils.rng import derive_seed, generator, seeded

SCORED = 128  # images a batch when scoring; networks are in evaluation mode, so it changes nothing else


@dataclass(frozen=True)
class StudentConfig:
    """How students train, in either protocol; each has its own values for what is left open."""

    factor: int = option(
        1,
        "side of the mosaics in the images: minimax's rule of epochs counts factor² images for each, rded shuffles its "
        "bands and crops down to 1/factor",
        aliases=("f",),
        low=1,
    )
    size: int = option(0, "pixels a side that students see (0: the protocol's)", aliases=("input-size",), low=0)
    epochs: int = option(0, "epochs (0: the protocol's)", aliases=("re-epochs", "re_epochs"), low=0)
    batch_size: int = option(0, "images a step (0: the protocol's)", aliases=("re-batch-size", "re_batch_size"), low=0)
    lr: float | None = option(
        None, "rate (none: the protocol's)", aliases=("learning-rate", "learning_rate", "adamw-lr", "adamw_lr"), above=0
    )
    momentum: float = option(0.9, "momentum of SGD", low=0)
    wd: float | None = option(
        None,
        "weight decay (none: the protocol's)",
        aliases=("weight-decay", "weight_decay", "adamw-weight-decay", "adamw_weight_decay"),
        low=0,
    )
    mix_type: str = option("cutmix", "how images are mixed", aliases=("mix-type",), choices=("cutmix", "mixup", "none"))
    mixup: str = option("0.8", "α of --mix_type mixup; also cut (as --mix_type cutmix) or vanilla (as none)")
    cutmix: float = option(1.0, "α of --mix_type cutmix", aliases=("beta",), above=0)

    def check(self) -> None:
        if self.mixup in ("cut", "vanilla"):
            return
        try:
            alpha = float(self.mixup)
        except ValueError:
            alpha = 0
        if not 0 < alpha < float("inf"):
            raise UserError(f"--mixup takes cut, vanilla or a number above 0, not '{self.mixup}'")

    def idle(self) -> dict[str, str]:
        kind = self.mixing[0]
        found = {} if kind == "cutmix" else {"cutmix": "--mix_type cutmix"}
        return found | ({} if kind == "mixup" or self.mixup in ("cut", "vanilla") else {"mixup": "--mix_type mixup"})

    @property
    def mixing(self) -> tuple[str, float]:
        """cutmix, mixup or none, and the α of its Beta distribution."""
        if self.mixup in ("cut", "vanilla"):
            kind = "cutmix" if self.mixup == "cut" else "none"
            return kind, self.cutmix
        return self.mix_type, float(self.mixup) if self.mix_type == "mixup" else self.cutmix


def preset_size(dataset: str, classes: int, networks: Sequence[str] = ()) -> int:
    """Pixels a side that students see: 224 of photographs, but 128 where one of the `networks` is a conv5 or conv6 and
    there are at most 100 classes; 64 of Tiny ImageNet and the toy set, 32 of CIFAR and other sets of small images."""
    if dataset in ("imagenet", "folder"):
        return 128 if classes <= 100 and {"conv5", "conv6"} & {*networks} else 224
    return 64 if dataset in ("tiny_imagenet", "toy") else 32


class ScheduledLoop(EpochLoop):
    """Any optimiser at a rate that follows the epochs; its whole state can be saved between two of them.

    optimizer  of the network's weights, at the base rate
    rate       epochs done → what the base rate is multiplied by
    losses     a batch's losses, whose sum is that of the batch; each is differentiated before the next is asked for, so
               a batch that is too large for the memory can be cut into parts
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: Callable[[int], float],
        epochs: int,
        seed: int,
        losses: Callable[[Any], Iterable[Tensor]],
    ) -> None:
        super().__init__(net, Recipe({}, epochs), seed)
        self.optimizer, self.losses = optimizer, losses
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def fit(self, batches: Callable[[int], Iterable[Any]], on_epoch: Callable[[int], None], what: str) -> None:
        """Train from the present epoch to the last; `on_epoch(epochs done)` after each."""
        self._run(batches, lambda epoch, loss: on_epoch(epoch), what)

    def _step(self, batch: Any) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for loss in self.losses(batch):
            loss.backward()
            total = total.to(loss.device) + loss.detach()
        self.optimizer.step()
        return total

    def _epoch_over(self) -> None:
        self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch = state["epoch"]


def decayed(net: nn.Module, decay: float) -> list[dict[str, Any]]:
    """A network's weights in two groups for an optimiser: those with more than one dimension decay, others do not."""
    parts: tuple[list, list] = [], []
    for name, part in net.named_parameters():
        parts["weight" not in name or part.ndim < 2].append(part)
    return [{"params": parts[0], "weight_decay": decay}, {"params": parts[1], "weight_decay": 0.0}]


def whole_batches(count: int, size: int, rng: torch.Generator, net: nn.Module) -> list[Tensor]:
    """Shuffled rows in batches; a last one of a single image joins the one before where a network has batch norm,
    which knows no statistics of it."""
    parts = list(partition(count, size, rng))
    if len(parts) > 1 and len(parts[-1]) == 1 and has_batch_norm(net):
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


class PhotoStudents(ABC):
    """Students of one architecture on one set of photographs, one after the other; `core.evaluation` runs them.

    epochs    that each trains for
    visited   epochs after which the published protocol tests, counted from 1; the last is always one of them
    protocol  how they train, in plain values, for the report
    size, resize   pixels of what students see, and of the short side before the middle is cut out to test on
    """

    epochs: int
    visited: frozenset[int]
    protocol: dict[str, Any]

    def __init__(
        self, train: Photos, tests: dict[str, Photos], seed: int, device: torch.device, size: int, resize: int
    ) -> None:
        self.photos, self.tests, self.seed, self.device = train, tests | {"train": train}, seed, device
        self.size, self.resize = size, resize
        self._looked: dict[str, Batches] = {}
        self._judge: nn.Module | None = None

    @abstractmethod
    def fresh(self) -> nn.Module:
        """An untrained student, on the CPU."""

    @abstractmethod
    def prepared(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the networks take them when they are tested."""

    @abstractmethod
    def _train(self, net: nn.Module, number: int, on_epoch: Callable[[int], None]) -> None:
        """Train a student; `on_epoch(epochs done)` after each."""

    def train(self, number: int, watch: Callable[[int, State], None]) -> State:
        """The final state of student `number`; `watch(epoch, state)` after each epoch. A state is the network's own:
        it changes with the next step."""
        with seeded(derive_seed(self.seed, "student", number)):
            net = self.fresh()
        net = net.to(self.device)
        self._train(net, number, lambda epoch: watch(epoch, net.state_dict()))
        return net.state_dict()

    def score(self, state: State, split: str) -> Scores:
        """`acc`: percentage of a split's photographs that a student gets right; `train` is what it trained on."""
        if self._judge is None:
            self._judge = self.fresh().to(self.device)
        self._judge.load_state_dict(state)
        return {"acc": self.accuracy(self._judge, split)}

    @torch.no_grad()
    def accuracy(self, net: nn.Module, split: str) -> float:
        """Percentage that any network gets right of a split, prepared as for the students."""
        if split not in self._looked:
            photos = self.tests[split]
            self._looked[split] = Batches(photos.squares(self.size, self.resize), photos.labels, self.device)
        return accuracy(net, self._looked[split], self.prepared)

    def batches(self, number: int, epoch: int, size: int, net: nn.Module) -> Iterator[tuple[Tensor, torch.Generator]]:
        """The rows of an epoch in batches, each with the generator that its further chance comes from."""
        rng = generator(self.seed, "student", number, "epoch", epoch)
        return ((rows, rng) for rows in whole_batches(len(self.photos), size, rng, net))


@torch.no_grad()
def accuracy(net: nn.Module, images: Batches, prepared: Callable[[Tensor], Tensor]) -> float:
    """Percentage of labelled squares that a network gets right, in evaluation mode."""
    net.eval()
    right = torch.zeros((), dtype=torch.long, device=images.device)
    for rows in torch.arange(len(images)).split(SCORED):
        found = net(prepared(images.images(rows))).argmax(1)
        right += (found == images.labels[rows.to(images.device)]).sum()
    return 100 * int(right) / len(images)
