"""Files of distilled images: our own, and the tensors that MTT, TESLA, FTD and DATM publish."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import load_tensors, save_tensors

FORMAT = 1


@dataclass(frozen=True)
class LoadedImages:
    """What a distilled file holds.

    images (N, C, H, W), labels (N,) long or (N, K) probabilities, lr None where the file has none; `meta` and `zca` are
    empty for files that others published
    """

    images: Tensor
    labels: Tensor
    lr: float | None
    meta: dict[str, Any] = field(default_factory=dict)
    zca: dict[str, Any] = field(default_factory=dict)

    @property
    def soft(self) -> bool:
        return self.labels.is_floating_point()


def load_images(paths: Sequence[Path | str], labels: Sequence[Path | str] = ()) -> LoadedImages:
    """The images in a distilled file of ours, or in tensor files as MTT, TESLA, FTD and DATM publish them.

    Published files may be several, put one after another. Their labels are those of `labels`, or else of the files
    beside them that are named alike (`images_best.pt`, `labels_best.pt`): classes (N,), probabilities or logits (N, K).
    Their learned rate is in `lr_best.pt`, if anywhere. Files without labels are taken class by class in equal numbers,
    which takes the number of classes: `labels` is then empty, and the caller fills it in.
    """
    states = [load_tensors(path, "distilled file") for path in paths]
    if len(states) == 1 and isinstance(states[0], dict):
        return _own(Path(paths[0]), states[0])
    for path, state in zip(paths, states, strict=True):
        if not torch.is_tensor(state) or state.dim() != 4:
            raise UserError(f"{path} is neither a distilled file nor a tensor of images (N, C, H, W)")
    images = _checked(paths[0], "images", torch.cat([state.detach().float() for state in states]))
    beside = labels or [found for path in paths if (found := _sibling(Path(path), "labels")) is not None]
    found = [load_tensors(path, "labels") for path in beside]
    if not all(torch.is_tensor(part) for part in found):
        raise UserError(f"{beside[0]} holds no tensor of labels")
    merged = torch.cat([part.detach() for part in found]) if found else torch.empty(0, dtype=torch.long)
    if found and len(merged) != len(images):
        raise UserError(f"{beside[0]} and the like hold {len(merged)} labels for {len(images)} images")
    rate = _sibling(Path(paths[0]), "lr")
    lr = None if rate is None else float(torch.as_tensor(load_tensors(rate, "learned rate")).detach())
    return LoadedImages(images, as_targets(merged) if found else merged, lr)


def publish(folder: Path, images: Tensor, labels: Tensor, lr: Tensor) -> None:
    """Write the set as other programs read it: `images_best.pt`, `labels_best.pt` (MTT), `lr_best.pt` (DATM)."""
    for name, tensor in (("images", images), ("labels", labels), ("lr", lr)):
        save_tensors(folder / f"{name}_best.pt", tensor)


def as_targets(labels: Tensor, logits: bool | None = None) -> Tensor:
    """Labels as (N,) long or (N, K) probabilities; scores that are no probabilities (or where `logits`) are logits."""
    if labels.dim() == 1:
        return labels.long()
    labels = labels.float()
    ones = torch.ones(len(labels))
    if logits is None:
        logits = bool((labels < 0).any()) or not torch.allclose(labels.sum(1), ones, atol=1e-3)
    return labels.softmax(1) if logits else labels


def _own(path: Path, state: dict[str, Any]) -> LoadedImages:
    meta = state.get("meta", {})
    if meta.get("format", 1) > FORMAT:
        raise UserError(f"{path} is of format {meta['format']}, newer than this {FORMAT}; update the toolkit")
    try:
        images, labels = state.get("average", state["images"]), state["labels"]
        lr, kind = float(state["lr"]), meta["labels"]
        if images.dim() != 4 or len(labels) != len(images):
            raise ValueError(f"images {tuple(images.shape)}, labels {tuple(labels.shape)}")
        targets = as_targets(labels, kind == "learned")
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no file of distilled images ({error!r})") from None
    if not 0 < lr < math.inf:
        raise UserError(f"{path}: its learned rate is {lr}; take an earlier distilled file")
    return LoadedImages(
        _checked(path, "images", images), _checked(path, "labels", targets), lr, meta, state.get("zca", {})
    )


def _checked(path: Path | str, name: str, values: Tensor) -> Tensor:
    if not len(values) or not torch.isfinite(values).all():
        raise UserError(f"{path}: its {name} are empty or not finite; take an earlier distilled file")
    return values


def _sibling(path: Path, what: str) -> Path | None:
    """`labels_best.pt` or `lr_best.pt` beside `images_best.pt`, where there is one; so for FTD's `ema_images_…`."""
    head, middle, tail = path.name.rpartition("images_")
    place = path.with_name(f"{head}{what}_{tail}")
    return place if middle and place.is_file() else None
