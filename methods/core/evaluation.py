"""The one evaluator: every number in a table comes from here."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from utils.metrics import mean_std

Scores = dict[str, float]
State = dict[str, Tensor]


@dataclass
class Report:
    """What several networks scored.

    metrics    metric → one value in % a network
    protocol   how: networks, epochs, select, rates; part of every result row
    """

    metrics: dict[str, list[float]]
    protocol: dict[str, Any] = field(default_factory=dict)

    def mean_std(self) -> dict[str, tuple[float, float]]:
        """Metric → (mean, population standard deviation) over the networks."""
        return {name: mean_std(values) for name, values in self.metrics.items()}


def evaluate(
    train_one: Callable[[int, Callable[[int, State], None]], State],
    score: Callable[[State, str], Scores],
    networks: Sequence[int],
    epochs: int,
    select: str,
    key: str,
    visited: Container[int],
    split: str = "test",
) -> Report:
    """Train one network after another and score them; a `Report` with the metrics of each.

    train_one(number, watch)   trains a network and returns its final state; calls watch(epoch, state) after each epoch
    score(state, split)        the metrics of a network on `val` or `test`
    select    `last`: the state after the last epoch. `val`: of the `visited` epochs the one with the best `key` on the
              validation split; the reported `split` is scored once, at the end. `test`: the same with the reported
              split itself (optimistic; as LoRS reports)
    """
    metrics: dict[str, list[float]] = {}
    chosen, reached = [], []
    for number in networks:
        best: list[Any] = [float("-inf"), epochs, None]

        def watch(epoch: int, state: State, best: list[Any] = best) -> None:
            if select != "last" and epoch in visited:
                value = score(state, split if select == "test" else "val")[key]
                if value > best[0]:
                    best[:] = value, epoch, {name: tensor.clone() for name, tensor in state.items()}

        final = train_one(number, watch)
        for name, value in score(final if best[2] is None else best[2], split).items():
            metrics.setdefault(name, []).append(value)
        chosen.append(best[1])
        reached.append(best[0])
    protocol = {"networks": len(networks), "epochs": epochs, "select": select, "chosen_epochs": chosen}
    if select == "val":
        protocol[f"validation_{key}"] = mean_std(reached)[0]
    return Report(metrics, protocol)
