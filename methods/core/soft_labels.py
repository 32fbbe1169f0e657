"""Photographs judged by students that train on what a teacher makes of them, on soft labels: the protocol `rded`.

In every step the batch is cropped, flipped and mixed, and the student learns the teacher's opinion of these very
pixels: the loss is KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over images, without the factor T².
Source: RDED (Sun et al., CVPR 2024), whose protocol VLCP uses with 500 epochs instead of 300. `--compat_rded` brings
back what its code does beyond that: a second look of the student at each batch, which moves its running statistics
once more, and no batch for images a class other than 1, 10 and 50. Its best of the last tests is `--best_on test`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import random_boxes, random_flip
from data.photographs import IMAGENET_STATS
from methods.core.photo_augment import draw_bands, draw_mix, normalised, resized_crops, shuffle_bands
from methods.core.photo_students import PhotoStudents, ScheduledLoop, StudentConfig, decayed, preset_size
from methods.core.photos import Photos, ShapedBatches
from methods.core.teachers import Teacher
from networks.pretrained import build_architecture
from utils.config import option
from utils.errors import UserError
from utils.rng import derive_seed

EPOCHS = 300
TEMPERATURES = {"cutmix": 20.0, "mixup": 4.0, "none": 20.0}
_BATCHES = {1: 10, 10: 50, 50: 100}  # images a class → images a step, for few classes
_RATES = {
    "mobilenet_v2": 0.0025,
    "efficientnet_b0": 0.002,
    "vgg11": 0.0005,
    "alexnet": 0.0001,
    "vit_b_16": 0.0001,
    "swin_v2_t": 0.0001,
}


@dataclass(frozen=True)
class SoftConfig:
    """The students of --protocol rded, and how they learn from their teacher (see also --arch_name)."""

    stud_name: str = option(
        "resnet18",
        "student of --protocol rded, as torchvision names it, or resnet18_modified, conv3 …",
        aliases=("stud-name",),
    )
    temperature: float = option(0.0, "T of teacher and student (0: 20; 4 with mixup)", low=0)
    re_accum_steps: int = option(
        1, "parts that a step's images are cut into, to save memory", aliases=("re-accum-steps",), low=1
    )
    sgd: bool = option(False, "SGD at 0.1 (see --lr) instead of AdamW")
    cos: bool = option(True, "half a cosine, down to 0.5 of the rate; false: a straight line to 0")
    max_scale_crops: float = option(
        1.0, "largest share of an image that a random crop takes", aliases=("max-scale-crops",), above=0
    )
    compat_rded: bool = option(
        False, "as RDED's code: batch statistics move twice a step, and other ipc than 1, 10, 50 need --batch_size"
    )

    def check(self) -> None:
        if self.max_scale_crops > 1:
            raise UserError(f"--max_scale_crops is {self.max_scale_crops:g}; a crop takes at most 1, the whole image")


def auto_batch(ipc: int, classes: int, dataset: str, strict: bool = False) -> int:
    """Images a step for so many images a class.

    As published for 1, 10 and 50 images a class: 10, 50 and 100, twice that for 100 or 1000 classes, 100 for Tiny
    ImageNet, never more than there are images. In between it is that of the next smaller of the three, which the
    published code does not have: UserError there where `strict`.
    """
    if dataset == "tiny_imagenet":
        return min(100, ipc * classes)
    if strict and ipc not in _BATCHES:
        raise UserError(f"RDED's code has no batch for {ipc} images a class, only for 1, 10 and 50; give --batch_size")
    batch = _BATCHES[max(known for known in _BATCHES if known <= ipc)]
    return min(batch * (2 if classes in (100, 1000) else 1), ipc * classes)


def adamw_rate(student: str) -> float:
    """AdamW's rate for a student, as published; 0.001 for ResNets, RDED's ConvNets and what was never published."""
    return _RATES.get(student, 0.001)


def tested_size(size: int) -> int:
    """Pixels of the short side before the middle is cut out: 256 for 224, never less than that."""
    return max(size // 7 * 8, size)


def rate_factor(epoch: int, epochs: int, cosine: bool = True) -> float:
    """What the rate is multiplied by after so many epochs: half a cosine, which ends at 0.5, or a line to 0."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs / 2)) if cosine else 1 - epoch / epochs


def soft_loss(found: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """KL(softmax(wanted / T) ‖ softmax(found / T)) of logits (B, K), averaged over the batch; not times T²."""
    wanted = F.softmax(wanted / temperature, 1)
    return F.kl_div(F.log_softmax(found / temperature, 1), wanted, reduction="batchmean")


class SoftLabels(PhotoStudents):
    """Students of the protocol on one set of photographs.

    tests    photographs by split: `test`, and `val` where an epoch is chosen by it
    ipc      images a class, which the batch follows
    teacher  whose opinion is learned; its classes are in our order
    dataset  such as imagenet, tiny_imagenet or cifar10, by whose presets size and batch go
    label    the name on progress bars
    """

    def __init__(
        self,
        student: StudentConfig,
        cfg: SoftConfig,
        train: Photos,
        tests: dict[str, Photos],
        classes: int,
        ipc: int,
        seed: int,
        device: torch.device,
        teacher: Teacher,
        dataset: str = "imagenet",
        label: str = "",
    ) -> None:
        size = student.size or preset_size(dataset, classes, (teacher.arch, cfg.stud_name))
        super().__init__(train, tests, seed, device, size, tested_size(size))
        self.student, self.cfg, self.teacher, self.label, self.classes = student, cfg, teacher, label, classes
        teacher.net.to(device).eval().requires_grad_(False)
        self.epochs = student.epochs or EPOCHS
        late = (e + 1 for e in range(9, self.epochs, 10) if e > 0.8 * self.epochs)
        self.visited = frozenset((*late, self.epochs))
        special = dataset == "cifar100" and (teacher.arch, cfg.stud_name) == ("conv3", "conv3")
        self.batch = student.batch_size or (25 if special else 0) or auto_batch(ipc, classes, dataset, cfg.compat_rded)
        self.batch = min(self.batch, len(train))
        self.lr = student.lr or (0.1 if cfg.sgd else 0.002 if special else adamw_rate(cfg.stud_name))
        self.decay = student.wd if student.wd is not None else (1e-4 if cfg.sgd else 0.01)
        self.temperature = cfg.temperature or TEMPERATURES[student.mixing[0]]
        self.protocol = self._protocol()

    def fresh(self) -> nn.Module:
        return build_architecture(self.cfg.stud_name, self.size, self.classes)

    def prepared(self, images: Tensor) -> Tensor:
        return normalised(images, IMAGENET_STATS)

    @functools.cached_property
    def source(self) -> ShapedBatches:
        """The training photographs, with as many pixels as a crop of 1/factor of the area needs."""
        side = math.ceil(self.size * math.sqrt(max(self.student.factor, 2) / 2))  # natives keep √2 times that
        return ShapedBatches(self.photos.natives(side), self.device)

    def _protocol(self) -> dict[str, Any]:
        cfg, student, factor = self.cfg, self.student, self.student.factor
        kind, alpha = student.mixing
        steps = [f"{factor} × {factor} bands shuffled"] if factor > 1 else []
        steps += [f"crops of {1 / factor:.2g} to {cfg.max_scale_crops:g}"] if self._crops else []
        steps += ["flip"] + ([f"{kind} (α {alpha:g})"] if kind != "none" else [])
        return {
            "protocol": "rded",
            "about": "soft labels of a teacher, as in RDED and VLCP",
            "network": cfg.stud_name,
            "parameters": sum(part.numel() for part in self.fresh().parameters()),
            "teacher": f"{self.teacher.arch} ({self.teacher.source})",
            "teacher_accuracy": self.teacher.accuracy,
            "temperature": self.temperature,
            "size": self.size,
            "epochs": self.epochs,
            "factor": factor,
            "batch": self.batch,
            "lr": self.lr,
            "schedule": f"{f'SGD, momentum {student.momentum:g}' if cfg.sgd else 'AdamW'}, decay {self.decay:g}, "
            f"{'half a cosine to half the rate' if cfg.cos else 'a straight line to 0'}",
            "augmentation": ", ".join(steps),
            "compat": cfg.compat_rded,
        }

    @property
    def _crops(self) -> bool:
        return self.student.factor > 1 or self.cfg.max_scale_crops < 1

    def _train(self, net: nn.Module, number: int, on_epoch: Callable[[int], None]) -> None:
        groups = decayed(net, self.decay)
        if self.cfg.sgd:
            optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=self.student.momentum)
        else:
            optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.999))
        loop = ScheduledLoop(
            net,
            optimizer,
            lambda epoch: rate_factor(epoch, self.epochs, self.cfg.cos),
            self.epochs,
            derive_seed(self.seed, "dropout", number),
            lambda batch: self._losses(net, *batch),
        )
        loop.fit(
            lambda epoch: self.batches(number, epoch, self.batch, net),
            on_epoch,
            f"{self.label} student {number + 1}".strip(),
        )

    def _losses(self, net: nn.Module, rows: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
        images = self.augmented(rows, rng)
        kind, alpha = self.student.mixing
        mixed = images if kind == "none" else draw_mix(kind, alpha, len(rows), self.size, rng)(images)
        parts = min(self.cfg.re_accum_steps, len(rows))
        for plain, part in zip(images.tensor_split(parts), mixed.tensor_split(parts), strict=True):
            with torch.no_grad():
                if self.cfg.compat_rded:
                    # A look for the progress bar, in training mode; CutMix had already changed its images in place.
                    net(part if kind == "cutmix" else plain)
                wanted = self.teacher.net(part)
            yield soft_loss(net(part), wanted, self.temperature) * (len(part) / len(rows))

    def augmented(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """(B, 3, size, size) normalised: bands shuffled, a random crop, a random flip."""
        factor, source = self.student.factor, self.source
        bands = draw_bands(len(rows), factor, rng)
        boxes = random_boxes(source.sizes[rows], rng, (1 / factor, max(1 / factor, self.cfg.max_scale_crops)))
        found = torch.empty(len(rows), 3, self.size, self.size, device=self.device)
        for places, images in source.images(rows):
            if factor > 1:
                images = shuffle_bands(images, bands[places])
            found[places.to(self.device)] = resized_crops(images, boxes[places], self.size)
        return self.prepared(random_flip(found, rng))
