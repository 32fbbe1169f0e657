"""ELEVATER's linear probe: what one linear layer makes of features that never change.

Features are cached vectors, so the encoder cannot learn: the layer's d·K + K numbers are all that is trained. They are
normalised as by a BatchNorm1d without weights, whose statistics do not depend on the layer; hence the learning rates
of the search train side by side on the same batches. The search is ELEVATER's: for each rate the weight decay is
looked for on a grid of 97, coarse to fine, by the best epoch on a fifth of the training images; the best pair then
trains on all of them.

Where ELEVATER's program differs: it reports the best of 50 epochs by the test images themselves (`--elevater_compat`;
here the last), takes a crash for a score of 0 (here it ends the command), and may settle for a pair that diverges once
it trains for longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.config import option
from utils.errors import RunError, UserError
from utils.progress import progress
from utils.rng import generator, seeded
from utils.scores import classification_score

DECAYS = tuple(10 ** (i / 8 - 6) for i in range(97))
SEARCH_LIMIT = 10_000  # images of a class that the search works on; of ELEVATER's sets only Patch-Camelyon has more
MOMENTUM = 0.9
# Learning rate × weight decay from which on SGD with momentum grows weights without end, whatever the loss. A few steps
# do not always show it, so such pairs, of which the published grid has many, lose without a trial.
UNSTABLE = 2 * (1 + MOMENTUM)


@dataclass(frozen=True)
class ProbeConfig:
    """How the linear probe is trained."""

    num_shots: int = option(-1, "training images of each class; -1 is all", low=-1)
    shot_seeds: tuple[int, ...] = option((0, 1, 2), "draws of those images, a probe each", low=0)
    no_tuning: bool = option(False, "no search: one probe with --lr and --l2", aliases=("no-tuning",))
    lr: float = option(0.1, "learning rate without a search", above=0)
    l2: float = option(1e-6, "weight decay without a search", low=0)
    probe_lrs: tuple[float, ...] = option((1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1), "learning rates of the search", above=0)
    search_epochs: int = option(10, "epochs of each trial of the search", low=1)
    probe_epochs: int = option(50, "epochs of the probe that is reported", low=1)
    probe_batch: int = option(64, "batch of the probe", low=2)
    init_head_with_text_encoder: bool = option(True, "the layer begins as the zero-shot class vectors, else at random")

    def check(self) -> None:
        if self.num_shots == 0:
            raise UserError("--num_shots is 0; give a number of images, or -1 for all")
        if not self.probe_lrs or not self.shot_seeds:
            raise UserError("--probe_lrs and --shot_seeds need at least one value each")
        if self.no_tuning and self.lr * self.l2 >= UNSTABLE:
            raise UserError(
                f"--lr {self.lr:g} times --l2 {self.l2:g} is {self.lr * self.l2:g}; from {UNSTABLE:g} on SGD with "
                "momentum diverges, lower one of them"
            )

    def idle(self) -> dict[str, str]:
        found = {"shot_seeds": "--num_shots"} if self.num_shots < 0 else {}
        if self.no_tuning:
            return found | dict.fromkeys(("probe_lrs", "search_epochs"), "a search (--no_tuning false)")
        return found | dict.fromkeys(("lr", "l2"), "--no_tuning")


@dataclass(frozen=True)
class Features:
    """Vectors of images (N, d) float32 and their labels: (N,) long, or (N, K) bool where an image may have several."""

    vectors: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    def rows(self, rows: Tensor) -> Features:
        return Features(self.vectors[rows], self.labels[rows])

    def to(self, device: torch.device) -> Features:
        return Features(self.vectors.to(device, torch.float32), self.labels.to(device))


@dataclass
class Probe:
    """A trained probe.

    score     its metric on the test images after the epoch that is reported, in percent
    epoch     that epoch: the last, or with `compat` the best on test
    scores    (N, K) what it says of the test images
    lr, l2    what it was trained with; `trials`: how many pairs of these were tried; `val`: what the best scored
    trained   how many numbers were learned
    """

    score: float
    epoch: int
    scores: Tensor
    lr: float
    l2: float
    trials: int = 0
    val: float = math.nan
    trained: int = 0


def probe(
    cfg: ProbeConfig,
    train: Features,
    test: Features,
    classes: int,
    metric: str,
    seed: int,
    device: torch.device,
    vectors: Tensor | None = None,
    compat: bool = False,
    what: str = "probe",
) -> Probe:
    """Search for a learning rate and a weight decay, train with them on all training images, score the test images.

    vectors   zero-shot class vectors (K, d) that the layer begins as; None: at random
    compat    report the best epoch by the test images, and ELEVATER's form of the metric
    """
    train, test = train.to(device), test.to(device)

    def heads(count: int) -> Heads:
        with seeded(seed):
            return Heads(count, classes, train.vectors.shape[1], vectors).to(device)

    def score(scores: Tensor, labels: Tensor) -> float:
        return classification_score(metric, scores, labels, compat)

    lr, l2, trials, val = cfg.lr, cfg.l2, 0, math.nan
    if not cfg.no_tuning:
        lr, l2, trials, val = _search(cfg, train, heads, score, seed, what)
    head = heads(1)
    best = Probe(-math.inf, 0, torch.empty(0), lr, l2, trials, val, sum(part.numel() for part in head.parameters()))
    fitting = fit_heads(head, train, [lr], [l2], cfg.probe_epochs, cfg.probe_batch, seed)
    for epoch in progress(fitting, f"{what}, probe", total=cfg.probe_epochs, unit="epoch", leave=False):
        if compat or epoch == cfg.probe_epochs:
            (scores,) = head.scores(test.vectors)
            if not _finite(scores):
                raise RunError(f"{what}: the probe diverged by epoch {epoch} with --lr {lr:g} and --l2 {l2:g}")
            found = score(scores, test.labels)
            if found > best.score:
                best.score, best.epoch, best.scores = found, epoch, scores.cpu()
    return best


# --- the layer -------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """T linear layers on the same normalised features; each begins alike and learns by itself.

    weight  (T, K, d);  bias  (T, K)
    """

    def __init__(self, count: int, classes: int, width: int, vectors: Tensor | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False)
        layer = nn.Linear(width, classes)
        if vectors is not None:
            layer.weight.data.copy_(vectors)
            layer.bias.data.zero_()
        self.weight = nn.Parameter(layer.weight.detach().repeat(count, 1, 1))
        self.bias = nn.Parameter(layer.bias.detach().repeat(count, 1))

    def forward(self, features: Tensor) -> Tensor:
        """(T, B, K) logits of features (B, d)."""
        return self.norm(features) @ self.weight.mT + self.bias[:, None]

    @torch.no_grad()
    def scores(self, features: Tensor) -> Iterator[Tensor]:
        """The logits (N, K) of each head in turn, by the running statistics."""
        normal = self.norm.eval()(features)
        for weight, bias in zip(self.weight, self.bias, strict=True):
            yield normal @ weight.T + bias


def fit_heads(
    heads: Heads,
    train: Features,
    lrs: Sequence[float],
    decays: Sequence[float],
    epochs: int,
    batch: int,
    seed: int,
) -> Generator[int, None, None]:
    """Train each of the heads by SGD with momentum at a learning rate and a weight decay of its own; gives each epoch's
    number when it is over."""
    lr, decay = (torch.tensor(values, device=train.vectors.device)[:, None, None] for values in (lrs, decays))
    rates = ((heads.weight, lr, decay), (heads.bias, lr[:, 0], decay[:, 0]))
    speeds = [torch.zeros_like(part) for part, _, _ in rates]
    rng = generator(seed, "probe batches")
    for epoch in range(1, epochs + 1):
        heads.train()
        for rows in _batches(torch.randperm(len(train), generator=rng), batch):
            part = train.rows(rows.to(train.vectors.device))
            # Summed over the heads: each one's gradient is that of its own mean over the batch.
            loss = _loss(heads(part.vectors), part.labels)
            gradients = torch.autograd.grad(loss, [heads.weight, heads.bias])
            with torch.no_grad():
                for (value, rate, shrink), speed, gradient in zip(rates, speeds, gradients, strict=True):
                    speed.mul_(MOMENTUM).add_(gradient + shrink * value)
                    value.sub_(rate * speed)
        yield epoch


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of (T, B, K) logits, of each class by itself where an image may have several."""
    if labels.ndim == 2:
        targets = labels.to(logits.dtype).expand_as(logits)
        return len(logits) * F.binary_cross_entropy_with_logits(logits, targets)
    return len(logits) * F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """An epoch's batches; a last one of a single image, which has no variance, joins the one before it."""
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


# --- the search ------------------------------------------------------------------------------------------------------


def decay_search() -> Generator[int, float, tuple[int, float]]:
    """ELEVATER's way over the grid of weight decays: gives an index, is sent its score; returns the best of both.

    Every sixteenth first, then 8, 4, 2 and 1 to either side of the best so far. The first of equal scores stays.
    """
    best, top, places = 0, -math.inf, list(range(0, len(DECAYS), 16))
    for span in (8, 4, 2, 1, 0):
        for index in places:
            score = yield index
            if score > top:
                best, top = index, score
        places = [index for index in (max(best - span, 0), min(best + span, len(DECAYS) - 1)) if index != best]
    return best, top


def _search(
    cfg: ProbeConfig,
    train: Features,
    heads: Callable[[int], Heads],
    score: Callable[[Tensor, Tensor], float],
    seed: int,
    what: str,
) -> tuple[float, float, int, float]:
    """The best learning rate and weight decay, after how many trials, and the validation score of the best."""
    learn, held = search_split(train.labels.cpu())
    if not len(learn):
        raise UserError(
            f"{what}: a fifth of each class, rounded up, leaves no image to train on in the search; give more images "
            "of each class, or --no_tuning with --lr and --l2"
        )
    parts = train.rows(learn.to(train.vectors.device)), train.rows(held.to(train.vectors.device))
    searches = {lr: decay_search() for lr in sorted(set(cfg.probe_lrs))}
    asked = {lr: next(search) for lr, search in searches.items()}
    found: dict[float, tuple[int, float]] = {}
    trials = 0
    # At most 15 trials of a rate.
    bar = progress(what=f"{what}, search", total=15 * len(asked) * cfg.search_epochs, unit="epoch", leave=False)
    while asked:
        trials += len(asked)
        scores = _try(cfg, asked, *parts, heads, score, seed, bar)
        asked = {}
        for lr, value in scores.items():
            try:
                asked[lr] = searches[lr].send(value)
            except StopIteration as end:
                found[lr] = end.value
    bar.close()
    lr = max(found, key=lambda lr: found[lr][1])
    index, val = found[lr]
    if val == -math.inf:
        raise RunError(f"{what}: all {trials} trials of the probe diverged; give smaller --probe_lrs")
    return lr, DECAYS[index], trials, val


def _try(
    cfg: ProbeConfig,
    asked: dict[float, int],
    learn: Features,
    held: Features,
    heads: Callable[[int], Heads],
    score: Callable[[Tensor, Tensor], float],
    seed: int,
    bar: Any,
) -> dict[float, float]:
    """Learning rates, each with the index of a decay → the score of its best epoch on `held`; -inf of what diverges."""
    best = dict.fromkeys(asked, -math.inf)
    pairs = {lr: DECAYS[index] for lr, index in asked.items() if lr * DECAYS[index] < UNSTABLE}
    if pairs:
        tried = heads(len(pairs))
        for _ in fit_heads(tried, learn, [*pairs], [*pairs.values()], cfg.search_epochs, cfg.probe_batch, seed):
            for lr, scores in zip(pairs, tried.scores(held.vectors), strict=True):
                # Whatever it scored before it diverged: from then on it stays so.
                best[lr] = max(best[lr], score(scores, held.labels)) if _finite(scores) else -math.inf
            bar.update(len(pairs))
    return best


def _finite(scores: Tensor) -> bool:
    return bool(torch.isfinite(scores).all())


# --- which images ----------------------------------------------------------------------------------------------------


def search_split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the training images that the search learns from and that it is judged by: 80 % and 20 % of each class.

    The first fifth of a class, rounded up, is held out; where images have several classes, class by class the first
    images until it has as many. Of a class with more than 10,000 images the first 10,000 take part.
    """
    wanted = -(-_counts(labels).clamp(max=SEARCH_LIMIT) // 5)
    held = _cover(labels, torch.arange(len(labels)), wanted)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held] = False
    learn = rest.nonzero()[:, 0]
    if labels.ndim == 1:
        learn = learn[_cover(labels[learn], torch.arange(len(learn)), _counts(labels).clamp(max=SEARCH_LIMIT) - wanted)]
    return learn, held


def few_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Rows of `shots` images of each class, drawn; where images have several classes, enough that each has as many."""
    order = torch.randperm(len(labels), generator=generator(seed, "shots"))
    return _cover(labels, order, _counts(labels).clamp(max=shots)).sort().values


def _counts(labels: Tensor) -> Tensor:
    return labels.sum(dim=0) if labels.ndim == 2 else torch.bincount(labels)


def _cover(labels: Tensor, order: Tensor, wanted: Tensor) -> Tensor:
    """The rows, as they follow each other in `order`, that give each class the images it wants; `wanted` (K,) long.

    One class after the other takes its first images, as far as those that others took do not do already.
    """
    rows = order.tolist()
    owned = [row.nonzero()[:, 0].tolist() for row in labels] if labels.ndim == 2 else [[k] for k in labels.tolist()]
    places: list[list[int]] = [[] for _ in wanted]
    for place, row in enumerate(rows):
        for k in owned[row]:
            places[k].append(place)
    left, taken = wanted.tolist(), set()
    for k, own in enumerate(places):
        for place in own:
            if left[k] <= 0:
                break
            if place not in taken:
                taken.add(place)
                for other in owned[rows[place]]:
                    left[other] -= 1
    return order[sorted(taken)]
