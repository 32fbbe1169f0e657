"""Files of posters: our own, and the tensors that PoDD's released code leaves in `checkpoints`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import check_version, load_tensors, save_tensors

FORMAT = 1


@dataclass(frozen=True)
class LoadedPoster:
    """What a file of a poster holds: poster (C, H, W), label_map (K, h, w) or None, lr None where it has none; `meta`
    and `zca` are empty for posters that others published."""

    poster: Tensor
    label_map: Tensor | None
    lr: float | None
    meta: dict[str, Any] = field(default_factory=dict)
    zca: dict[str, Any] = field(default_factory=dict)


def load_poster(path: Path | str) -> LoadedPoster:
    """The poster in a distilled file of ours, or in a published `<run>_poster.pt` with `<run>_label.pt` beside it.

    The released code writes the second one only where labels were learned. UserError for files that are damaged, are no
    posters, or hold what nobody can train on.
    """
    path = Path(path)
    state = load_tensors(path, "poster")
    if isinstance(state, dict):
        return _own(path, state)
    beside = path.with_name("_label".join(path.name.rsplit("_poster", 1)))
    label = load_tensors(beside, "label map") if beside != path and beside.is_file() else None
    return LoadedPoster(_single(path, state), None if label is None else _single(beside, label).clamp(min=0), None)


def publish(folder: Path, poster: Tensor, label_map: Tensor | None) -> None:
    """Write the poster as other programs read it: `best_poster.pt` (1, C, H, W) and `best_label.pt` (1, K, h, w)."""
    save_tensors(folder / "best_poster.pt", poster[None].contiguous())
    if label_map is not None:
        save_tensors(folder / "best_label.pt", label_map[None].contiguous())


def _own(path: Path, state: dict[str, Any]) -> LoadedPoster:
    try:
        meta = state["meta"]
        check_version(path, meta["format"], FORMAT)
        poster, label_map, lr = state["poster"], state.get("label_map"), float(state["lr"])
        torch.tensor(meta["order"]), meta["config"], meta["classes"]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no file of a distilled poster ({error!r})") from None
    if not 0 < lr < math.inf:
        raise UserError(f"{path}: its inner rate is {lr:g}, which nobody can train at; take an earlier file")
    label_map = None if label_map is None else _checked(path, label_map)
    return LoadedPoster(_checked(path, poster), label_map, lr, meta, state.get("zca", {}))


def _single(path: Path, value: Any) -> Tensor:
    """The only item of a published tensor (1, …)."""
    if not torch.is_tensor(value) or value.dim() != 4 or len(value) != 1:
        raise UserError(f"{path} is neither a distilled file nor a published tensor (1, channels, height, width)")
    return _checked(path, value[0].detach().float())


def _checked(path: Path, value: Any) -> Tensor:
    if not torch.is_tensor(value) or value.dim() != 3 or not value.numel() or not torch.isfinite(value).all():
        raise UserError(f"{path}: its poster or label map is empty, not finite, or no map; take an earlier file")
    return value
