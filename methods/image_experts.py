"""Experts on labelled images that lie on disk: where, what they say, and whether they learned the data at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import published_name
from data.images import ImageData
from data.zca import ZCA
from methods.core.store import TrajectoryStore
from methods.core.trajectories import Trajectories, open_trajectories
from networks.flat import FlatModule
from utils.config import flat
from utils.errors import UserError
from utils.run import read_inputs

WHITENING = "zca.safetensors"  # beside the trajectories
BATCH = 512  # images that an expert sees at once


def leaf(cfg: Any) -> Path:
    """Where trajectories lie below `buffer_path`: as published, except that whitening is always named."""
    data, name = cfg.data, published_name(cfg.data.dataset)
    if name in ("CIFAR10", "CIFAR100"):
        name += "" if data.zca else "_NO_ZCA"
    elif data.zca:
        name += "_ZCA"
    place = Path(name, data.subset, str(data.res or 128)) if name.startswith("ImageNet") else Path(name)
    return place / cfg.net.model


def open_experts(
    root: Path | str, cfg: Any, max_files: int | None = None, max_experts: int | None = None
) -> Trajectories:
    """The experts of a command's data and network in the folder `root`, or below it."""
    return open_trajectories(root, ("net",), (str(leaf(cfg)),), max_files, max_experts)


def whitening(cfg: Any, folder: Path, remedy: str = "restore it, or make the experts anew") -> ZCA | None:
    """The whitening that experts were trained behind: another fit, even of the same images, would be another space."""
    return ZCA.load(folder / WHITENING, remedy) if cfg.data.zca and (folder / WHITENING).exists() else None


def check_same_data(experts: Trajectories, cfg: Any, data: ImageData) -> None:
    """UserError, by the name of the flag where one differs, unless the experts learned the data at hand."""
    if not isinstance(experts, TrajectoryStore):
        if data.name in ("CIFAR10", "CIFAR100"):
            _check_published_name(experts.folder, data.name, cfg.data.zca)
        return
    ours = flat(cfg.data) | {"model": cfg.net.model}
    had = {"zca_kind": "mtt"} | experts.config  # the only kind there was once
    names = ("dataset", "subset", "model", "res", "fit", "zca", "norm", "holdout", "train_limit", "toy_images")
    for name in (*names, "zca_kind") if cfg.data.zca else names:
        was = had.get(name, ours[name])
        if was != ours[name] and (name != "dataset" or published_name(was) != published_name(ours[name])):
            raise UserError(f"the experts in {experts.folder} had --{name} {was}, not {ours[name]}; give what they had")
    was = read_inputs(experts.folder).get("training_set")
    if was != data.fingerprint():
        raise UserError(f"the experts in {experts.folder} learned other images than those of --data_path")
    if cfg.data.zca and not (experts.folder / WHITENING).exists():
        raise UserError(
            f"the whitening of the experts, {experts.folder / WHITENING}, is gone; restore it, or make the experts anew"
        )


def _check_published_name(folder: Path, dataset: str, zca: bool) -> None:
    """UserError where a folder of published trajectories says by its name that they were made with other pixels."""
    names = {dataset: True, f"{dataset}_NO_ZCA": False}
    said = [names[part] for part in folder.absolute().parts[-2:] if part in names]
    if said and said[-1] != zca:
        seen = "whitened" if said[-1] else "plain"
        raise UserError(f"{folder} says by its name that its experts saw {seen} images; correct --zca")


@dataclass(frozen=True)
class Finished:
    """The experts as they ended: what they say of images decides which to begin with, and the first labels (DATM)."""

    experts: Trajectories
    flat_net: FlatModule
    device: torch.device

    @property
    def count(self) -> int:
        return self.experts.count

    def logits(self, expert: int, images: Tensor) -> Tensor:
        """(B, K) of one expert at its end."""
        weights = self.experts.read(expert, self.experts.epochs(expert)[-1])["net"]
        return without_graph(self.flat_net, weights.to(self.device), images)


def without_graph(flat_net: FlatModule, weights: Tensor, images: Tensor) -> Tensor:
    """The outputs (B, K) of a network with these weights (P,), in evaluation mode."""
    flat_net.net.eval()
    with torch.no_grad():
        return torch.cat([flat_net(weights, part) for part in images.split(BATCH)])
