"""How long a poster is learned, on which real images, by which outer optimiser, and when it is judged on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.dsa import poster_augment
from data.images import ImageData
from methods.core.image_protocols import Augment
from methods.core.outer import Plan
from methods.poster import STRATEGY
from methods.poster_window import Windows
from utils.config import option
from utils.errors import UserError
from utils.rng import generator

_OPTIMIZERS = {"Adam": torch.optim.Adam}  # the released code takes other names and uses Adam


@dataclass(frozen=True)
class PosterOuterConfig:
    """How long the outer loop runs, on which real batches, and how often it looks up."""

    epochs: int = option(10000, "passes over the real images", aliases=("epoch",), low=0, free=True)
    max_outer_steps: int = option(0, "stop after so many outer steps (0: --epochs says)", low=0, free=True)
    batch_size: int = option(5000, "real images an outer step", low=1)
    real_strategy: str = option(STRATEGY, "augmentations of real images, joined by _, one a batch; none for none")
    comp_aug_real: bool = option(False, "flip, color and cutout of --real_strategy always, and one of the others")
    real_chunk: int = option(
        100, "real images whose graph is in memory at once (networks with batch norm: all)", low=1, free=True
    )
    outer_optim: str = option("Adam", "outer optimiser", choices=tuple(_OPTIMIZERS))
    eps: float = option(1e-8, "epsilon of the outer optimiser", above=0)
    wd: float = option(0.0, "weight decay of the outer optimiser", low=0)
    segments: int = option(
        0,
        "fresh networks an outer step trains, whose gradients are averaged (0: one for each process)",
        low=0,
        free=True,
    )
    mode: str = option("exact", "replay the window or keep its graphs; equal gradients", choices=("exact", "unroll"))
    patience: int = option(10, "outer steps in a row that may not be finite, before the run ends", low=1, free=True)
    test_freq: int = option(10, "epochs between evaluations (0: only at the end)", low=0)
    update_steps: int = option(
        1, "from epoch 400 int(5 / this) on, evaluations are 10 int(5 / this) epochs apart", low=1
    )
    print_freq: int = option(10, "outer steps between two losses on the progress bar", low=1, free=True)
    checkpoint_every: int = option(10, "outer steps between checkpoints", low=1, free=True)

    def check(self) -> None:
        self.augment()
        if self.update_steps > 5:
            raise UserError(f"--update_steps {self.update_steps} leaves no epochs between evaluations; take 1 to 5")

    def idle(self) -> dict[str, str]:
        found = {} if self.augment() else {"comp_aug_real": "a --real_strategy"}
        return found | ({} if self.test_freq else {"update_steps": "--test_freq"})

    def augment(self) -> Augment | None:
        """What happens to a batch of real images."""
        return poster_augment(self.real_strategy, self.comp_aug_real)

    def plan(self, epoch_steps: int, windows: Windows, segments: int = 1) -> Plan:
        """The outer loop over epochs of so many steps; `segments`: networks of a step."""
        steps = self.epochs * epoch_steps
        iterations = min(steps, self.max_outer_steps or steps)

        def optimizer(groups: list[dict]) -> torch.optim.Optimizer:
            return _OPTIMIZERS[self.outer_optim](groups, eps=self.eps, weight_decay=self.wd)

        def due(step: int) -> bool:
            epoch, between = divmod(step, epoch_steps)
            return step == iterations or (epoch > 0 and not between and self._due(epoch))

        return Plan(
            iterations,
            due,
            optimizer,
            self.checkpoint_every,
            tolerant=True,
            patience=self.patience,
            segments=segments,
            show_every=self.print_freq,
            needs_log=True,  # by its losses the window moves
            finished=windows.finished,
            advice=("lower --inner_lr", "lower --lr"),
        )

    def _due(self, epoch: int) -> bool:
        """Whether to evaluate after so many epochs: as released, seldom once the poster has settled."""
        pace = 5 // self.update_steps
        every = 10 * pace if epoch > 400 * pace else self.test_freq
        return bool(self.test_freq) and epoch % every == 0


class RealBatches:
    """The real images of each outer step: each epoch shuffled anew, its last and smaller batch kept."""

    def __init__(self, data: ImageData, cfg: PosterOuterConfig, seed: int, epoch_steps: int) -> None:
        self.train, self.size, self.augment, self.seed = data["train"], cfg.batch_size, cfg.augment(), seed
        self.epoch_steps = epoch_steps

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Augmented images (B, C, S, S) and their labels (B,) long."""
        epoch, number = divmod(step, self.epoch_steps)
        order = torch.randperm(len(self.train), generator=generator(self.seed, "real", epoch))
        rows = order[number * self.size : (number + 1) * self.size]
        images, labels = self.train.images(rows), self.train.labels[rows.to(self.train.labels.device)]
        if self.augment is not None:
            images = self.augment(images, generator(self.seed, "real augmentation", step))
        return images, labels
