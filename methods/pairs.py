"""A set of image–text pairs: how it starts, and what of it is learned.

A set has one phase as published by VLDD and LoRS: all of its pairs are trained on together. PTM-ST (Guo et al., ICLR
2026, arXiv 2603.25388) gives each stretch of the experts' training pairs, rates and a similarity of its own; a network
is then trained on one phase after another.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from methods import lors
from methods.core.inner import Draw
from methods.core.retrieval import Corpus, PairSet
from methods.lors import Similarity
from methods.pair_files import GROUPS, SavedPhase, read_phases
from networks.layers import wide
from networks.towers import Towers
from utils.cluster import nearest_to_centres
from utils.config import option
from utils.devices import moved
from utils.errors import UserError
from utils.rng import draw_seed

ENCODED = 128  # images whose way through a frozen trunk is remembered at once


@dataclass(frozen=True)
class PairsConfig:
    """The learned pairs: how many, how they start, how fast they change."""

    num_pairs: tuple[int, ...] = option(
        (100,), "learned pairs N; several numbers: of each phase (PTM-ST)", aliases=("num_queries",), low=1
    )
    pair_init: str = option(
        "random", "real pairs to start from: random, or nearest to k-means centres", choices=("random", "kmeans")
    )
    pix_init: str = option(
        "real", "images start as real ones or as noise of the same mean and spread", choices=("real", "noise")
    )
    txt_init: str = option("real", "embeddings, likewise", choices=("real", "noise"))
    # It may move before a run is resumed; that it is the same file is pinned.
    resume_from: str = option(
        "", "distilled file to begin with: its pairs, similarity and rates (empty: none)", free=True
    )
    image_only: bool = option(False, "learn images; embeddings stay real")
    text_only: bool = option(False, "learn embeddings; images stay real")
    lr_img: float = option(1000.0, "outer rate of the pixels", low=0, free=True)
    lr_txt: float = option(1000.0, "outer rate of the embeddings", low=0, free=True)
    lr_lr: float = option(1e-2, "outer rate of the inner rates", low=0, free=True)
    momentum_syn: float | None = option(None, "momentum of pixels and embeddings (none: --momentum)", low=0)
    momentum_lr: float | None = option(None, "momentum of the inner rates (none: --momentum)", low=0)
    momentum_sim: float | None = option(None, "momentum of the similarity (none: --momentum)", low=0)
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
    ema_decay: float = option(
        0.0, "average the set over the outer steps with this decay; it is judged and saved (PTM-ST: 0.99; 0: no)", low=0
    )

    def check(self) -> None:
        if self.image_only and self.text_only:
            raise UserError("--image_only and --text_only together leave nothing to learn; choose one")
        if self.ema_decay >= 1:
            raise UserError(f"--ema_decay {self.ema_decay} would never move; take one below 1, such as 0.99")
        if not self.num_pairs:
            raise UserError("--num_pairs names no number; give one, such as 100")
        if self.sim_type == "lowrank" and self.sim_rank > min(self.num_pairs):
            least = min(self.num_pairs)
            raise UserError(f"--sim_rank is {self.sim_rank} for {least} pairs; it can be {least} at most")
        if self.resume_from and (self.pair_init, self.pix_init, self.txt_init) != ("random", "real", "real"):
            raise UserError("--resume_from says what to begin with; leave --pair_init, --pix_init and --txt_init out")

    def idle(self) -> dict[str, str]:
        learned = {} if self.sim_type == "lowrank" else dict.fromkeys(("sim_rank", "alpha"), "--sim_type lowrank")
        if self.sim_type == "identity":
            learned |= dict.fromkeys(("lr_sim", "momentum_sim"), "--sim_type full or lowrank")
        rates = ("lr_teacher_img", "lr_teacher_txt") if self.resume_from else ()
        return learned | dict.fromkeys(rates, "a start of its own: --resume_from brings its rates")

    @property
    def total(self) -> int:
        """N, over all phases."""
        return sum(self.num_pairs)


@dataclass(frozen=True)
class PairBatch:
    """What one inner step sees: images (B, 3, H, W) or their features (B, F), texts (B, D), similarity (B, B) or None
    for the identity."""

    images: Tensor
    texts: Tensor
    similarity: Tensor | None


class Phase:
    """Pairs that are trained on together: N images, N embeddings, their similarity, and the two inner rates."""

    def __init__(self, images: Tensor, texts: Tensor, similarity: Similarity, cfg: PairsConfig) -> None:
        self.similarity = similarity
        self.images = images.detach().clone().requires_grad_(not cfg.text_only)
        self.texts = texts.detach().clone().requires_grad_(not cfg.image_only)
        start = {"img": cfg.lr_teacher_img, "txt": cfg.lr_teacher_txt}
        self.lr = {group: torch.tensor(start[group], device=images.device).requires_grad_() for group in GROUPS}
        self._features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def tensors(self) -> list[Tensor]:
        """All that makes up the phase, in a fixed order."""
        return [self.images, self.texts, *self.lr.values(), *self.similarity.leaves]

    @property
    def leaves(self) -> list[Tensor]:
        """What a step differentiates by: the learned tensors, features in place of pixels while they stand for them."""
        seen = self.images if self._features is None else self._features
        return [leaf for leaf in (seen, *self.tensors[1:]) if leaf.requires_grad]

    def draws(self, rng: torch.Generator, steps: int, size: int, consecutive: bool = False) -> list[Draw]:
        """The chance of an inner loop: of each step, up to `size` of the pairs and a seed.

        consecutive   slices of one shuffled order, shuffled anew when the next slice would not fit, as LoRS takes them;
                      otherwise each step shuffles for itself, as VLDD
        """
        order, draws = torch.empty(0, dtype=torch.long), []
        for _ in range(steps):
            if not consecutive or len(order) < min(size, len(self)):
                order = torch.randperm(len(self), generator=rng)
            rows, order = order[:size], order[size:]
            draws.append(Draw(moved(rows, self.images.device), draw_seed(rng)))
        return draws

    def batch(self, draw: Draw) -> PairBatch:
        rows, images = draw.indices, self.images if self._features is None else self._features
        return PairBatch(images[rows], self.texts[rows], self.similarity.matrix(rows))

    @contextmanager
    def encoded(
        self, towers: Towers, draws: Sequence[Draw], forward: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Iterator[None]:
        """Within the block batches hold what a frozen trunk makes of the images that `draws` names, computed once; at
        its end the gradient that reached those features has gone on to the pixels. A trunk that learns sees images.

        forward   what the trunk runs in: a fresh context (core/precision.py)
        """
        if not towers.frozen_trunk:
            yield
            return
        drawn = torch.cat([draw.indices for draw in draws])
        drawn = drawn.unique() if len(drawn) < len(self) else torch.arange(len(self), device=drawn.device)
        with forward():
            if len(drawn) <= ENCODED:
                features = wide(towers.encode(self.images[drawn]))
            else:  # each piece of the trunk's graph is built again when its turn comes
                parts = self.images[drawn].split(ENCODED)
                features = wide(torch.cat([checkpoint(towers.encode, part, use_reentrant=False) for part in parts]))
        rows = features.new_zeros(len(self), features.shape[1]).index_copy_(0, drawn, features.detach())
        self._features = rows.requires_grad_(self.images.requires_grad)
        try:
            yield
            if rows.grad is not None:
                features.backward(rows.grad[drawn])
        finally:
            self._features = None

    def published(self) -> dict[str, Any]:
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

    def take_up(self, part: SavedPhase, path: str) -> None:
        """Begin with a phase of a distilled file; without a graph."""
        self.images.copy_(part.state["image"])
        self.texts.copy_(part.state["text"])
        for group, rate in self.lr.items():
            rate.copy_(part.lr[group])
        leaves, params = self.similarity.leaves, part.params
        fits = [leaf.shape for leaf in leaves] == [param.shape for param in params]
        if part.identity and not fits:
            return  # it has none, and ours begins as none
        if not fits:
            shapes = ", ".join(str(tuple(param.shape)) for param in params) or "no parameters"
            raise UserError(
                f"{path} holds a similarity of {shapes}, which is not --sim_type {self.similarity.kind} (with this "
                "--sim_rank); give those that it was made with"
            )
        for leaf, param in zip(leaves, params, strict=True):
            leaf.copy_(param)
        self.similarity.project()
        ours, theirs = self.similarity.saved()[1], part.state["similarity_mat"]
        if not torch.allclose(ours, theirs.clamp(0, 1) if self.similarity.clamp else theirs, atol=1e-4, rtol=1e-4):
            raise UserError(
                f"{path}: its similarity does not come out at this --alpha (and --clamp_similarity); give those that "
                "it was made with"
            )

    def pair_set(self) -> PairSet:
        """A detached copy to judge."""
        matrix = None if self.similarity.kind == "identity" else self.similarity.saved()[1].to(self.images.device)
        lr = {group: float(rate.detach()) for group, rate in self.lr.items()}
        return PairSet(self.images.detach().clone(), self.texts.detach().clone(), matrix, lr)


class SyntheticPairs:
    """The learned set: its phases, and where it is asked for, their average over the outer steps."""

    def __init__(self, phases: list[Phase], cfg: PairsConfig) -> None:
        self.phases, self.cfg = phases, cfg
        self.average = copy.deepcopy(phases) if cfg.ema_decay else None
        self.leaves = [leaf for phase in phases for leaf in phase.leaves]

    @property
    def shown(self) -> list[Phase]:
        """What is judged and saved."""
        return self.average or self.phases

    def param_groups(self) -> list[dict[str, Any]]:
        cfg, groups = self.cfg, []
        for phase in self.phases:
            groups += [
                ([phase.images], cfg.lr_img, cfg.momentum_syn),
                ([phase.texts], cfg.lr_txt, cfg.momentum_syn),
                (list(phase.lr.values()), cfg.lr_lr, cfg.momentum_lr),
                (phase.similarity.leaves, cfg.lr_sim, cfg.momentum_sim),
            ]
        asked = [
            {"params": [leaf for leaf in leaves if leaf.requires_grad], "lr": rate}
            | ({} if momentum is None else {"momentum": momentum})
            for leaves, rate, momentum in groups
        ]
        return [group for group in asked if group["params"]]

    @torch.no_grad()
    def project(self) -> None:
        for phase in self.phases:
            phase.similarity.project()
            for rate in phase.lr.values() if self.cfg.clamp_lr else ():
                rate.clamp_(min=self.cfg.clamp_lr)
        for kept, phase in zip(self.average or (), self.phases, strict=False):
            if len(self.phases) > 1 and all(leaf.grad is None for leaf in phase.leaves):
                continue  # it was another's turn
            for mean, value in zip(kept.tensors, phase.tensors, strict=True):
                mean.lerp_(value, 1 - self.cfg.ema_decay)

    def trouble(self) -> str | None:
        """What makes this set unfit to go on with, if anything does."""
        found = [(name, at) for phase in self.phases for name, at in _sums(phase)]
        for name, value in zip((name for name, _ in found), torch.stack([at for _, at in found]).tolist(), strict=True):
            if name in GROUPS and not 0 < value < math.inf:
                return f"the learned rate of {name} became {value:.3g}"
            if not math.isfinite(value):
                return f"a learned {name} is not finite"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Every tensor of every phase, and of the average."""
        parts = {"phases": self.phases} | ({"average": self.average} if self.average else {})
        return {
            name: [[tensor.detach().cpu().clone() for tensor in phase.tensors] for phase in phases]
            for name, phases in parts.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for phases, saved in ((self.phases, state["phases"]), (self.average or [], state.get("average", []))):
            for phase, tensors in zip(phases, saved, strict=True):
                for tensor, value in zip(phase.tensors, tensors, strict=True):
                    tensor.copy_(value)

    def published(self) -> dict[str, Any]:
        """A distilled file: LoRS's layout for one phase.

        Of several, the pairs lie one phase after another (`phases` has their numbers), the rates are (phases,), and no
        pair of one phase is similar to one of another.
        """
        parts = [phase.published() for phase in self.shown]
        if len(parts) == 1:
            return parts[0]
        return {
            "image": torch.cat([part["image"] for part in parts]),
            "text": torch.cat([part["text"] for part in parts]),
            "similarity_params": [tensor for part in parts for tensor in part["similarity_params"]],
            "similarity_mat": torch.block_diag(*(part["similarity_mat"] for part in parts)),
            "syn_lr_img": torch.stack([part["syn_lr_img"] for part in parts]),
            "syn_lr_txt": torch.stack([part["syn_lr_txt"] for part in parts]),
            "phases": [len(phase) for phase in self.shown],
        }

    def pair_sets(self) -> list[PairSet]:
        """Detached copies of the phases, to judge."""
        return [phase.pair_set() for phase in self.shown]


def _sums(phase: Phase) -> Iterator[tuple[str, Tensor]]:
    """The rate of each group, and the sum of each learned tensor: scalars that stay on the device."""
    yield from ((group, rate.detach()) for group, rate in phase.lr.items())
    learned = {"image": [phase.images], "text": [phase.texts], "similarity": phase.similarity.leaves}
    yield from ((name, value.detach().sum()) for name, values in learned.items() for value in values)


# The mean and spread of real pairs in the published runs: CLIP-normalised pixels a channel, BERT's [CLS].
_NOISE_IMAGE = ((-0.0626, -0.0221, 0.0680), (1.0451, 1.0752, 1.0539))
_NOISE_TEXT = (-0.0094, 0.5253)


def start_pairs(
    corpus: Corpus,
    cfg: PairsConfig,
    image_size: int,
    rng: torch.Generator,
    features: Callable[[], Tensor] | None = None,
    clamp: bool = False,
) -> SyntheticPairs:
    """The pairs before any outer step: distinct real images (as in training: cropped, flipped) each with one caption.

    features   joint embeddings of one pair per training image (I, F), which k-means clusters; asked for when needed
    clamp      whether the similarity stays in [0, 1]
    """
    train, device = corpus["train"], corpus.device
    images, captions = corpus.random_pairs(cfg.total, rng)
    if cfg.pair_init == "kmeans":
        images = nearest_to_centres(features(), cfg.total, draw_seed(rng))
        if len(cfg.num_pairs) > 1:  # every phase begins with some of all clusters
            images = images[torch.randperm(len(images), generator=rng)]
        captions = torch.tensor([train.captions_of[image][0] for image in images.tolist()])
    pixels = train.train_images(images, rng)
    texts = corpus.texts("train", captions)
    if cfg.pix_init == "noise":
        mean, spread = (torch.tensor(row)[:, None, None] for row in _NOISE_IMAGE)
        pixels = (mean + spread * torch.randn(cfg.total, 3, image_size, image_size, generator=rng)).to(device)
    if cfg.txt_init == "noise":
        mean, spread = _NOISE_TEXT
        texts = (mean + spread * torch.randn(texts.shape, generator=rng)).to(device)
    phases = []
    for own_pixels, own_texts in zip(pixels.split(cfg.num_pairs), texts.split(cfg.num_pairs), strict=True):
        similarity = Similarity(cfg.sim_type, len(own_pixels), cfg.sim_rank, cfg.alpha, rng, device, clamp)
        phases.append(Phase(own_pixels, own_texts, similarity, cfg))
    if cfg.resume_from:
        _take_up(phases, cfg.resume_from)
    return SyntheticPairs(phases, cfg)


@torch.no_grad()
def _take_up(phases: list[Phase], path: str) -> None:
    """Begin with what a distilled file holds; UserError where it is not of these numbers, sizes and kind."""
    found, _ = read_phases(path)
    ours, theirs = ([len(part) for part in parts] for parts in (phases, found))
    if ours != theirs:
        given, needed = (" ".join(map(str, counts)) for counts in (ours, theirs))
        raise UserError(f"{path} holds {needed} pairs, --num_pairs is {given}; give --num_pairs {needed}")
    for phase, part in zip(phases, found, strict=True):
        for what, value, flag in (("images", phase.images, "image_size"), ("texts", phase.texts, "text_encoder")):
            shape = tuple(part.state[what.removesuffix("s")].shape)
            if shape != tuple(value.shape):
                raise UserError(f"{path} holds {what} {shape}, not {tuple(value.shape)}; correct --{flag}")
        phase.take_up(part, path)
