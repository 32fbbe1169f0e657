"""A set of image–text pairs: how it starts, what of it is learned, and the file that holds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods import lors
from methods.core.inner import Draw
from methods.core.retrieval import Corpus, PairSet
from methods.lors import Similarity
from utils.cluster import nearest_to_centres
from utils.config import option
from utils.errors import UserError
from utils.files import load_tensors
from utils.rng import draw_seed

GROUPS = ("img", "txt")
FORMAT = 1


@dataclass(frozen=True)
class PairsConfig:
    """The learned pairs: how many, how they start, how fast they change."""

    num_pairs: int = option(100, "learned pairs N", aliases=("num_queries",), low=1)
    pair_init: str = option(
        "random", "real pairs to start from: random, or nearest to k-means centres", choices=("random", "kmeans")
    )
    pix_init: str = option(
        "real", "images start as real ones or as noise of the same mean and spread", choices=("real", "noise")
    )
    txt_init: str = option("real", "embeddings, likewise", choices=("real", "noise"))
    image_only: bool = option(False, "learn images; embeddings stay real")
    text_only: bool = option(False, "learn embeddings; images stay real")
    lr_img: float = option(1000.0, "outer rate of the pixels", low=0, free=True)
    lr_txt: float = option(1000.0, "outer rate of the embeddings", low=0, free=True)
    lr_lr: float = option(1e-2, "outer rate of the inner rates", low=0, free=True)
    lr_teacher_img: float = option(0.1, "inner rate of the image tower at the start", above=0)
    lr_teacher_txt: float = option(0.1, "inner rate of the text head at the start", above=0)
    # The published --lr_lr=1e-2 throws the rate of an untrained tower below zero in its first step.
    clamp_lr: float = option(
        1e-3, "inner rates never fall below this (0: falling to zero ends the run)", low=0, free=True
    )
    sim_type: str = option("identity", "similarity of learned images and texts (methods/lors.py)", choices=lors.KINDS)
    sim_rank: int = option(10, "rank of the learned similarity", low=1)
    alpha: float = option(3.0, "scale of its low-rank part")
    lr_sim: float = option(10.0, "outer rate of the similarity", low=0, free=True)

    def check(self) -> None:
        if self.image_only and self.text_only:
            raise UserError("--image_only and --text_only together leave nothing to learn; choose one")


@dataclass(frozen=True)
class PairBatch:
    """What one inner step sees: images (B, 3, H, W), texts (B, D), similarity (B, B) or None for the identity."""

    images: Tensor
    texts: Tensor
    similarity: Tensor | None


class SyntheticPairs:
    """The learned set: N images, N embeddings, their similarity, and the two inner rates."""

    def __init__(self, images: Tensor, texts: Tensor, similarity: Similarity, cfg: PairsConfig) -> None:
        device = images.device
        self.cfg, self.similarity = cfg, similarity
        self.images = images.detach().clone().requires_grad_(not cfg.text_only)
        self.texts = texts.detach().clone().requires_grad_(not cfg.image_only)
        start = {"img": cfg.lr_teacher_img, "txt": cfg.lr_teacher_txt}
        self.lr = {group: torch.tensor(start[group], device=device).requires_grad_() for group in GROUPS}
        everything = [self.images, self.texts, *self.lr.values(), *similarity.leaves]
        self.leaves = [leaf for leaf in everything if leaf.requires_grad]

    def draws(self, rng: torch.Generator, steps: int, size: int) -> list[Draw]:
        """The chance of an inner loop: each step its own random `size` of the N pairs, and a seed."""
        orders = [torch.randperm(len(self.images), generator=rng)[:size] for _ in range(steps)]
        return [Draw(order.to(self.images.device), draw_seed(rng)) for order in orders]

    def batch(self, draw: Draw) -> PairBatch:
        rows = draw.indices
        return PairBatch(self.images[rows], self.texts[rows], self.similarity.matrix(rows))

    def param_groups(self) -> list[dict[str, Any]]:
        rates = (
            ([self.images], self.cfg.lr_img),
            ([self.texts], self.cfg.lr_txt),
            (list(self.lr.values()), self.cfg.lr_lr),
            (self.similarity.leaves, self.cfg.lr_sim),
        )
        groups = [{"params": [p for p in params if p.requires_grad], "lr": rate} for params, rate in rates]
        return [group for group in groups if group["params"]]

    @torch.no_grad()
    def project(self) -> None:
        if self.cfg.clamp_lr:
            for rate in self.lr.values():
                rate.clamp_(min=self.cfg.clamp_lr)

    def trouble(self) -> str | None:
        """What makes this set unfit to go on with, if anything does."""
        for group, rate in self.lr.items():
            if not 0 < (value := float(rate.detach())) < math.inf:
                return f"the learned rate of {group} became {value:.3g}"
        learned = {"image": [self.images], "text": [self.texts], "similarity": self.similarity.leaves}
        for name, values in learned.items():
            if not all(torch.isfinite(value.detach().sum()) for value in values):
                return f"a learned {name} is not finite"
        return None

    def state_dict(self) -> dict[str, Any]:
        """The layout of LoRS: image, text, similarity_params, similarity_mat, syn_lr_img, syn_lr_txt."""
        params, matrix = self.similarity.saved()
        return {
            "image": self.images.detach().cpu().clone(),
            "text": self.texts.detach().cpu().clone(),
            "similarity_params": params,
            "similarity_mat": matrix,
            "syn_lr_img": self.lr["img"].detach().cpu().clone(),
            "syn_lr_txt": self.lr["txt"].detach().cpu().clone(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images.copy_(state["image"])
        self.texts.copy_(state["text"])
        for group in GROUPS:
            self.lr[group].copy_(state[f"syn_lr_{group}"])
        for leaf, saved in zip(self.similarity.leaves, state["similarity_params"], strict=False):
            leaf.copy_(saved)

    def pair_set(self) -> PairSet:
        """A detached copy to judge."""
        matrix = None if self.similarity.kind == "identity" else self.similarity.saved()[1].to(self.images.device)
        lr = {group: float(rate.detach()) for group, rate in self.lr.items()}
        return PairSet(self.images.detach().clone(), self.texts.detach().clone(), matrix, lr)


# The mean and spread of real pairs in the published runs: CLIP-normalised pixels a channel, BERT's [CLS].
_NOISE_IMAGE = ((-0.0626, -0.0221, 0.0680), (1.0451, 1.0752, 1.0539))
_NOISE_TEXT = (-0.0094, 0.5253)


def start_pairs(
    corpus: Corpus,
    cfg: PairsConfig,
    image_size: int,
    rng: torch.Generator,
    features: Callable[[], Tensor] | None = None,
) -> SyntheticPairs:
    """The pairs before any outer step: distinct real images (as in training: cropped, flipped) each with one caption.

    features   joint embeddings of one pair per training image (I, F), which k-means clusters; asked for when needed
    """
    train, device = corpus["train"], corpus.device
    images, captions = corpus.random_pairs(cfg.num_pairs, rng)
    if cfg.pair_init == "kmeans":
        images = nearest_to_centres(features(), cfg.num_pairs, draw_seed(rng))
        captions = torch.tensor([train.captions_of[image][0] for image in images.tolist()])
    pixels = train.train_images(images, rng)
    texts = corpus.texts("train", captions)
    if cfg.pix_init == "noise":
        mean, spread = (torch.tensor(row)[:, None, None] for row in _NOISE_IMAGE)
        pixels = (mean + spread * torch.randn(cfg.num_pairs, 3, image_size, image_size, generator=rng)).to(device)
    if cfg.txt_init == "noise":
        mean, spread = _NOISE_TEXT
        texts = (mean + spread * torch.randn(texts.shape, generator=rng)).to(device)
    similarity = Similarity(cfg.sim_type, cfg.num_pairs, cfg.sim_rank, cfg.alpha, rng, device)
    return SyntheticPairs(pixels, texts, similarity, cfg)


def load_pairs(path: Path | str, device: torch.device) -> tuple[PairSet, dict[str, Any]]:
    """The pairs in a distilled file, and what was noted with them (empty for files of LoRS, which note nothing)."""
    state = load_tensors(path, "distilled file")
    try:
        meta = state.get("meta", {})
        if meta.get("format", 1) > FORMAT:
            raise UserError(f"{path} is of format {meta['format']}, newer than this {FORMAT}; update the toolkit")
        images, texts, matrix = (state[name].detach().float() for name in ("image", "text", "similarity_mat"))
        lr = {group: float(torch.as_tensor(state[f"syn_lr_{group}"]).detach()) for group in GROUPS}
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no file of distilled pairs ({error!r})") from None
    if images.dim() != 4 or texts.dim() != 2 or matrix.shape != (len(images), len(images)) or len(texts) != len(images):
        shapes = ", ".join(str(tuple(part.shape)) for part in (images, texts, matrix))
        raise UserError(f"{path}: images, texts and similarity of shapes {shapes} do not belong together")
    if not len(images) or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise UserError(f"{path}: its images have shape {tuple(images.shape)}, not (N, 3, size, size)")
    for group, rate in lr.items():
        if not 0 < rate < math.inf:
            raise UserError(f"{path}: its learned rate of {group} is {rate}; take an earlier distilled file")
    for name, value in (("image", images), ("text", texts), ("similarity", matrix)):
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: its {name} values are not finite; take an earlier distilled file")
    identity = torch.equal(matrix, torch.eye(len(matrix)))
    return PairSet(images.to(device), texts.to(device), None if identity else matrix.to(device), lr), meta
