"""The learned set of PoDD: one poster, perhaps a label map, perhaps the inner rate; and what networks see of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.dsa import poster_augment
from data.images import ImageData
from methods.core.image_protocols import Augment
from methods.core.inner import Draw
from methods.core.stepping import some_rows
from methods.poster_files import LoadedPoster
from methods.poster_labels import LABEL_MODES, LABEL_SHAPES, fixed_labels, map_grid, map_labels, map_shape, start_map
from methods.poster_layout import Layout
from utils.config import option
from utils.devices import moved
from utils.errors import UserError
from utils.rng import draw_seed

STRATEGY = "flip_rotate"


@dataclass(frozen=True)
class PatchConfig:
    """What networks see of a poster, and how fast they learn from it."""

    label_mode: str = option(
        "majority",
        "labels that are not learned: the class that owns most of a patch, as released, or shares by area",
        choices=LABEL_MODES,
    )
    inner_lr: float = option(0.001, "inner rate, at which networks are judged, too", above=0)
    distill_batch_size: int = option(0, "patches an inner step (0: all)", low=0)
    syn_strategy: str = option(STRATEGY, "augmentations of patches, joined by _, one a batch; none for none")
    comp_aug: bool = option(False, "flip, color and cutout of --syn_strategy always, and one of the others")

    def check(self) -> None:
        self.augment()

    def augment(self) -> Augment | None:
        """What happens to a batch of patches."""
        return poster_augment(self.syn_strategy, self.comp_aug)

    def idle(self) -> dict[str, str]:
        return {} if self.augment() else {"comp_aug": "a --syn_strategy"}

    @property
    def augmentation(self) -> str:
        """The same in words."""
        if self.augment() is None:
            return "none"
        return self.syn_strategy + (", composed" if self.comp_aug else "")


@dataclass(frozen=True)
class PosterConfig(PatchConfig):
    """What is learned, how it starts, and how fast it changes."""

    poster_init: str = option(
        "noise", "start from noise, as published, or from a real image in each class's area", choices=("noise", "real")
    )
    train_y: bool = option(False, "learn a label map beside the poster")
    comp_ipc: int = option(1, "cells of the label map, in images a class of a set with learned labels", low=1)
    label_shape: str = option(
        "exact",
        "shape of the label map: exact keeps a cell for each class; reference is as released, where some have none",
        choices=LABEL_SHAPES,
    )
    lr: float = option(0.001, "outer rate of the poster", low=0, free=True)
    label_lr_scale: float = option(1.0, "the label map's outer rate is --lr divided by this", above=0, free=True)
    train_lr: bool = option(False, "learn the inner rate as well, by its logarithm")
    lr_lr: float = option(0.001, "outer rate of that logarithm", low=0, free=True)
    clip_coef: float = option(
        0.9, "the poster's gradient is cut at twice a running mean of its norm, which keeps this share a step", low=0
    )

    def check(self) -> None:
        super().check()
        if self.clip_coef >= 1:
            raise UserError(f"--clip_coef {self.clip_coef:g} would never move; take one below 1, such as 0.9")

    def idle(self) -> dict[str, str]:
        fixed = {"comp_ipc", "label_shape", "label_lr_scale"}
        found = {"label_mode": "fixed labels (no --train_y)"} if self.train_y else dict.fromkeys(fixed, "--train_y")
        return super().idle() | found | ({} if self.train_lr else {"lr_lr": "--train_lr"})


@dataclass(frozen=True)
class PosterSet:
    """The patches of a poster to train on, detached.

    patches   (M, C, S, S)
    labels    (M, K) float probabilities
    lr        rate of the inner optimiser
    augment   what happens to a batch, with a generator for its chance (None: nothing)
    """

    patches: Tensor
    labels: Tensor
    lr: float
    augment: Augment | None = None

    def __len__(self) -> int:
        return len(self.patches)

    def batch(self, rows: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """What a network sees of some patches; all chance is `rng`'s."""
        rows = moved(rows, self.patches.device)
        images = self.patches[rows]
        return images if self.augment is None else self.augment(images, rng), self.labels[rows]


class Poster:
    """The learned set.

    poster      (C, H, W) leaf
    label_map   (K, h, w) leaf, None where labels are fixed
    norm        running mean of the gradient's norm, by which it is cut; negative before the first step
    """

    def __init__(self, poster: Tensor, label_map: Tensor | None, layout: Layout, cfg: PosterConfig) -> None:
        self.cfg, self.layout, device = cfg, layout, poster.device
        self.poster = poster.detach().clone().requires_grad_()
        self.label_map = None if label_map is None else label_map.detach().clone().requires_grad_()
        self.log_lr = torch.tensor(math.log(cfg.inner_lr), device=device, requires_grad=cfg.train_lr)
        self.norm = torch.tensor(-1.0, device=device)
        self._next_norm: Tensor | None = None
        if label_map is None:
            self._labels = fixed_labels(layout, cfg.label_mode).to(device)
        else:
            self._cells = map_grid(layout, tuple(label_map.shape[1:]))
        count = len(layout.patches)
        if cfg.distill_batch_size > count:
            raise UserError(f"--distill_batch_size {cfg.distill_batch_size} is more than the {count} patches; lower it")
        self.batch_size = cfg.distill_batch_size or count

    @property
    def leaves(self) -> list[Tensor]:
        everything = [self.poster, self.label_map, self.log_lr]
        return [leaf for leaf in everything if leaf is not None and leaf.requires_grad]

    @property
    def lr(self) -> Tensor:
        """The inner rate, with a graph to its logarithm where that is learned."""
        return self.log_lr.exp() if self.cfg.train_lr else torch.full_like(self.log_lr, self.cfg.inner_lr)

    def cut(self) -> tuple[Tensor, Tensor]:
        """All patches (M, C, S, S) and their labels (M, K), with a graph to what is learned."""
        patches = self.layout.patches.cut(self.poster)
        return patches, self._labels if self.label_map is None else map_labels(self.label_map, self._cells)

    def draws(self, rng: torch.Generator, steps: int) -> list[Draw]:
        """The chance of an inner loop: each step has distinct patches, in their order, and a seed of its own."""
        count = len(self.layout.patches)
        rows = [some_rows(count, self.batch_size, rng) for _ in range(steps)]
        return [Draw(moved(chosen, self.poster.device), draw_seed(rng)) for chosen in rows]

    def poster_set(self, augment: Augment | None) -> PosterSet:
        """A detached copy to judge."""
        with torch.no_grad():
            patches, labels = self.cut()
            return PosterSet(patches.contiguous(), labels.clone(), float(self.lr), augment)

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Cut the poster's gradient at twice the running mean of its norm, which this norm enters first; the norm.

        The mean stays as it is until `project`: a step that is skipped, or computed again after a crash, leaves no
        trace. Source: RaT-BPTT (Feng et al., ICLR 2024).
        """
        norm, share = self.poster.grad.norm(), self.cfg.clip_coef
        self._next_norm = torch.where(self.norm < 0, norm, share * self.norm + (1 - share) * norm)
        self.poster.grad.mul_((2 * self._next_norm / norm.clamp_min(1e-30)).clamp_max(1))
        return norm

    def param_groups(self) -> list[dict[str, Any]]:
        groups = [{"params": [self.poster], "lr": self.cfg.lr}]
        if self.label_map is not None:
            groups.append({"params": [self.label_map], "lr": self.cfg.lr / self.cfg.label_lr_scale})
        if self.cfg.train_lr:
            groups.append({"params": [self.log_lr], "lr": self.cfg.lr_lr, "weight_decay": 0.0})
        return groups

    @torch.no_grad()
    def project(self) -> None:
        if self.label_map is not None:
            self.label_map.clamp_(min=0)
        if self._next_norm is not None:
            self.norm, self._next_norm = self._next_norm, None

    def trouble(self) -> str | None:
        """What makes this poster unfit to go on with, if anything does."""
        sums = torch.stack([leaf.detach().sum() for leaf in self.leaves])
        return None if torch.isfinite(sums).all() else "the poster, its labels or its rate are not finite"

    def product(self) -> dict[str, Tensor]:
        """What a distilled file holds: poster, lr and, where it is learned, label_map; on the CPU."""
        parts = {"poster": self.poster, "lr": self.lr} | (
            {} if self.label_map is None else {"label_map": self.label_map}
        )
        return {name: value.detach().cpu().clone() for name, value in parts.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return self.product() | {"log_lr": self.log_lr.detach().cpu().clone(), "norm": self.norm.cpu().clone()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.poster.copy_(state["poster"])
        self.log_lr.copy_(state["log_lr"])
        self.norm.copy_(state["norm"])
        if self.label_map is not None:
            self.label_map.copy_(state["label_map"])


def start_poster(data: ImageData, layout: Layout, cfg: PosterConfig, rng: torch.Generator) -> Poster:
    """The poster before any outer step."""
    draw = real_canvas if cfg.poster_init == "real" else noise_canvas
    return _on_device(draw(data, layout, rng), _start_map(layout, cfg), data, layout, cfg)


def continue_poster(
    path: Path | str, found: LoadedPoster, data: ImageData, layout: Layout, cfg: PosterConfig
) -> Poster:
    """The poster of a file to go on from, at its learned rate if it has one; UserError where it does not fit.

    A label map comes with its shape; where the file has none and --train_y asks for one, it begins anew.
    """
    check_fit(path, found, layout, data)
    if found.label_map is not None and not cfg.train_y:
        raise UserError(f"{path} has learned labels, without which its patches make no sense; give --train_y")
    if cfg.train_lr and found.lr is not None:
        cfg = replace(cfg, inner_lr=found.lr)
    label_map = _start_map(layout, cfg) if found.label_map is None else found.label_map
    return _on_device(found.poster, label_map, data, layout, cfg)


def check_fit(path: Path | str, found: LoadedPoster, layout: Layout, data: ImageData) -> None:
    """UserError where a poster is not of this plan or these images."""
    channels, height, width = found.poster.shape
    if channels != data.channels:
        raise UserError(
            f"{path} has {channels} channels, images of {data.name} have {data.channels}; give the --dataset that it "
            "was made with"
        )
    if (height, width) != layout.patches.canvas:
        planned = " x ".join(map(str, layout.patches.canvas[::-1]))
        raise UserError(
            f"{path} is of {width} x {height} pixels (width x height), the plan of {planned}; give --poster_width "
            f"{width} --poster_height {height}, and the patches and class areas that it was made with"
        )
    if found.label_map is not None and len(found.label_map) != layout.classes:
        raise UserError(
            f"{path} has labels of {len(found.label_map)} classes, {data.name} has {layout.classes}; give the "
            "--dataset that it was made with"
        )


def _start_map(layout: Layout, cfg: PosterConfig) -> Tensor | None:
    if not cfg.train_y:
        return None
    return start_map(layout, map_shape(layout, layout.classes * cfg.comp_ipc, cfg.label_shape))


def _on_device(canvas: Tensor, label_map: Tensor | None, data: ImageData, layout: Layout, cfg: PosterConfig) -> Poster:
    label_map = None if label_map is None else label_map.to(data.device)
    return Poster(canvas.to(data.device), label_map, layout, cfg)


def noise_canvas(data: ImageData, layout: Layout, rng: torch.Generator) -> Tensor:
    """A poster (C, H, W) of noise: an area a class, about a mean of its own, of length 1, blended.

    With m the least distance between two class means, an area is drawn from N(mean, (m/4)² I).
    """
    classes, (height, width) = layout.classes, layout.areas.cell
    means = torch.randn(classes, data.channels * height * width, generator=rng)
    least = torch.pdist(means).min() if classes > 1 else torch.tensor(1.0)
    areas = F.normalize(means + least / 4 * torch.randn(means.shape, generator=rng))
    return layout.areas.blend(areas.view(-1, data.channels, height, width)[layout.owners()])


def real_canvas(data: ImageData, layout: Layout, rng: torch.Generator) -> Tensor:
    """A poster (C, H, W) of real images: a random training image of its class in each area, blended."""
    train = data["train"]
    own = [train.indices_of(label) for label in range(layout.classes)]
    rows = torch.stack([rows[torch.randint(len(rows), (), generator=rng)] for rows in own])
    images = train.images(rows)
    if layout.areas.cell != tuple(images.shape[2:]):
        images = F.interpolate(images, layout.areas.cell, mode="bilinear", antialias=True)
    return layout.areas.blend(images[layout.owners().to(images.device)])
