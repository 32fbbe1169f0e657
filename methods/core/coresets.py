"""Which real samples to keep: herding, k-center and forgetting, as functions of what is known of each sample.

Herding and k-center read the features once a pick, in blocks of rows, and never hold more beside them than one block
and a few numbers a sample: no N × N matrix, no second copy. Both ask only for distances to one point, and these are
sums of squared differences: |x|² − 2xp + |p|² would lose its digits where features lie far from the origin, and a
chosen sample would not be at distance 0 from itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.core.store import Shapes
from methods.core.trajectories import Trajectories, check_trajectories
from utils.config import option
from utils.errors import UserError

DEFINITIONS = {
    "herding": "sample by sample the one that brings the mean of the chosen features nearest to the mean of all "
    "(Welling, ICML 2009)",
    "kcenter": "the sample nearest to the mean of all features, then always the one farthest from those chosen "
    "(Sener and Savarese, ICLR 2018)",
    "forgetting": "the samples that an expert most often got right after one epoch and wrong after the next "
    "(Toneva et al., ICLR 2019)",
}
NEVER = {"most": "those it never got right count as most forgotten", "drop": "those it never got right are left out"}
FEATURES = ("expert", "raw")
_ROWS = 1024  # with 512 features a block is 2 MB, which stays in a core's cache


@dataclass(frozen=True)
class CoresetConfig:
    """What coresets of real data are chosen by."""

    buffer_path: str = option(
        "", "experts that coresets ask (empty: the folder buffers of runs/<method>/<name>)", free=True
    )
    coreset_features: str = option(
        "expert", "what herding and k-center compare: expert, or raw, which needs none", choices=FEATURES
    )
    never_learned: str = option(
        "most", "forgetting: what an expert never got right is most forgotten, or dropped", choices=tuple(NEVER)
    )

    def needs_experts(self, kinds: Sequence[str]) -> bool:
        """Whether any of these coresets cannot be chosen without an expert."""
        return "forgetting" in kinds or (self.coreset_features == "expert" and bool({"herding", "kcenter"} & {*kinds}))

    def idle_for(self, kinds: Sequence[str]) -> dict[str, str]:
        """Options that do nothing for these coresets → what would have them read; for a section's `idle()`."""
        found = {} if {"herding", "kcenter"} & {*kinds} else {"coreset_features": "--data herding or kcenter"}
        found |= {} if "forgetting" in kinds else {"never_learned": "--data forgetting"}
        return found | ({} if self.needs_experts(kinds) else {"buffer_path": "a coreset that asks experts"})


def herding(features: Tensor, count: int) -> Tensor:
    """(count,) long: distinct samples, each the one that brings ‖mean(all) − mean(chosen)‖ to its least.

    features   (N, F) float32, finite

    Ties go to the lower index. Fewer are the beginning of more. UserError unless 1 ≤ count ≤ N.
    Source: Welling, ICML 2009, as in iCaRL (Rebuffi et al., CVPR 2017).
    """
    mean, chosen = _mean(features, count), []
    taken = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    wanted = mean.clone()  # the next sample that would make both means equal: (t + 1) · mean − Σ chosen
    for _ in range(count):
        nearest = int(_distances(features, wanted).masked_fill_(taken, torch.inf).argmin())
        taken[nearest] = True
        chosen.append(nearest)
        wanted += mean - features[nearest].cpu()
    return torch.tensor(chosen)


def k_center(features: Tensor, count: int) -> Tensor:
    """(count,) long: distinct samples, the one nearest to the mean first, then always the farthest from all chosen.

    features   (N, F) float32, finite

    Ties go to the lower index. Fewer are the beginning of more. UserError unless 1 ≤ count ≤ N.
    Source: the greedy 2-approximation of Gonzalez, 1985, as in Sener and Savarese, ICLR 2018.
    """
    chosen = [int(_distances(features, _mean(features, count)).argmin())]
    nearest = torch.full((len(features),), torch.inf, device=features.device)  # to the nearest chosen sample, squared
    for _ in range(count - 1):
        torch.minimum(nearest, _distances(features, features[chosen[-1]]), out=nearest)
        nearest[chosen[-1]] = -1.0  # equal samples are at 0, too, and those are left to choose
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


def forgetting(correct: Tensor, count: int, never: str = "most", rng: torch.Generator | None = None) -> Tensor:
    """(count,) long: the samples that most often were right after one epoch and wrong after the next, most first.

    correct   (epochs, N) bool, whether a sample was right after each epoch
    never     samples that never were right: `most`, before all others; `drop`, not to be chosen
    rng       ties are in its random order; None: the lower index first. Few epochs make many ties

    Fewer are the beginning of more (with an equal `rng`). UserError for fewer than two epochs, or samples than `count`.
    Source: Toneva et al., ICLR 2019.
    """
    correct = correct.cpu()
    if len(correct) < 2:
        raise UserError(f"forgetting compares epochs, {len(correct)} is too few")
    flips = (correct[:-1] & ~correct[1:]).sum(0)
    learned = correct.any(0)
    if never == "most":
        flips[~learned] = len(correct)  # more than any other can have
    order = torch.arange(len(flips)) if rng is None else torch.randperm(len(flips), generator=rng)
    if never == "drop":
        order = order[learned[order]]
    left = "" if never == "most" else " that were ever right; take --never_learned most, or fewer"
    _check_count(count, len(order), left)
    return order[flips[order].argsort(descending=True, stable=True)[:count]]


def check_expert(experts: Trajectories, shapes: Shapes, kinds: Sequence[str]) -> None:
    """UserError unless the first expert is of networks with these shapes, and has what these coresets ask of it."""
    epochs = experts.epochs(0) if experts.count else []
    if not epochs:
        raise UserError(f"no expert in {experts.folder} has begun; run buffer.py to its end")
    check_trajectories(experts, shapes, epochs[-1] + 1, 0, epochs[-1])
    for epoch in forgetting_epochs(experts) if "forgetting" in kinds else ():
        experts.check(0, epoch)


def forgetting_epochs(experts: Trajectories) -> list[int]:
    """After which epochs the first expert is asked what it gets right: not before training, when nothing is known."""
    epochs = [epoch for epoch in experts.epochs(0) if epoch]
    if len(epochs) < 2:
        raise UserError(
            f"forgetting compares epochs, and the first expert in {experts.folder} keeps {epochs or 'none'} after "
            "epoch 0; train longer, or keep more (buffer.py --save_epochs)"
        )
    return epochs


def _mean(features: Tensor, count: int) -> Tensor:
    """(F,) float64 on the CPU, since not every device has it. UserError unless so many finite samples are there."""
    _check_count(count, len(features))
    mean = sum(block.cpu().double().sum(0) for block in features.split(_ROWS)) / len(features)
    if not mean.isfinite().all():
        raise UserError("some features are not finite; take other features, or experts that did not diverge")
    return mean


def _distances(features: Tensor, point: Tensor) -> Tensor:
    """(N,): the squared distance of each sample to a point (F,)."""
    point, found = point.to(features), features.new_empty(len(features))
    block = features.new_empty(min(_ROWS, len(features)), features.shape[1])
    for rows, into in zip(features.split(_ROWS), found.split(_ROWS), strict=True):
        torch.sub(rows, point, out=block[: len(rows)])
        torch.sum(block[: len(rows)].square_(), dim=1, out=into)
    return found


def _check_count(count: int, there: int, which: str = "") -> None:
    if not 1 <= count <= there:
        raise UserError(f"cannot choose {count} of {there} samples{which or f'; the number must be 1 to {there}'}")
