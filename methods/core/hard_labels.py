"""Photographs judged by students that train on them with their own, hard labels: the protocol `minimax`.

SGD on cropped, flipped, recoloured and CutMixed photographs, the more epochs the fewer images there are; tested on real
photographs, of which the middle square is taken.
Sources: IDC (Kim et al., ICML 2022), whose protocol Minimax diffusion (Gu et al., CVPR 2024) and VLCP use. Their code
draws its colours from an unseeded generator, which no option here brings back, and reports the best of its tests, which
`--best_on test` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import random_flip
from data.photographs import IMAGENET_STATS
from data.sources import CIFAR_STATS
from methods.core.photo_augment import draw_mix, draw_tint, normalised, random_crops, tinted
from methods.core.photo_students import PhotoStudents, StudentConfig, preset_size
from methods.core.photos import Batches, Photos
from methods.core.training import Recipe, Trainer
from networks.students import NET_TYPES, NORM_TYPES, build_student, student_depth
from utils.config import option
from utils.errors import UserError
from utils.rng import derive_seed

CROP = (0.5, 1.0)  # the random crop's share of the image
_EPOCHS = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500))  # up to so many images a class; 300 beyond


@dataclass(frozen=True)
class HardConfig:
    """The students of --protocol minimax, and what they see."""

    net_type: str = option("resnet_ap", "student of --protocol minimax", aliases=("n",), choices=NET_TYPES)
    depth: int = option(0, "its depth (0: resnet_ap 10, resnet 18, convnet 6 at 224 pixels, 3 at 32)", low=0)
    width: float = option(1.0, "its width, times the published one (convnet, resnet_ap)", above=0)
    norm_type: str = option("instance", "its norm", choices=tuple(NORM_TYPES))
    mix_p: float | None = option(None, "how often a batch is mixed (none: always; half of the time for CIFAR)", low=0)
    dsa: bool | None = option(
        None, "leave out crop, flip and colours, as the published code does for CIFAR (none: only there)"
    )
    rrc: bool = option(True, "crop at random")
    decode_type: str = option(
        "single", "bound: the rule of epochs counts --batch_syn_max images a class at most", choices=("single", "bound")
    )
    batch_syn_max: int = option(128, "see --decode_type", low=1)

    def check(self) -> None:
        if self.mix_p is not None and self.mix_p > 1:
            raise UserError(f"--mix_p is {self.mix_p:g}; a share is at most 1")

    def idle(self) -> dict[str, str]:
        found = {} if self.decode_type == "bound" else {"batch_syn_max": "--decode_type bound"}
        if self.net_type in ("efficient", "densenet"):
            found |= dict.fromkeys(("depth", "norm_type"), "--net_type convnet, resnet or resnet_ap")
        if self.net_type not in ("convnet", "resnet_ap"):
            found["width"] = "--net_type convnet or resnet_ap"
        return found | ({"rrc": "--dsa false"} if self.dsa else {})


def epochs_of(ipc: int, classes: int, factor: int = 1, cap: int = 0) -> int:
    """Epochs by images a class, as published; a `factor` counts each image factor² times, up to `cap` where that is
    given. For 100 classes two thirds, in whole hundreds."""
    count = ipc * factor**2
    count = min(count, cap) if cap else count
    epochs = next((epochs for most, epochs in _EPOCHS if count <= most), 300)
    return 2 * epochs // 3 // 100 * 100 if classes == 100 else epochs


class HardLabels(PhotoStudents):
    """Students of the protocol on one set of photographs.

    tests    photographs by split: `test`, and `val` where an epoch is chosen by it
    ipc      images a class, which the number of epochs follows
    dataset  such as imagenet or cifar10: CIFAR has rules of its own
    label    the name on progress bars
    """

    def __init__(
        self,
        student: StudentConfig,
        cfg: HardConfig,
        train: Photos,
        tests: dict[str, Photos],
        classes: int,
        ipc: int,
        seed: int,
        device: torch.device,
        dataset: str = "imagenet",
        label: str = "",
    ) -> None:
        self.cifar = dataset.startswith("cifar")
        size = student.size or preset_size(dataset, classes)
        super().__init__(train, tests, seed, device, size, size)
        self.cfg, self.student, self.classes, self.label = cfg, student, classes, label
        bound = cfg.batch_syn_max if cfg.decode_type == "bound" else 0
        by_rule = 1000 if self.cifar else epochs_of(ipc, classes, student.factor, bound)
        self.epochs = student.epochs or by_rule
        every = self.epochs if self.cifar else max(1, self.epochs // 100)
        self.visited = frozenset((*range(every, self.epochs + 1, every), self.epochs))
        self.mix_p = (0.5 if self.cifar else 1.0) if cfg.mix_p is None else cfg.mix_p
        self.plain = self.cifar if cfg.dsa is None else cfg.dsa
        self.recipe, self.batch = self._recipe(classes > 100)
        self.protocol = self._protocol()

    def fresh(self) -> nn.Module:
        cfg = self.cfg
        return build_student(
            cfg.net_type, self.size, self.classes, cfg.depth, cfg.width, cfg.norm_type, cifar=self.cifar
        )

    def prepared(self, images: Tensor) -> Tensor:
        return normalised(images, CIFAR_STATS if self.cifar else IMAGENET_STATS)

    @functools.cached_property
    def source(self) -> Batches:
        """The training photographs."""
        return Batches(self.photos.squares(self.size), self.photos.labels, self.device)

    def _recipe(self, many: bool) -> tuple[Recipe, int]:
        """`many`: over 100 classes, for which the published code sets a rate, decay and batch of their own."""
        cfg = self.student
        rate, decay, batch = (0.1, 1e-4, 128) if many else (0.01, 5e-4, 64)
        rate, decay = rate if cfg.lr is None else cfg.lr, decay if cfg.wd is None else cfg.wd
        milestones = (2 * self.epochs // 3, 5 * self.epochs // 6)
        recipe = Recipe({"net": rate}, self.epochs, cfg.momentum, decay, milestones, gamma=0.2)
        return recipe, cfg.batch_size or batch

    def _protocol(self) -> dict[str, Any]:
        cfg, recipe = self.cfg, self.recipe
        depth = student_depth(cfg.net_type, self.size, cfg.depth)
        kind, alpha = self.student.mixing
        mixing = f"{kind} (α {alpha:g}, {self.mix_p:.0%} of batches)" if kind != "none" and self.mix_p else ""
        shown = "" if self.plain else f"{'crop, ' if cfg.rrc else ''}flip, colours, lighting"
        return {
            "protocol": "minimax",
            "about": "hard labels, as in IDC, Minimax diffusion and VLCP",
            "network": f"{cfg.net_type}{f'-{depth}' if depth else ''}",
            "norm": "batch" if cfg.net_type in ("efficient", "densenet") else cfg.norm_type,
            "parameters": sum(part.numel() for part in self.fresh().parameters()),
            "size": self.size,
            "epochs": self.epochs,
            "factor": self.student.factor,
            "batch": self.batch,
            "lr": recipe.lr["net"],
            "schedule": f"SGD, momentum {recipe.momentum:g}, decay {recipe.weight_decay:g}, × 0.2 after epochs "
            f"{recipe.milestones[0]} and {recipe.milestones[1]}",
            "augmentation": ", ".join(filter(None, (shown, mixing))) or "none",
        }

    def _train(self, net: nn.Module, number: int, on_epoch: Callable[[int], None]) -> None:
        trainer = Trainer(net, {"net": list(net.parameters())}, self.recipe, derive_seed(self.seed, "dropout", number))

        trainer.fit(
            lambda epoch: self.batches(number, epoch, self.batch, net),
            lambda batch: self._loss(net, *batch),
            lambda epoch, loss: on_epoch(epoch),
            f"{self.label} student {number + 1}".strip(),
        )

    def _loss(self, net: nn.Module, rows: Tensor, rng: torch.Generator) -> Tensor:
        images, labels = self._augmented(self.source.images(rows), rng), self.source.labels[rows.to(self.device)]
        kind, alpha = self.student.mixing
        # A coin is always tossed, so that a batch's images do not depend on how often batches are mixed.
        if float(torch.rand((), generator=rng)) >= self.mix_p or kind == "none":
            return F.cross_entropy(net(images), labels)
        mix = draw_mix(kind, alpha, len(images), self.size, rng)
        found, others = net(mix(images)), labels[mix.order.to(self.device)]
        return mix.share * F.cross_entropy(found, labels) + (1 - mix.share) * F.cross_entropy(found, others)

    def _augmented(self, images: Tensor, rng: torch.Generator) -> Tensor:
        if not self.plain:
            if self.cfg.rrc:
                images = random_crops(images, self.size, CROP, rng)
            images = random_flip(images, rng)
            images = tinted(images, draw_tint(len(images), rng))
        return self.prepared(images)
