"""What eval.py does alike for all that is made of labelled images: what it is compared with, whether a file fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.images import ImageData, ImagesConfig, ImageSplit
from methods.core.evaluation import Report
from utils.config import option
from utils.errors import UserError
from utils.ranks import ALONE, Ranks


@dataclass(frozen=True)
class FullConfig:
    """How networks are trained on all real images."""

    full_epochs: int = option(50, "epochs on the full data", low=1)
    full_lr: float = option(0.01, "rate on the full data", above=0)
    full_batch: int = option(256, "real images a batch on the full data", low=1)


def random_rows(train: ImageSplit, counts: Sequence[int], rng: torch.Generator) -> Tensor:
    """Random images, distinct, so many of each class: their rows (N,) long, class by class."""
    own = [train.indices_of(label) for label in range(len(counts))]
    return torch.cat([rows[torch.randperm(len(rows), generator=rng)[:n]] for rows, n in zip(own, counts, strict=True)])


def at_best_rate(
    judged: Callable[[float, bool, str], Report], rates: Sequence[float], held_out: bool, ranks: Ranks = ALONE
) -> Report:
    """On test, at the best of the rates; one network tries them, on validation where there is a hold-out and otherwise
    on test.

    judged(rate, scout, split)   a report; `scout`: of one network only, by this process alone
    ranks                        the processes that share the rates to try
    """
    split = "val" if held_out else "test"
    tried = rates[ranks.rank :: ranks.world] if len(rates) > 1 else ()
    own = {rate: mean_accuracy(judged(rate, True, split)) for rate in tried}
    found = {rate: acc for part in ranks.all(own) for rate, acc in part.items()}
    best = max(rates, key=found.__getitem__) if found else rates[0]
    report = judged(best, False, "test")
    report.protocol |= {"rates": list(rates), "rate_chosen_on": split}
    return report


def mean_accuracy(report: Report) -> float:
    return report.mean_std()["acc"][0]


def add_gain(report: Report, random: Report) -> None:
    """Note what a report has over random images, in points: network by network, for these begin alike."""
    each = zip(report.metrics["acc"], random.metrics["acc"], strict=True)
    report.metrics["gain"] = [ours - theirs for ours, theirs in each]


def check_classes(where: Path | str, meta: dict[str, Any], data: ImageData, remedy: str) -> None:
    """UserError where a distilled file is of other classes than the data; `remedy`: the flags that would mend it."""
    named = meta.get("classes", list(data.classes))
    if named != list(data.classes):
        raise UserError(
            f"{where} is of the classes {_some(named)}, {data.name} has {_some(data.classes)}; give the {remedy} that "
            "it was made with"
        )


def check_whitening(where: Path | str, meta: dict[str, Any], data: ImageData) -> None:
    """UserError where a distilled file is of another space than the data's."""
    wanted, here = meta.get("zca"), data.zca.digest if data.zca is not None else None
    if meta and wanted != here:
        raise UserError(
            f"{where} was made with {'another' if here and wanted else 'a' if wanted else 'no'} whitening; give the "
            "--zca (and --zca_kind) that it was made with, or evaluate distilled_best.pt, which carries its own"
        )


def warn_of_whitening(where: Path | str, meta: dict[str, Any], cfg: ImagesConfig) -> None:
    """Say so where a whitening is fitted for a published file that was made in front of another."""
    if cfg.zca and cfg.holdout and not meta:
        print(f"note: {where} notes no whitening; published ones were fitted to all training images: --holdout 0")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
