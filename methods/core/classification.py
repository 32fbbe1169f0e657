"""Judging labelled images, learned or real, by the accuracy of fresh networks trained on them.

How they are trained, and which there are, is in image_protocols.py; the twin for image–text pairs is retrieval.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from data.images import ImageData, ImageSplit
from methods.core.evaluation import FreshConfig, Report, Scores, State, Watch, evaluate
from methods.core.image_protocols import AUGMENTATIONS, PROTOCOLS, Augment, EvalProtocol, build_augment
from methods.core.stack import Stack, StackBatch, StackTrainer
from methods.core.training import Recipe, partition
from networks import build_network
from utils.config import option
from utils.devices import moved
from utils.errors import UserError
from utils.ranks import ALONE, Ranks
from utils.rng import derive_seed, generator, seeded


class TrainingSet(Protocol):
    """Labelled images to train on, learned or real."""

    @property
    def lr(self) -> float:
        """The rate of SGD on them."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), augmented by the chance of `rng`; labels (B,) long or (B, classes) probabilities."""


@dataclass(frozen=True)
class RealSet:
    """Real images as a training set, all of a split or some.

    rows   which of the split (N,) long; None for all
    """

    split: ImageSplit
    lr: float
    augment: Augment | None = None
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.split) if self.rows is None else len(self.rows)

    def batch(self, rows: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = rows if self.rows is None else self.rows[rows]
        images, labels = self.split.images(rows), self.split.labels
        return images if self.augment is None else self.augment(images, rng), labels[moved(rows, labels.device)]


@dataclass(frozen=True)
class AtRate:
    """A training set at another rate."""

    base: TrainingSet
    lr: float

    def __len__(self) -> int:
        return len(self.base)

    def batch(self, rows: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.base.batch(rows, rng)


@dataclass(frozen=True)
class AccuracyConfig(FreshConfig):
    """How a set of labelled images is judged."""

    protocol: str = option("clean", "how networks are trained and which epoch counts", choices=tuple(PROTOCOLS))
    eval_aug: str = option(
        "",
        "augmentation of the set (empty: the protocol's; own: as the experts had it; the last four: DC-BENCH's)",
        choices=("", "own", *AUGMENTATIONS),
    )
    batch_size_test: int = option(256, "images a batch when scoring", low=1, free=True)


WEIGHTS = "weights"  # of a network's state; the rest of it are running statistics


class AccuracyJudge:
    """Trains fresh networks on data and reports their accuracy, the metric `acc`, in %; several processes share the
    networks."""

    def __init__(self, data: ImageData, cfg: AccuracyConfig, seed: int, ranks: Ranks = ALONE) -> None:
        self.data, self.cfg, self.seed, self.ranks = data, cfg, seed, ranks
        self.protocol = PROTOCOLS[cfg.protocol]

    @property
    def augmentation(self) -> str:
        """`own`, or the name of what every set is augmented by."""
        if self.cfg.eval_aug:
            return self.cfg.eval_aug
        if self.cfg.protocol == "dc_bench" and self.data.name == "MNIST":  # its one exception
            return "crop_scale_rotate"
        return self.protocol.augment

    def augment(self, own: Augment | None) -> Augment | None:
        """What a set that is to be judged should be augmented by, where `own` is what it was made with."""
        return own if self.augmentation == "own" else build_augment(self.augmentation, self.data)

    @property
    def epochs(self) -> int:
        """As told to the program; the report says how many were trained."""
        bare = self.protocol.bare if self.augmentation == "none" else 0
        return self.cfg.epoch_eval_train or bare or self.protocol.epochs

    def sets(self, source: Callable[[int], TrainingSet], network: str, split: str = "test", label: str = "") -> Report:
        """Judge the sets that `source(network number)` gives: the same one, or a new random one for each network.

        UserError for a rate that is not positive, such as one that was learned without a bound.
        """
        source = functools.cache(source)
        soft = source(0).batch(torch.zeros(1, dtype=torch.long), torch.Generator())[1].is_floating_point()
        rates = [usable(self.protocol.lr or source(number).lr) for number in range(self.cfg.num_eval)]
        batch = self.cfg.batch_train or self.protocol.batch
        recipes = [self._recipe(self.protocol, rate, self.epochs) for rate in rates]
        visited = self.protocol.visited(recipes[0].epochs, soft)
        report = self._report(source, recipes, batch, self.protocol.select, visited, network, split, label)
        report.protocol |= {
            "protocol": self.cfg.protocol,
            "about": self.protocol.about,
            "augmentation": self.augmentation,
        }
        return report

    def full(
        self, network: str, epochs: int, batch: int, lr: float, augment: Augment | None, split: str = "test"
    ) -> Report:
        """Judge all training data: `clean` training at this rate, for so many epochs, the last of which counts."""
        real = RealSet(self.data["train"], lr, augment)
        recipe = self._recipe(PROTOCOLS["clean"], lr, epochs)
        report = self._report(
            lambda number: real, [recipe] * self.cfg.num_eval, batch, "last", {epochs}, network, split, "full,"
        )
        report.protocol |= {"protocol": "clean", "about": PROTOCOLS["clean"].about, "augmentation": "own"}
        return report

    def searched(
        self,
        source: Callable[[int], TrainingSet],
        network: str,
        split: str = "test",
        rates: Sequence[float] = (0.001, 0.005, 0.01, 0.05, 0.1),
        label: str = "",
    ) -> Report:
        """Each set at the one of these rates that scores best on `split`: how DD-Ranking treats random images.

        Optimistic by choice on what is reported, as released; the rates are DD-Ranking's.
        """
        source, reports = functools.cache(source), []
        for rate in rates:
            at_rate = functools.partial(lambda number, rate: AtRate(source(number), rate), rate=rate)
            reports.append(self.sets(at_rate, network, split, f"{label} rate {rate:g}," if label else ""))
        each = zip(*(report.metrics["acc"] for report in reports), strict=True)  # network → rate → accuracy
        chosen = [max(range(len(rates)), key=values.__getitem__) for values in each]

        def taken(found: list[dict[str, list[float]]]) -> dict[str, list[float]]:
            return {"acc": [found[index]["acc"][number] for number, index in enumerate(chosen)]}

        protocol = dict(reports[0].protocol)
        protocol["lr"] = [rates[index] for index in chosen]
        protocol["chosen_epochs"] = [
            reports[index].protocol["chosen_epochs"][number] for number, index in enumerate(chosen)
        ]
        protocol["about"] += f"; best of {len(rates)} rates ON {split.upper()}"
        return Report(taken([part.metrics for part in reports]), protocol, taken([part.last for part in reports]))

    def _recipe(self, protocol: EvalProtocol, lr: float, epochs: int) -> Recipe:
        return protocol.recipe(lr, epochs, self.cfg.eval_mom, self.cfg.eval_l2)

    def _report(
        self,
        source: Callable[[int], TrainingSet],
        recipes: Sequence[Recipe],
        batch: int,
        select: str,
        visited: set[int],
        network: str,
        split: str,
        label: str,
    ) -> Report:
        numbers, stack = range(self.cfg.num_eval), fresh_stack(network, self.data)

        def train(own: Sequence[int], watch: Watch) -> Iterator[tuple[int, State]]:
            for group in companies(stack, {number: (len(source(number)), recipes[number].lr["net"]) for number in own}):
                yield from self._train(stack, group, source, recipes[group[0]], batch, watch, label)

        def score(state: State, part: str) -> Scores:
            return {"acc": accuracy(as_trained(stack, state), self.data[part], self.cfg.batch_size_test)}

        epochs = recipes[0].epochs
        report = evaluate(train, score, numbers, epochs, select, "acc", visited, split, ranks=self.ranks)
        rates = list(dict.fromkeys(recipe.lr["net"] for recipe in recipes))
        report.protocol |= {
            "split": split,
            "network": network,
            "batch": batch,
            "lr": rates[0] if len(rates) == 1 else [recipe.lr["net"] for recipe in recipes],
            "momentum": self.cfg.eval_mom,
            "weight_decay": self.cfg.eval_l2,
        }
        return report

    def _train(
        self,
        stack: Stack,
        group: Sequence[int],
        source: Callable[[int], TrainingSet],
        recipe: Recipe,
        batch: int,
        watch: Watch,
        label: str,
    ) -> Iterable[tuple[int, State]]:
        """Train some networks side by side, and give each with its final state."""
        seeds = [derive_seed(self.seed, "judge net", number) for number in group]
        names = [f"network {number + 1}/{self.cfg.num_eval}" for number in group]
        trainer = StackTrainer(stack, stack.draw(seeds), recipe, seeds, names=names)

        def batches(epoch: int) -> Iterator[StackBatch]:
            chances = [generator(self.seed, "judge", number, epoch) for number in group]
            orders = [partition(len(source(number)), batch, rng) for number, rng in zip(group, chances, strict=True)]
            for rows in zip(*orders, strict=True):
                own = [source(number).batch(*each) for number, *each in zip(group, rows, chances, strict=True)]
                yield tuple(torch.stack(parts) for parts in zip(*own, strict=True))

        def on_epoch(epoch: int, loss: Tensor) -> None:
            for number, state in zip(group, states_of(stack, trainer.weights), strict=True):
                watch(number, epoch, state)

        who = names[0] if len(group) == 1 else f"{len(group)} networks"
        trainer.fit(batches, on_epoch, f"{label} {who}" if label else "")
        return zip(group, states_of(stack, trainer.weights), strict=True)


def usable(rate: float) -> float:
    """The rate; UserError for one that nobody can train at."""
    if not 0 < rate < math.inf:
        raise UserError(f"the set is to be trained on at the rate {rate:g}; give it a positive one")
    return rate


def fresh_stack(network: str, data: ImageData) -> Stack:
    """Networks of this name for these images; what they begin with has yet to be drawn."""
    with seeded(0):
        return Stack(build_network(network, data.size, len(data.classes), data.channels).to(data.device))


def companies(stack: Stack, kinds: Mapping[int, Hashable]) -> list[list[int]]:
    """The numbers of networks that train side by side: those of one kind, but each alone where they cannot."""
    found: dict[Hashable, list[int]] = {}
    for number, kind in kinds.items():
        found.setdefault(number if stack.single else kind, []).append(number)
    return list(found.values())


def states_of(stack: Stack, weights: Tensor) -> list[State]:
    """Each network's state, weights being (K, P)."""
    return [{WEIGHTS: row, **dict(stack.net.named_buffers())} for row in weights]


def as_trained(stack: Stack, state: State) -> Callable[[Tensor], Tensor]:
    """One of a stack's networks as it classifies: images → logits. The stack's network is in evaluation mode then."""
    stack.load_buffers(state)
    stack.net.eval()
    return lambda images: stack.flat(state[WEIGHTS], images)


def accuracy(logits: Callable[[Tensor], Tensor], split: ImageSplit, batch: int) -> float:
    """Percentage of a split's images whose own class has the highest logit; logits(images (B, C, H, W)) is (B, K).

    A network that gives nan is not right by luck.
    """
    return accuracy_and_loss(logits, split, batch)["acc"]


@torch.no_grad()
def accuracy_and_loss(logits: Callable[[Tensor], Tensor], split: ImageSplit, batch: int) -> Scores:
    """`acc` as `accuracy` has it, and `loss`, the mean cross-entropy."""
    right, loss = 0, 0.0
    for rows in torch.arange(len(split)).split(batch):
        scores, labels = logits(split.images(rows)), split.labels[moved(rows, split.labels.device)]
        hits = (scores.argmax(1) == labels) & ~scores.isnan().any(1)
        right = right + hits.sum()  # tensors: nothing waits for the device until the end
        loss = loss + F.cross_entropy(scores, labels, reduction="sum")
    return {"acc": 100.0 * int(right) / len(split), "loss": float(loss) / len(split)}
