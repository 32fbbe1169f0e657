"""The one evaluator: every number in a table comes from here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from utils.config import option
from utils.metrics import mean_std
from utils.ranks import ALONE, Ranks

Scores = dict[str, float]
State = dict[str, Tensor]


@dataclass(frozen=True)
class FreshConfig:
    """The fresh networks that judge a set, and how each is trained on it."""

    num_eval: int = option(5, "fresh networks an evaluation", low=1)
    epoch_eval_train: int = option(0, "epochs on the set (0: the protocol's)", low=0)
    batch_train: int = option(0, "batch on the set (0: the protocol's)", low=0)
    eval_mom: float = option(0.9, "momentum when training the networks that judge", aliases=("mom_eval", "mom"), low=0)
    eval_l2: float = option(5e-4, "weight decay when training the networks that judge", aliases=("l2",), low=0)


@dataclass
class Report:
    """What several networks scored.

    metrics    metric → one value in % a network, of the epoch that counts
    protocol   how: networks, epochs, select, rates; part of every result row
    last       the same metrics after the last epoch, whichever counts; empty where nobody looked
    """

    metrics: dict[str, list[float]]
    protocol: dict[str, Any] = field(default_factory=dict)
    last: dict[str, list[float]] = field(default_factory=dict)

    def mean_std(self) -> dict[str, tuple[float, float]]:
        """Metric → (mean, population standard deviation) over the networks."""
        return {name: mean_std(values) for name, values in self.metrics.items()}


Watch = Callable[[int, int, State], None]
Train = Callable[[Sequence[int], Watch], Iterable[tuple[int, State]]]


def one_by_one(train_one: Callable[[int, Callable[[int, State], None]], State]) -> Train:
    """What `evaluate` trains by, of networks that do not train in company.

    train_one(number, watch)   trains a network and returns its final state; calls watch(epoch, state) after each epoch
    """

    def train(numbers: Sequence[int], watch: Watch) -> Iterator[tuple[int, State]]:
        for number in numbers:
            yield number, train_one(number, functools.partial(watch, number))

    return train


@dataclass
class _Seen:
    """What was seen of one network: its scores by (split, epoch); its best epoch so far, how good it was there, and its
    state then, as long as that is still to be looked at."""

    epoch: int
    value: float = float("-inf")
    state: State | None = None
    scores: dict[tuple[str, int], Scores] = field(default_factory=dict)


def evaluate(
    train: Train,
    score: Callable[[State, str], Scores],
    networks: Sequence[int],
    epochs: int,
    select: str,
    key: str,
    visited: Container[int],
    split: str = "test",
    trace: Sequence[int] = (),
    ranks: Ranks = ALONE,
) -> Report:
    """Train networks and score them; a `Report` with the metrics of each, in the epoch that counts and in the last.

    train(numbers, watch)   trains these networks, in any order, and gives each number with its final state as it is
                            done; a state is scored before the next is asked for, so it may be overwritten then. Calls
                            watch(number, epoch, state) after each epoch of each
    score(state, split)     the metrics of a network on `val` or `test`
    select    `last`: the state after the last epoch. `val`: of the `visited` epochs the one with the best `key` on the
              validation split; the reported `split` is scored at the end: in that epoch, and in the last if that is
              another. `train`: the same with the training images. `test`: the same with the reported split itself
              (optimistic; as LoRS reports)
    trace     epochs whose metrics on `split` are reported, too, as `<metric>@<epoch>`
    ranks     the processes that share the networks; the report is that of all, in each of them

    No state is scored twice on the same split.
    """
    watched = split if select == "test" else select
    own = networks[ranks.rank :: ranks.world]
    seen = {number: _Seen(epochs) for number in own}

    def look(number: int, epoch: int, state: State | None, part: str) -> Scores:
        known = seen[number].scores
        if (part, epoch) not in known:
            known[part, epoch] = score(state, part)
        return known[part, epoch]

    def watch(number: int, epoch: int, state: State) -> None:
        if epoch in trace:
            look(number, epoch, state, split)
        if select != "last" and epoch in visited:
            value, network = look(number, epoch, state, watched)[key], seen[number]
            if value > network.value:
                needed = (split, epoch) not in network.scores  # else nobody will look at this state again
                network.value, network.epoch = value, epoch
                network.state = {name: part.clone() for name, part in state.items()} if needed else None

    for number, final in train(own, watch):
        look(number, epochs, final, split)  # first: scoring another state may overwrite this one
        look(number, seen[number].epoch, seen[number].state, split)
        seen[number].state = None
    everywhere = {number: network for part in ranks.all(seen) for number, network in part.items()}
    return _report([everywhere[number] for number in networks], epochs, select, key, split, trace)


def _report(networks: Sequence[_Seen], epochs: int, select: str, key: str, split: str, trace: Sequence[int]) -> Report:
    """What `evaluate` says of networks that it has seen."""
    chosen = [network.epoch for network in networks]
    metrics = _values(networks, split, chosen)
    for epoch in trace:
        traced = _values(networks, split, [epoch] * len(networks))
        metrics |= {f"{name}@{epoch}": values for name, values in traced.items()}
    protocol = {"networks": len(networks), "epochs": epochs, "select": select, "chosen_epochs": chosen}
    if select == "val":
        protocol[f"validation_{key}"] = mean_std(network.value for network in networks)[0]
    elif select == "train":
        means = _values(networks, "train", chosen)
        protocol |= {f"training_{name}": mean_std(values)[0] for name, values in means.items()}
    return Report(metrics, protocol, _values(networks, split, [epochs] * len(networks)))


def _values(networks: Sequence[_Seen], part: str, epochs: Sequence[int]) -> dict[str, list[float]]:
    """Metric → a value a network, each in its own epoch."""
    found = [network.scores[part, epoch] for network, epoch in zip(networks, epochs, strict=True)]
    return {name: [scores[name] for scores in found] for name in found[0]}
