"""Coresets of image–text pairs: which real pairs herding, k-center and forgetting choose.

The papers compare with them but do not say what they are computed from (VLDD, LoRS: no code either). Here, and in
every report: one pair an image, its first caption, images prepared as for testing; features are what the first expert,
trained on all data, embeds of both at its end. Choosing costs a pass over the training images, forgetting one an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.core.coresets import (
    DEFINITIONS,
    NEVER,
    CoresetConfig,
    check_expert,
    forgetting,
    forgetting_epochs,
    herding,
    k_center,
)
from methods.core.retrieval import Corpus
from methods.core.trajectories import Trajectories
from networks.towers import Towers
from utils.errors import UserError
from utils.progress import progress
from utils.rng import generator

BATCH = 128  # pairs among which a caption has to be the best; as many images are embedded at once
FEATURES = {
    "expert": "image and text embeddings of the first expert after its last epoch",
    "raw": "outputs of the image trunk before any training, and sentence embeddings",
}


class PairCoresets:
    """Chooses pairs of the training split: `pairs("herding", 100)`, or kcenter, or forgetting.

    towers    fit the corpus; they are lent, and end with other weights
    experts   of these towers, the first is asked; None where `cfg.needs_experts` says so

    Features are computed when first needed, and once. UserError, before that, for what cannot be chosen.
    """

    def __init__(self, corpus: Corpus, towers: Towers, experts: Trajectories | None, cfg: CoresetConfig) -> None:
        self.corpus, self.towers, self.experts, self.cfg = corpus, towers, experts, cfg

    def pairs(self, kind: str, count: int) -> tuple[Tensor, Tensor]:
        """(count,) image and (count,) caption indices, long, first choice first; equal on every call."""
        self.check(kind, count)
        if kind == "forgetting":
            images = forgetting(self._correct, count, self.cfg.never_learned, generator(0, "forgetting ties"))
        else:
            images = {"herding": herding, "kcenter": k_center}[kind](self._features, count)
        return images, first_captions(self.corpus, images)

    def check(self, kind: str, count: int) -> None:
        """UserError where so many cannot be chosen, as far as can be told without any work."""
        there = self.corpus["train"].num_images
        if not 1 <= count <= there:
            raise UserError(f"{kind} cannot choose {count} pairs: there are {there} training images; give 1 to {there}")
        if self.cfg.needs_experts([kind]) and self.experts is None:
            raise UserError(f"{kind} asks experts; run buffer.py first, or name their folder by --buffer_path")
        if self.experts is not None:
            check_expert(self.experts, {group: part.shapes for group, part in self.towers.flat.items()}, [kind])

    def about(self, kind: str) -> str:
        """A sentence for reports: what was chosen by what."""
        pairs = "one pair an image, its first caption, test transform"
        if kind == "forgetting":
            epochs = ", ".join(map(str, forgetting_epochs(self.experts)))
            how = (
                f"right: in a fixed random batch of at most {BATCH}, the image's own caption is strictly its best, by "
                f"the first expert after epochs {epochs}; {NEVER[self.cfg.never_learned]}; ties in a fixed random order"
            )
        else:
            how = f"features: {FEATURES[self.cfg.coreset_features]}, each of length one, side by side"
        return f"{DEFINITIONS[kind]}; {pairs}; {how}"

    @cached_property
    def _features(self) -> Tensor:
        return joint_features(self.corpus, self.towers, self.experts if self.cfg.coreset_features == "expert" else None)

    @cached_property
    def _correct(self) -> Tensor:
        return torch.stack([self._right(epoch) for epoch in forgetting_epochs(self.experts)])

    def _right(self, epoch: int) -> Tensor:
        """(I,) bool: whose own caption is best in its batch, as the first expert has it after an epoch."""
        order = torch.randperm(self.corpus["train"].num_images, generator=generator(0, "forgetting batches"))
        self.towers.load(self.experts.read(0, epoch))
        right = torch.empty(len(order), dtype=torch.bool)
        for rows, (u, v) in _embedded(self.corpus, self.towers, order, f"forgetting, epoch {epoch}"):
            scores = u @ v.T
            own = scores.diag().clone()
            right[rows] = (own > scores.fill_diagonal_(-torch.inf).amax(1)).cpu()
        return right


def joint_features(corpus: Corpus, towers: Towers, experts: Trajectories | None) -> Tensor:
    """(I, F): image and first caption of every training image, each of length one, side by side.

    experts   the first of them embeds both, as it is at its end; None: what heads would see of both before any training
    """
    towers.renew(0)
    if experts is not None:
        towers.load(experts.read(0, experts.epochs(0)[-1]))
    order, found = torch.arange(corpus["train"].num_images), None
    for rows, parts in _embedded(corpus, towers, order, "features", raw=experts is None):
        joint = torch.cat(parts, dim=1)
        if found is None:  # all of it at once: a list of parts would be there twice when it is joined
            found = joint.new_empty(len(order), joint.shape[1])
        found[rows] = joint
    return found


def first_captions(corpus: Corpus, images: Tensor) -> Tensor:
    """(n,) long: the first caption of each image."""
    captions_of = corpus["train"].captions_of
    return torch.tensor([captions_of[image][0] for image in images.tolist()])


@torch.no_grad()
def _embedded(
    corpus: Corpus, towers: Towers, order: Tensor, what: str, raw: bool = False
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Batches of about equal size: images (B,), and (B, E) of each and of its first caption, rows of length one."""
    towers.eval()
    for images in progress(order.tensor_split(math.ceil(len(order) / BATCH)), what, leave=False):
        pixels, texts = corpus["train"].eval_images(images), corpus.texts("train", first_captions(corpus, images))
        if raw:
            yield images, (F.normalize(towers.image.trunk(pixels), dim=1), F.normalize(texts, dim=1))
        else:
            yield images, (towers.embed_images(pixels), towers.embed_texts(texts))
