"""Judging what is trained on for a number of steps, not epochs: fresh networks, trained side by side just as the inner
loop trains one, and scored on the way.

The twin for epochs of SGD is classification.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.images import ImageData
from methods.core.classification import (
    TrainingSet,
    accuracy_and_loss,
    as_trained,
    companies,
    fresh_stack,
    states_of,
    usable,
)
from methods.core.evaluation import Report, Scores, State, Watch, evaluate
from methods.core.inner import Inner, InnerAdam
from methods.core.stack import Stack
from methods.core.training import CHECK_EVERY
from utils.config import option
from utils.errors import RunError, UserError
from utils.progress import progress
from utils.ranks import ALONE, Ranks
from utils.rng import derive_seed, generator, seeded


@dataclass(frozen=True)
class StepConfig:
    """The fresh networks that judge a set, and when they are looked at."""

    num_eval: int = option(8, "fresh networks an evaluation", aliases=("num_train_eval",), low=1)
    eval_steps: tuple[int, ...] = option((300, 600, 1000, 2000), "steps after which they are scored", above=0)
    select_step: str = option(
        "last",
        "which of those counts: the last, or each network's best on val, or on the training images (as released)",
        choices=("last", "val", "train"),
    )
    batch_size_test: int = option(512, "images a batch when scoring", low=1, free=True)

    def check(self) -> None:
        if not self.eval_steps:
            raise UserError("--eval_steps names no step; give one, such as 1000")

    @property
    def looks(self) -> list[int]:
        """The steps at which networks are scored, in order."""
        return sorted({*self.eval_steps})


class StepJudge:
    """Trains fresh networks on data and reports their accuracy, the metric `acc`, in %, and their mean loss, `loss`.

    Both are of the step that counts; `acc@300` and `loss@300` are those after 300 steps, whichever counts. Several
    processes share the networks.
    """

    def __init__(self, data: ImageData, cfg: StepConfig, seed: int, ranks: Ranks = ALONE) -> None:
        self.data, self.cfg, self.seed, self.ranks = data, cfg, seed, ranks

    def sets(
        self,
        source: Callable[[int], TrainingSet],
        network: str,
        inner: Callable[[float], Inner],
        batch: int,
        split: str = "test",
        label: str = "",
        augmentation: str = "own",
    ) -> Report:
        """Judge the sets that `source(network number)` gives: the same one, or a new random one for each network.

        inner           the optimiser of networks at a rate, which is the set's own
        batch           rows a step (0: all)
        augmentation    what the report calls that of the sets

        UserError for a rate that is not positive; RunError names the network and step of a loss that is not finite.
        """
        source, looks, select = functools.cache(source), self.cfg.looks, self.cfg.select_step
        numbers, stack, steps = range(self.cfg.num_eval), fresh_stack(network, self.data), looks[-1]
        for part in {split, split if select == "last" else select}:
            self.data[part]  # a split that is not there is told now
        rates = [usable(source(number).lr) for number in numbers]

        def train(own: Sequence[int], watch: Watch) -> Iterator[tuple[int, State]]:
            for group in companies(stack, {number: (len(source(number)), rates[number]) for number in own}):
                yield from self._train(stack, group, source, inner(rates[group[0]]), batch, watch, label)

        def score(state: State, part: str) -> Scores:
            return accuracy_and_loss(as_trained(stack, state), self.data[part], self.cfg.batch_size_test)

        report = evaluate(train, score, numbers, steps, select, "acc", looks, split, looks, self.ranks)
        optimiser, size = _name_of(inner(rates[0])), len(source(0))
        counts = {"last": "the last counts", "val": "the best on val counts", "train": "the best in training counts"}
        report.protocol |= {
            "protocol": "steps",
            "about": f"{steps} steps of {optimiser}, of which {counts[select]}",
            "split": split,
            "network": network,
            "batch": min(batch or size, size),
            "lr": rates[0] if len({*rates}) == 1 else rates,
            "optimiser": optimiser,
            "augmentation": augmentation,
            "steps": report.protocol.pop("epochs"),
            "chosen_steps": report.protocol.pop("chosen_epochs"),
        }
        return report

    def _train(
        self,
        stack: Stack,
        group: Sequence[int],
        source: Callable[[int], TrainingSet],
        inner: Inner,
        batch: int,
        watch: Watch,
        label: str,
    ) -> Iterable[tuple[int, State]]:
        """Train some networks side by side, and give each with its final state."""
        seeds = [derive_seed(self.seed, "judge net", number) for number in group]
        chances = [generator(self.seed, "judge steps", number) for number in group]
        names = [f"network {number + 1}/{self.cfg.num_eval}" for number in group]
        who = " ".join(filter(None, [label, names[0] if len(group) == 1 else f"{len(group)} networks"]))
        looks, size = self.cfg.looks, len(source(group[0]))
        state, losses = inner.start({"net": stack.draw(seeds)}), []

        def seen() -> tuple[Tensor, Tensor]:
            rows = [some_rows(size, batch, rng) for rng in chances]
            own = [source(number).batch(*each) for number, *each in zip(group, rows, chances, strict=True)]
            images, labels = zip(*own, strict=True)
            return torch.stack(images), torch.stack(labels)

        with progress(total=looks[-1], what=who, leave=False, disable=not label) as bar, seeded(seeds[0], stack.device):
            stack.net.train()
            for step in range(1, looks[-1] + 1):
                loss, grads = stack.gradient(state["net"], *seen())
                with torch.no_grad():
                    state = inner.step(step - 1, state, {"net": grads})
                losses.append(loss)
                bar.update()
                if len(losses) == CHECK_EVERY or step in looks:
                    bar.set_postfix(loss=f"{_finite(losses, step, label, names):.3f}", refresh=False)
                    losses = []
                if step in looks:
                    for number, found in zip(group, states_of(stack, state["net"]), strict=True):
                        watch(number, step, found)
                    stack.net.train()
        return zip(group, states_of(stack, state["net"]), strict=True)


def some_rows(count: int, size: int, rng: torch.Generator) -> Tensor:
    """`size` of `count` rows, distinct, uniform and in order; all of them where size is 0 or there are no more."""
    return torch.randperm(count, generator=rng)[: size or count].sort().values


def _finite(losses: Sequence[Tensor], step: int, label: str, names: Sequence[str]) -> float:
    """The mean of the losses (K,) of the last steps up to `step`; RunError where one is not finite."""
    found = torch.stack(list(losses))  # steps, K
    bad = (~torch.isfinite(found)).nonzero()
    if len(bad):
        first, network = bad[0].tolist()
        where = f"{label} {names[network]}, step {step - len(losses) + first + 1}".strip()
        raise RunError(f"{where}: the loss is not finite; lower the rate")
    return float(found.mean())


def _name_of(inner: Inner) -> str:
    """An optimiser in words, its rate apart."""
    if isinstance(inner, InnerAdam):
        return "Adam"
    parts = [f"momentum {inner.momentum:g}"] if inner.momentum else []
    parts += [f"weight decay {inner.weight_decay:g}"] if inner.weight_decay else []
    parts += [f"rate x {inner.gamma:g} at {' and '.join(map(str, inner.milestones))}"] if inner.milestones else []
    return f"SGD ({', '.join(parts)})" if parts else "SGD"
