"""Files of learned pairs: ours and those of LoRS, whose layout ours have, read and checked.

image (N, 3, H, W) normalised, text (N, D), similarity_mat (N, N), similarity_params ([ω, L, R] or [S]), syn_lr_img and
syn_lr_txt; ours also `meta`. A set of several phases has their numbers of pairs in `phases`, rates of shape (phases,),
and the similarity parameters of one phase after those of another (see `pairs.SyntheticPairs.published`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.core.retrieval import PairSet
from utils.errors import UserError
from utils.files import check_version, load_tensors

GROUPS = ("img", "txt")
FORMAT = 1


@dataclass(frozen=True)
class SavedPhase:
    """One phase of a file: its pairs and similarity matrix (by their names there), its factors, and its rates."""

    state: dict[str, Tensor]
    params: list[Tensor]
    lr: dict[str, float]

    def __len__(self) -> int:
        return len(self.state["image"])

    @property
    def identity(self) -> bool:
        return torch.equal(self.state["similarity_mat"], torch.eye(len(self)))

    def floats(self) -> int:
        """How many numbers a user of this phase has to store: pairs, similarity and rates.

        The identity costs nothing; a similarity whose parameters the file lacks costs its whole matrix.
        """
        factors = self.params or [self.state["similarity_mat"]]
        similarity = 0 if self.identity else sum(factor.numel() for factor in factors)
        return self.state["image"].numel() + self.state["text"].numel() + similarity + len(self.lr)

    def pair_set(self, device: torch.device) -> PairSet:
        matrix = None if self.identity else self.state["similarity_mat"].to(device)
        return PairSet(self.state["image"].to(device), self.state["text"].to(device), matrix, self.lr)


def read_phases(path: Path | str) -> tuple[list[SavedPhase], dict[str, Any]]:
    """The phases in a distilled file as they were saved, and what was noted with them."""
    found = load_tensors(path, "distilled file")
    return _phases(path, found), found.get("meta", {})


def _phases(path: Path | str, found: Any) -> list[SavedPhase]:
    """The checked phases of a loaded file; UserError where its parts are missing, damaged or do not fit."""
    names = ("image", "text", "similarity_mat")
    try:
        check_version(path, found.get("meta", {}).get("format", 1), FORMAT)
        whole = {name: found[name].detach().float() for name in names}
        params = [torch.as_tensor(part).detach().float() for part in found.get("similarity_params", [])]
        rates = {group: torch.as_tensor(found[f"syn_lr_{group}"]).detach().reshape(-1).tolist() for group in GROUPS}
        sizes = [int(size) for size in found.get("phases", [len(whole["image"])])]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no file of distilled pairs ({error!r})") from None
    _check(path, whole, rates, sizes)
    each, start, phases = len(params) // len(sizes), 0, []
    for number, size in enumerate(sizes):
        rows = slice(start, start + size)
        state = {name: whole[name][rows] for name in ("image", "text")}
        state["similarity_mat"] = whole["similarity_mat"][rows, rows]
        own = params[number * each : (number + 1) * each]
        phases.append(SavedPhase(state, own, {group: rates[group][number] for group in GROUPS}))
        start += size
    return phases


def _check(path: Path | str, whole: dict[str, Tensor], rates: dict[str, list[float]], sizes: list[int]) -> None:
    images, texts, matrix = whole.values()
    count = len(images)
    if images.dim() != 4 or texts.dim() != 2 or matrix.shape != (count, count) or len(texts) != count:
        shapes = ", ".join(str(tuple(part.shape)) for part in whole.values())
        raise UserError(f"{path}: images, texts and similarity of shapes {shapes} do not belong together")
    if not count or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise UserError(f"{path}: its images have shape {tuple(images.shape)}, not (N, 3, size, size)")
    if sum(sizes) != count or min(sizes) < 1 or any(len(values) != len(sizes) for values in rates.values()):
        raise UserError(f"{path}: {count} pairs and its rates do not make phases of {sizes}")
    for group, values in rates.items():
        for rate in values:
            if not 0 < rate < math.inf:
                raise UserError(f"{path}: its learned rate of {group} is {rate}; take an earlier distilled file")
    for name, value in whole.items():
        if not torch.isfinite(value).all():
            said = name.removesuffix("_mat")
            raise UserError(f"{path}: its {said} values are not finite; take an earlier distilled file")
