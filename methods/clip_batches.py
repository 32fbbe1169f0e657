"""What the student of `--method dimefm` sees in a step: images and sentences that have nothing to do with each other.

Both are drawn apart. An epoch is as many batches as the images fill, in an order of its own; sentences have another
order, begun anew with each epoch and whenever they run out. All chance of a step comes from the seed, the step and the
row: neither threads nor processes nor an interruption change what is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.feature_files import Features
from data.image_pools import ImagePool
from data.views import Reader, plain_view, training_view
from methods.core.training import prefetch
from utils.config import option
from utils.errors import UserError
from utils.ranks import Ranks
from utils.rng import generator

_CHOICES = 256  # sentences among which the closest to a held-out image is looked for


@dataclass(frozen=True)
class BatchConfig:
    """What a step of the student's training sees."""

    batch_size: int = option(640, "images a step, over all processes", low=2)  # one has no other to differ from
    text_batch: int = option(0, "sentences a step, over all processes (0: as many as images)", low=0)
    min_crop: float = option(0.08, "least share of an image's area that the student sees", above=0)
    held_out: int = option(
        256,
        "images never learned from, for which the student's choice of a sentence is compared with the teacher's"
        " (a tenth of all at most; 0: none)",
        low=0,
    )

    def check(self) -> None:
        if self.min_crop > 1:
            raise UserError(f"--min_crop is {self.min_crop}; it is a share of an image's area, such as 0.08")

    @property
    def texts(self) -> int:
        """Sentences a step."""
        return self.text_batch or self.batch_size


@dataclass(frozen=True)
class Batch:
    """One process's share of a step.

    views    (b, 3, S, S) uint8, black where an image cannot be decoded
    decoded  (b,) uint8, 1 where it can
    images   (b, d) the teacher's features of the images, `texts` (n, d) of the sentences
    """

    views: Tensor
    decoded: Tensor
    images: Tensor
    texts: Tensor

    def pinned(self) -> Batch:
        """The same in memory that a GPU copies from without the processor; `decoded` stays with the processor."""
        return Batch(self.views.pin_memory(), self.decoded, self.images.pin_memory(), self.texts.pin_memory())


@dataclass(frozen=True)
class HeldOut:
    """Images that are never learned from.

    views   (H, 3, S, S) uint8, their middles
    texts   (K, d) features of sentences, no two alike
    picked  (H,) long, the sentence that the teacher finds closest
    """

    views: Tensor
    texts: Tensor
    picked: Tensor


class Unpaired:
    """The steps of a run.

    images       the pool, and `image_feats` the teacher's features of it, row by row; `text_feats` those of sentences
    size         side of the views in pixels
    workers      threads that decode
    UserError for batches that the pools cannot fill, or that the processes cannot share.
    """

    def __init__(
        self,
        images: ImagePool,
        image_feats: Features,
        text_feats: Features,
        cfg: BatchConfig,
        size: int,
        seed: int,
        ranks: Ranks,
        workers: int = 1,
    ) -> None:
        self.image_feats, self.text_feats, self.cfg, self.size, self.seed = image_feats, text_feats, cfg, size, seed
        self.own_images = ranks.part(cfg.batch_size, "--batch_size")
        self.own_texts = ranks.part(cfg.texts, "--text_batch" if cfg.text_batch else "--batch_size")
        self.pin = ranks.device.type == "cuda"
        self.reader = Reader(images, workers)
        rows = _decodable(image_feats)
        held = min(cfg.held_out, len(rows) // 10)
        apart = torch.zeros(len(rows), dtype=torch.bool)
        apart[_spread(len(rows), held)] = True
        self.held, self.rows, self.texts = rows[apart], rows[~apart], _decodable(text_feats)
        self.per_epoch, self.per_pass = len(self.rows) // cfg.batch_size, len(self.texts) // cfg.texts
        if not self.per_epoch:
            raise UserError(
                f"there are {len(self.rows)} images to learn from, fewer than a batch of {cfg.batch_size}; give a "
                "smaller --batch_size"
            )
        if not self.per_pass:
            raise UserError(
                f"there are {len(self.texts)} sentences, fewer than a batch of {cfg.texts}; give --text_batch "
                f"{len(self.texts)} or less"
            )
        self._orders: dict[str, tuple[Any, Tensor]] = {}

    def stream(self, steps: range) -> Iterator[Batch]:
        """This process's share of these steps, each prepared while the one before it is learned from."""
        return prefetch(self.batch, steps)

    def batch(self, step: int) -> Batch:
        """This process's share of a step, which are counted from 0 through all epochs."""
        epoch, place = divmod(step, self.per_epoch)
        turn, text_place = divmod(place, self.per_pass)
        rows = self._slice("images", self.rows, self.cfg.batch_size, place, epoch)[self.own_images]
        texts = self._slice("texts", self.texts, self.cfg.texts, text_place, epoch, turn)[self.own_texts]

        def view(image: Any, row: int) -> Tensor:
            return training_view(image, generator(self.seed, "view", step, row), self.size, self.cfg.min_crop)

        seen, there = self.reader.batch(rows, view)
        if not there.all():
            views = torch.zeros(len(rows), 3, self.size, self.size, dtype=torch.uint8)
            views[there] = seen.view(-1, *views.shape[1:])
            seen = views
        made = Batch(seen, there.byte(), self.image_feats.rows(rows), self.text_feats.rows(texts))
        return made.pinned() if self.pin else made

    def held_out(self) -> HeldOut | None:
        """What the student's choices are compared on; None where nothing is held out or can be decoded."""
        if not len(self.held):
            return None
        views, there = self.reader.batch(self.held, lambda image, row: plain_view(image, self.size))
        if not there.any():
            return None
        texts = self.text_feats.rows(self.texts[_spread(len(self.texts), min(_CHOICES, len(self.texts)))])
        texts = F.normalize(torch.unique(texts, dim=0), dim=1)
        return HeldOut(views, texts, (self.image_feats.rows(self.held[there]) @ texts.T).argmax(1))

    def example(self) -> str:
        """One image that cannot be decoded, and why."""
        return next(iter(list(self.reader.bad.values())), "one that another process met")  # threads go on adding

    def _slice(self, what: str, rows: Tensor, size: int, place: int, *when: int) -> Tensor:
        """The rows of one batch, in the order of this epoch and turn, which is kept for the next batch."""
        if self._orders.get(what, (None,))[0] != when:
            self._orders[what] = when, torch.randperm(len(rows), generator=generator(self.seed, what, *when))
        return rows[self._orders[what][1][place * size : (place + 1) * size]]


def _decodable(features: Features) -> Tensor:
    """The rows that are features of something."""
    good = torch.ones(len(features), dtype=torch.bool)
    good[sorted(features.bad)] = False
    return good.nonzero().squeeze(1)


def _spread(total: int, count: int) -> Tensor:
    """So many places of `total`, evenly spaced."""
    return torch.arange(count) * total // max(count, 1)
