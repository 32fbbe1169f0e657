"""`--doctor`: what is installed, what the machine has, and what a command would need. Nothing is trained or written but
caches that the command itself would make.

    python buffer.py --config configs/mtt/cifar10_1.yaml --doctor
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from utils.config import flat
from utils.errors import UserError
from utils.machine import GIB, compiler, devices, free_bytes, optional, versions
from utils.run import pick_device

PLACES = ("root", "path", "dir", "folder", "file")  # last words of the names of options that are paths


def doctor(verb: str, cfg: Any) -> None:
    """Print it; UserError where the command could not run, with all that is in its way."""
    found, wrong = versions()
    lines = ["python and packages: " + ", ".join(found), *devices()]
    lines.append(f"compiler (--compile): {compiler() or 'none: inner steps run as ever'}")
    if missing := optional():
        lines.append(f"not installed, and needed by a flag alone: {', '.join(missing)}")
    hub = "off" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else "on"
    lines.append(f"downloads of weights (HF_HUB_OFFLINE): {hub}")
    print("\n".join(lines))
    for line in (*_places(cfg), *_needs(verb, cfg, wrong)):
        print(line)
    if wrong:
        raise UserError(f"{verb}.py could not run: " + "; ".join(wrong))
    print(f"nothing is in the way of {verb}.py, as far as can be seen")


def _places(cfg: Any) -> Iterator[str]:
    """The paths that are named, and the room there."""
    given = {name: value for name, value in flat(cfg).items() if isinstance(value, str) and value}
    paths = {name: value for name, value in given.items() if name.rsplit("_", 1)[-1] in PLACES}
    for name, value in {"results": "runs", **paths}.items():
        there = "there" if Path(value).exists() else "not there yet"
        yield f"{name}: {value} ({there}), {free_bytes(value) / GIB:.1f} GiB free"


def _needs(verb: str, cfg: Any, wrong: list[str]) -> Iterator[str]:
    """What a command's data and networks are, as far as they can be had; else why not is added to `wrong`."""

    def tried(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (UserError, OSError) as error:
            wrong.append(str(error))
            return None

    device = tried(lambda: pick_device(cfg.run.device))
    if device is not None:
        yield f"device: {device}"
    known = {"vldd": _pairs, "mtt": _images, "podd": _images}.get(cfg.method)
    sizes = tried(lambda: known(cfg)) if known else None
    if sizes is None:
        return
    about, weights = sizes
    yield about
    if verb == "buffer" and hasattr(cfg, "expert"):
        expert = cfg.expert
        kept = len(expert.save_epochs) or expert.train_epochs + 1
        needed = expert.num_experts * kept * weights * (4 if expert.store_dtype == "float32" else 2)
        yield f"experts: {expert.num_experts} of {kept} snapshots each, {needed / GIB:.2f} GiB"
        place = cfg.real.buffer_path or "runs"
        if needed > (room := free_bytes(place)):
            wrong.append(
                f"the experts take {needed / GIB:.1f} GiB and {place} has {room / GIB:.1f}; give --buffer_path on a "
                "larger disk, --save_epochs or --store_dtype bfloat16"
            )
    if verb == "distill":
        if hasattr(cfg, "match") and not Path(place := cfg.match.buffer_path or "runs").exists():
            wrong.append(f"no experts in {place}; run buffer.py first, or correct --buffer_path")
        yield "memory and time: the first line of the run measures and tells them (--memory_budget)"


def _pairs(cfg: Any) -> tuple[str, int]:
    from methods.core.retrieval import Corpus

    corpus = Corpus(cfg.data, cfg.towers, torch.device("cpu"))
    counts = ", ".join(f"{split} {corpus[split].num_images:,}" for split in ("train", "val", "test"))
    towers = corpus.towers(cfg.data.image_size, 0)
    weights = {group: part.size for group, part in towers.flat.items()}
    told = " and ".join(f"{count:,} of {group}" for group, count in weights.items())
    return f"data: {counts} images; weights that learn: {told}", sum(weights.values())


def _images(cfg: Any) -> tuple[str, int]:
    from data import build_images
    from methods.image_judging import fresh_network
    from networks.flat import FlatModule

    data = build_images(replace(cfg.data, zca=False), "cpu")  # which does not change how many there are
    splits = ("train", "val", "test") if cfg.data.holdout else ("train", "test")
    counts = ", ".join(f"{split} {len(data[split]):,}" for split in splits)
    name = getattr(cfg.net, "model", None) or cfg.net.name
    weights = FlatModule(fresh_network(name, data, 0)).size
    size = f"{data.channels} x {data.size} x {data.size}"
    return f"data: {counts} images of {size} in {len(data.classes)} classes; {name}: {weights:,} weights", weights
