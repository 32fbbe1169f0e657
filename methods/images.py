"""A set of labelled images, or of texture canvases: how it starts, what of it is learned, and what networks see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from data.images import ImageData
from methods.core.image_protocols import Augment
from methods.core.inner import Draw
from utils.config import option
from utils.devices import moved
from utils.errors import UserError
from utils.rng import draw_seed


@dataclass(frozen=True)
class SyntheticConfig:
    """The learned images: how many, how they start, how fast they change."""

    ipc: int = option(1, "learned images (or canvases) of each class", low=1)
    pix_init: str = option(
        "",
        "start from real images, noise, or images that experts know (empty: real; textures: noise)",
        choices=("", "real", "noise", "samples_predicted_correctly"),
    )
    labels: str = option(
        "hard",
        "hard: the class; teacher: what the segment's target says of the image (TESLA); learned: logits (DATM)",
        choices=("hard", "teacher", "learned"),
    )
    teacher_label: bool = option(False, "the same as --labels teacher, as TESLA spells it")
    batch_syn: int | None = option(None, "learned images an inner step (none: all)", low=1)
    no_aug: bool = option(False, "no augmentation in the inner loop")
    texture: bool = option(False, "learn seamless canvases, of which each step sees random windows")
    canvas_size: int = option(2, "side of a canvas, in windows", low=1)
    canvas_samples: int = option(1, "windows of each canvas that a step sees", low=1)
    lr_img: float = option(1000.0, "outer rate of the pixels", low=0, free=True)
    lr_lr: float = option(1e-5, "outer rate of the inner rate", low=0, free=True)
    lr_y: float = option(5.0, "outer rate of learned labels", low=0, free=True)
    momentum_y: float = option(0.9, "momentum of learned labels", aliases=("Momentum_y",), low=0)
    lr_teacher: float = option(0.01, "inner rate at the start", above=0)
    clamp_lr: float = option(
        1e-4, "the inner rate never falls below this (0: stop where it is no longer positive)", low=0, free=True
    )
    ema_decay: float = option(0.0, "average the images over the outer steps with this decay (FTD; 0: do not)", low=0)

    def check(self) -> None:
        if self.ema_decay >= 1:
            raise UserError(f"--ema_decay {self.ema_decay} would never move; take one below 1, such as 0.999")
        if self.teacher_label and self.labels == "learned":
            raise UserError("--teacher_label and --labels learned exclude each other; leave one out")
        if self.texture and (self.label_kind != "hard" or self.pix_init == "samples_predicted_correctly"):
            raise UserError(
                "experts judge images of their own size, not canvases: --texture goes with --labels hard and "
                "--pix_init real or noise"
            )

    def idle(self) -> dict[str, str]:
        found = {} if self.texture else dict.fromkeys(("canvas_size", "canvas_samples"), "--texture")
        learned = self.label_kind == "learned"
        return found | ({} if learned else dict.fromkeys(("lr_y", "momentum_y"), "--labels learned"))

    @property
    def label_kind(self) -> str:
        return "teacher" if self.teacher_label else self.labels

    @property
    def start(self) -> str:
        """`pix_init`, decided. The reference's default crashes on textures; noise was its default before them."""
        return self.pix_init or ("noise" if self.texture else "real")


@dataclass(frozen=True)
class ImageSet:
    """Labelled images to train on.

    images    (N, C, H, W) as networks see them, or canvases larger than `size`
    labels    (N,) long, or (N, K) float probabilities
    lr        rate of SGD on them
    size      side of what a network sees
    augment   what happens to a batch, with a generator for its chance (None: nothing)
    samples   windows of each canvas in a batch; 0: the images are no canvases and are seen whole
    """

    images: Tensor
    labels: Tensor
    lr: float
    size: int
    augment: Augment | None = None
    samples: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """What a network sees of some rows: images (B, C, size, size) and labels; all chance is `rng`'s."""
        return seen(self.images[rows], self.labels[rows], self.size, self.samples, self.augment, rng)


def seen(
    images: Tensor, labels: Tensor, size: int, samples: int, augment: Augment | None, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images (B, C, size, size) and their labels; differentiable in both.

    samples   windows that are cut from each image, which is a canvas then; 0: it is seen whole
    """
    if samples:
        images = windows(images, size, samples, rng)
        labels = labels.repeat(samples, *[1] * (labels.dim() - 1))
    return (images if augment is None else augment(images, rng)), labels


def windows(canvases: Tensor, size: int, samples: int, rng: torch.Generator) -> Tensor:
    """Random windows (samples · B, C, size, size) of canvases (B, C, s, s) that go on at their opposite edges.

    Every window has an offset of its own, uniform over the canvas in both directions. All first windows come first.
    Source: Wearable ImageNet (Cazenavette et al., CVPR workshops 2022).
    """
    count, side = len(canvases) * samples, canvases.shape[-1]
    offsets = torch.randint(side, (2, count, 1), generator=rng)
    rows, columns = moved((offsets + torch.arange(size)) % side, canvases.device)  # (count, size) each
    items = torch.arange(len(canvases), device=canvases.device).repeat(samples)[:, None, None]
    return canvases.permute(0, 2, 3, 1)[items, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class SyntheticImages:
    """The learned set: N = classes · ipc images, class by class, their labels, and the inner rate.

    labels   (N,) long where they are the classes, (N, K) logits where they are learned, (N, K) probabilities otherwise
    size     side of what a network sees: smaller than the images where these are canvases
    """

    def __init__(
        self, images: Tensor, labels: Tensor, size: int, cfg: SyntheticConfig, augment: Augment | None = None
    ) -> None:
        self.cfg, self.size, self.augment = cfg, size, None if cfg.no_aug else augment
        self.samples = cfg.canvas_samples if cfg.texture else 0
        self.images = images.detach().clone().requires_grad_()
        self.labels = labels.detach().clone().requires_grad_(cfg.label_kind == "learned")
        self.lr = {"net": torch.tensor(cfg.lr_teacher, device=images.device).requires_grad_()}
        self.average = images.detach().clone() if cfg.ema_decay else None
        self._taught: Tensor | None = None  # what the labels become when the present step is done
        everything = [self.images, self.labels, self.lr["net"]]
        self.leaves = [leaf for leaf in everything if leaf.requires_grad]

    def draws(self, rng: torch.Generator, steps: int) -> list[Draw]:
        """The chance of an inner loop. Images come in shuffled chunks of `batch_syn`, the last (and smaller) one first,
        until none are left; then they are shuffled anew. Source: MTT's released code."""
        count, size, chunks, draws = len(self.images), self.cfg.batch_syn or len(self.images), [], []
        for _ in range(steps):
            chunks = chunks or list(torch.randperm(count, generator=rng).split(size))
            draws.append(Draw(moved(chunks.pop(), self.images.device), draw_seed(rng)))
        return draws

    def batch(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """What one inner step sees: images (B, C, H, W), labels (B,) long or (B, K) probabilities."""
        rows, rng = draw.indices, torch.Generator().manual_seed(draw.seed)
        labels = self.targets(rows) if self._taught is None else self._taught[rows]
        return seen(self.images[rows], labels, self.size, self.samples, self.augment, rng)

    def targets(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Labels as the loss takes them."""
        labels = self.labels[rows]
        return labels.softmax(1) if self.cfg.label_kind == "learned" else labels

    def image_set(self, augment: Augment | None) -> ImageSet:
        """A detached copy to judge: the averaged images, where there is an average."""
        images = (self.images if self.average is None else self.average).detach().clone()
        rate = float(self.lr["net"].detach())
        return ImageSet(images, self.targets().detach().clone(), rate, self.size, augment, self.samples)

    def relabel(self, probabilities: Tensor) -> None:
        """Take `probabilities` (N, K) as labels: TESLA asks each segment's target anew.

        The set itself has them from `project` on. A checkpoint in the middle of a step holds it as the step found it.
        """
        self._taught = probabilities.detach()

    def param_groups(self) -> list[dict[str, Any]]:
        groups = [
            {"params": [self.images], "lr": self.cfg.lr_img},
            {"params": [self.lr["net"]], "lr": self.cfg.lr_lr},
        ]
        if self.labels.requires_grad:
            groups.append({"params": [self.labels], "lr": self.cfg.lr_y, "momentum": self.cfg.momentum_y})
        return groups

    @torch.no_grad()
    def project(self) -> None:
        if self.cfg.clamp_lr:
            self.lr["net"].clamp_(min=self.cfg.clamp_lr)
        if self.average is not None:
            self.average.lerp_(self.images, 1 - self.cfg.ema_decay)
        if self._taught is not None:
            self.labels, self._taught = self._taught, None

    def trouble(self) -> str | None:
        """What makes this set unfit to go on with, if anything does."""
        sums = [self.lr["net"].detach(), self.images.detach().sum(), self.labels.detach().sum().float()]
        rate, *values = torch.stack(sums).tolist()  # one wait for the device
        if not 0 < rate < math.inf:
            return f"the learned rate became {rate:.3g}"
        for name, value in zip(("image", "label"), values, strict=True):
            if not math.isfinite(value):
                return f"a learned {name} is not finite"
        return None

    def state_dict(self) -> dict[str, Any]:
        """images, labels, lr and, where there is one, the average."""
        parts = {"images": self.images, "labels": self.labels, "lr": self.lr["net"]}
        if self.average is not None:
            parts["average"] = self.average
        return {name: value.detach().cpu().clone() for name, value in parts.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images.copy_(state["images"])
        self.lr["net"].copy_(state["lr"])
        if self.labels.requires_grad:
            self.labels.copy_(state["labels"])
        else:
            self.labels = state["labels"].to(self.images.device)
        if self.average is not None:
            self.average.copy_(state["average"])


class Experts(Protocol):
    """What finished experts say of images."""

    count: int

    def logits(self, expert: int, images: Tensor) -> Tensor:
        """(B, K) of one expert at its end."""


def start_images(
    data: ImageData, cfg: SyntheticConfig, rng: torch.Generator, augment: Augment | None, experts: Experts
) -> SyntheticImages:
    """The set before any outer step. UserError where a class has too few images to start from.

    Learned labels start as the mean logits of the experts that are right about the image (DATM); of all experts where
    none is, for which the reference divides by zero.
    """
    classes, tiles = len(data.classes), cfg.canvas_size if cfg.texture else 1
    hard = torch.arange(classes, device=data.device).repeat_interleave(cfg.ipc)
    if cfg.start == "noise":
        side = tiles * data.size
        images = torch.randn(len(hard), data.channels, side, side, generator=rng).to(data.device)
    else:
        known = experts if cfg.start == "samples_predicted_correctly" else None
        chosen = [_pick(data, label, cfg.ipc * tiles**2, rng, known) for label in range(classes)]
        images = _tiled(data["train"].images(torch.cat(chosen)), tiles)
    labels = {"hard": lambda: hard, "teacher": lambda: torch.eye(classes, device=data.device)[hard]}
    labels["learned"] = lambda: _start_logits(images, hard, experts)
    return SyntheticImages(images, labels[cfg.label_kind](), data.size, cfg, augment)


def _pick(data: ImageData, label: int, count: int, rng: torch.Generator, experts: Experts | None) -> Tensor:
    """`count` distinct random training images of a class; with `experts`, such as the first expert is right about, then
    the second, and so on."""
    train = data["train"]
    own = train.indices_of(label)
    if len(own) < count:
        raise UserError(
            f"class {data.classes[label]} has {len(own)} training images, {count} are needed to start from; lower --ipc"
            " (or --canvas_size, or the --holdout)"
        )
    own = own[torch.randperm(len(own), generator=rng)]
    if experts is None:
        return own[:count]
    found, rest = torch.empty(0, dtype=torch.long), own
    for expert in range(experts.count):
        right = torch.cat([experts.logits(expert, train.images(rows)).argmax(1) == label for rows in rest.split(256)])
        found, rest = torch.cat([found, rest[right.cpu()]]), rest[~right.cpu()]
        if len(found) >= count:
            return found[:count]
        if not len(rest):
            break
    raise UserError(
        f"the experts know only {len(found)} images of class {data.classes[label]}, {count} are needed; "
        "train them longer, or take --pix_init real"
    )


def _tiled(images: Tensor, tiles: int) -> Tensor:
    """Canvases (N, C, tiles·H, tiles·W), each of tiles² of the images (N · tiles², C, H, W)."""
    count, channels, height, width = images.shape
    grid = images.view(count // tiles**2, tiles, tiles, channels, height, width)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, tiles * height, tiles * width)


def _start_logits(images: Tensor, labels: Tensor, experts: Experts) -> Tensor:
    every = torch.stack([experts.logits(expert, images) for expert in range(experts.count)])  # (experts, N, K)
    right = (every.argmax(2) == labels).unsqueeze(2).to(every.dtype)
    right = torch.where(right.sum(0, keepdim=True) == 0, torch.ones_like(right), right)
    return (every * right).sum(0) / right.sum(0)
