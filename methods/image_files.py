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
from utils.files import check_version, load_tensors, save_tensors

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

    UserError for files that are damaged, do not fit together, or hold what nobody can train on.
    """
    states = [load_tensors(path, "distilled file") for path in paths]
    if len(states) == 1 and isinstance(states[0], dict):
        if labels:
            raise UserError(f"{paths[0]} is no published tensor and has its own labels; leave out --label_files")
        return _own(Path(paths[0]), states[0])
    for path, state in zip(paths, states, strict=True):
        if not torch.is_tensor(state) or state.dim() != 4:
            raise UserError(f"{path} is neither a distilled file nor a tensor of images (N, C, H, W)")
    images = _checked(paths[0], "images", _joined(paths, states).float())
    beside = labels or [found for path in paths if (found := _sibling(Path(path), "labels")) is not None]
    found = [load_tensors(path, "labels") for path in beside]
    for path, part in zip(beside, found, strict=True):
        if not torch.is_tensor(part) or part.dim() not in (1, 2):
            raise UserError(f"{path} holds no tensor of labels (N,) or (N, K)")
    merged = _checked(beside[0], "labels", _joined(beside, found)) if found else torch.empty(0, dtype=torch.long)
    if found and len(merged) != len(images):
        raise UserError(f"{beside[0]} and the like hold {len(merged)} labels for {len(images)} images")
    rate = _sibling(Path(paths[0]), "lr")
    lr = None if rate is None else _published_rate(rate)
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
    try:
        meta = state["meta"]
        check_version(path, meta["format"], FORMAT)
        images, labels = state.get("average", state["images"]), state["labels"]
        lr, kind = float(state["lr"]), meta["labels"]
        if images.dim() != 4 or len(labels) != len(images):
            raise ValueError(f"images {tuple(images.shape)}, labels {tuple(labels.shape)}")
        targets = as_targets(labels, kind == "learned")
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no file of distilled images ({error!r})") from None
    images, targets = _checked(path, "images", images), _checked(path, "labels", targets)
    return LoadedImages(images, targets, _checked_rate(path, lr), meta, state.get("zca", {}))


def _joined(paths: Sequence[Path | str], parts: Sequence[Tensor]) -> Tensor:
    """The tensors of several files, one after another; UserError where they differ in more than their numbers."""
    for path, part in zip(paths, parts, strict=True):
        if part.shape[1:] != parts[0].shape[1:]:
            raise UserError(
                f"{path} holds {tuple(part.shape)} and {paths[0]} {tuple(parts[0].shape)}; they do not belong together"
            )
    return torch.cat([part.detach() for part in parts])


def _published_rate(path: Path) -> float:
    try:
        return _checked_rate(path, float(torch.as_tensor(load_tensors(path, "learned rate")).detach()))
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{path} holds no learned rate, which is one number; remove it to do without") from None


def _checked_rate(path: Path | str, rate: float) -> float:
    if not 0 < rate < math.inf:
        raise UserError(f"{path}: its learned rate is {rate:g}, which nobody can train at; take an earlier file")
    return rate


def _checked(path: Path | str, name: str, values: Tensor) -> Tensor:
    if not len(values) or not torch.isfinite(values).all():
        raise UserError(f"{path}: its {name} are empty or not finite; take an earlier distilled file")
    return values


def _sibling(path: Path, what: str) -> Path | None:
    """`labels_best.pt` or `lr_best.pt` beside `images_best.pt`, where there is one. FTD's averages are `ema_images_…`;
    what belongs to them may be named so too, or plainly."""
    head, middle, tail = path.name.rpartition("images_")
    places = [path.with_name(f"{before}{what}_{tail}") for before in (head, "")]
    return next((place for place in places if middle and place.is_file()), None)
