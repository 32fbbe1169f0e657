"""The offline teacher of `--method dimefm`: a CLIP small enough to be trained here, before anything is distilled.

DIME-FM begins with CLIP ViT-L/14, which others trained on 400 million pairs. Where that cannot be downloaded, the tiny
one of networks/tiny.py learns from captioned images (drawn, or a folder's) as CLIP did: with the scores
s_ij = τ cos(v_i, u_j) of a batch's images and sentences, τ learned,

    L = (H(t, softmax_j s_ij) + H(t, softmax_i s_ij)) / 2,   H cross-entropy, t even over the pairs of equal sentences

An image's sentence is its caption or, half of the time, a template that names its class, so class names alone are worth
asking for afterwards. Nothing of this is DIME-FM's; a published CLIP skips it.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.cache import picture
from data.catalogue import CatalogueConfig, build_catalogue
from data.metadata import METADATA, read_metadata
from data.pools import TOY
from data.toy import SHAPES, Drawings, captioned_shapes
from data.views import normalised, plain_view
from methods.clip_learning import check_rate, published_rate
from methods.core.checkpoints import Checkpoints
from methods.core.zero_shot import class_vectors, zero_shot_scores
from networks.clip import Clip, load_clip
from networks.clip_students import decay_groups
from networks.diffusion import TINY
from networks.prompts import PHOTO, fill
from networks.tiny import tiny_clip
from networks.weights import quiet_transformers
from utils.config import option
from utils.errors import RunError, UserError
from utils.files import atomic_folder, digest
from utils.progress import progress
from utils.rng import generator
from utils.run import Run

TEACHER = "teacher"  # the folder of the trained teacher, in the run's
_CAPTIONED = 0.5  # share of images whose sentence is the caption, where there is one
_DECAY = 0.05  # of weights, as the student's
_STEEPEST = math.log(100.0)  # of the learned logit scale, as CLIP's


@dataclass(frozen=True)
class TeacherConfig:
    """Which CLIP teaches, and how the offline one learns."""

    teacher: str = option(
        "ViT-L/14",
        "CLIP: one of OpenAI's, a CLIPModel's folder or hub id, open_clip:ARCHITECTURE:TAG, or tiny (no download)",
    )
    teacher_pairs: str = option(
        TOY, "what --stages teacher learns from: toy, or a folder with train/<class>/ and perhaps metadata.jsonl"
    )
    teacher_images: int = option(3000, "drawn pictures that it learns from", low=12)
    teacher_epochs: int = option(6, "times that it goes through them", low=1)
    teacher_batch: int = option(64, "pairs a step", low=2)
    teacher_lr: float = option(3e-3, "rate of AdamW at its peak", above=0)

    def check(self) -> None:
        check_rate(self.teacher_lr, "teacher_lr")

    def idle(self) -> dict[str, str]:
        return {} if self.teacher_pairs == TOY else {"teacher_images": "--teacher_pairs toy"}


@dataclass(frozen=True)
class Pairs:
    """What the teacher learns from.

    images     (N, 3, S, S) uint8
    sentences  without repetition; `named` (N,) long: which of them names an image's class, `captioned` (N,) long: which
               is its caption, or names its class where it has none
    """

    images: Tensor
    sentences: list[str]
    named: Tensor
    captioned: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        return digest(self.images, self.sentences, self.named, self.captioned)


def read_pairs(cfg: TeacherConfig, size: int, cache_dir: str, workers: int = 0) -> Pairs:
    """The images of `--teacher_pairs`, `size` pixels wide, and their sentences; UserError where there are too few."""
    if cfg.teacher_pairs == TOY:
        images, labels, captions = captioned_shapes("train", cfg.teacher_images, size)
        names, labels = list(SHAPES), labels.tolist()
    else:
        place = CatalogueConfig(dataset="folder", data_path=cfg.teacher_pairs, cache_dir=cache_dir, workers=workers)
        catalogue = build_catalogue(place)
        given = catalogue.root / METADATA
        told = read_metadata(given, catalogue, allow_missing=True) if given.is_file() else {}
        files = [(file, label) for label, group in enumerate(catalogue.train) for file in group]
        names, labels = [kind.label for kind in catalogue.kinds], [label for _, label in files]
        captions = [told.get(file) for file, _ in files]
        images = torch.stack([_view(catalogue.train_root, file, size) for file, _ in files])
    if len(images) < cfg.teacher_batch:
        raise UserError(
            f"--teacher_batch is {cfg.teacher_batch}, and {cfg.teacher_pairs} has {len(images)} images; lower it"
        )
    numbers: dict[str, int] = {}
    plain = [numbers.setdefault(fill(PHOTO[0], name), len(numbers)) for name in names]
    named = [plain[label] for label in labels]
    captioned = [
        number if caption is None else numbers.setdefault(caption, len(numbers))
        for caption, number in zip(captions, named, strict=True)
    ]
    return Pairs(images, list(numbers), torch.tensor(named), torch.tensor(captioned))


def contrastive_loss(scores: Tensor, sentences: Tensor) -> Tensor:
    """The loss of a batch of pairs whose image i and sentence j score (B, B); equal numbers (B,): equal sentences."""
    same = (sentences[:, None] == sentences).to(scores.dtype)
    target = same / same.sum(1)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


class Learner:
    """A CLIP under training, whose whole state can be saved between two steps; all chance follows seed and step."""

    def __init__(self, clip: Clip, pairs: Pairs, cfg: TeacherConfig, seed: int) -> None:
        self.clip, self.pairs, self.cfg, self.seed, self.done = clip, pairs, cfg, seed, 0
        self.per_epoch = len(pairs) // cfg.teacher_batch
        self.steps = cfg.teacher_epochs * self.per_epoch
        clip.net.requires_grad_(True).train()
        self.optimizer = torch.optim.AdamW(decay_groups(clip.net, _DECAY), lr=0.0, betas=(0.9, 0.98), eps=1e-6)
        self.device = clip.net.logit_scale.device
        self._pictures, self._tokens = Drawings(pairs.images), clip.tokens(pairs.sentences)

    def step(self) -> float:
        """Learn from the next batch; the loss before."""
        epoch, place = divmod(self.done, self.per_epoch)
        size, rng = self.cfg.teacher_batch, generator(self.seed, "teacher", "step", self.done)
        order = torch.randperm(len(self.pairs), generator=generator(self.seed, "teacher", "order", epoch))
        rows = order[place * size : (place + 1) * size]
        told = torch.rand(size, generator=rng) < _CAPTIONED
        sentences = torch.where(told, self.pairs.captioned[rows], self.pairs.named[rows])
        pixels = self._pictures.augmented(rows, rng, self.device).to(self.device)
        loss = self._loss(normalised(pixels, self.clip.mean, self.clip.std), sentences)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = published_rate(self.done, self.steps, self.steps // 10, self.cfg.teacher_lr, 0.0, 0.0)
        self.optimizer.step()
        with torch.no_grad():
            self.clip.net.logit_scale.clamp_(max=_STEEPEST)
        self.done += 1
        return float(loss.detach())

    def _loss(self, pixels: Tensor, sentences: Tensor) -> Tensor:
        tokens = {name: value[sentences].to(self.device) for name, value in self._tokens.items()}
        images = F.normalize(self.clip.embed_images(pixels), dim=1)
        texts = F.normalize(self.clip.embed_texts(tokens), dim=1)
        return contrastive_loss(self.clip.net.logit_scale.exp() * images @ texts.T, sentences.to(self.device))

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.clip.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "pairs": self.pairs.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["pairs"] != self.pairs.digest:
            raise ValueError("it learned from other pairs")
        self.clip.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]


def train_teacher(cfg: TeacherConfig, run: Run, cache_dir: str, workers: int = 0) -> Path:
    """The folder of the tiny CLIP, trained, in the run's folder; it is not trained twice.

    A run that was killed goes on from its last epoch and ends in the same files. UserError for another CLIP than the
    tiny one, RunError where the loss is not finite.
    """
    target = run.folder / TEACHER
    if cfg.teacher != TINY:
        raise UserError(f"--stages teacher trains the tiny CLIP, not {cfg.teacher}; add --teacher tiny or leave it out")
    if target.is_dir():
        print(f"the teacher is trained already: {target}")
        return target
    clip = load_clip(TINY, cache_dir, run.device)
    learner = Learner(clip, read_pairs(cfg, clip.image_size, cache_dir, workers), cfg, run.seed)
    _learn(learner, run)
    clip.net.requires_grad_(False).eval()
    if cfg.teacher_pairs == TOY:
        found, chance = shape_accuracy(clip), 100 / len(SHAPES)
        print(f"the teacher knows {found:.1f} % of drawn shapes by their names (chance {chance:.1f} %)")
    with atomic_folder(target) as temporary, quiet_transformers():
        shutil.copytree(tiny_clip(cache_dir), temporary, dirs_exist_ok=True)  # its tokenizer, and how it sees images
        clip.net.save_pretrained(temporary)
    return target


def _learn(learner: Learner, run: Run) -> None:
    checkpoints = Checkpoints(run.folder / "checkpoints", TEACHER, learner.per_epoch, 1)
    first = checkpoints.restore(learner)
    run.rewind(first, checkpoints.log_sum)
    with progress(total=learner.steps, initial=first, what="teacher") as bar:
        for step in range(first, learner.steps):
            loss = learner.step()
            if not math.isfinite(loss):
                raise RunError(f"teacher, step {step + 1}: the loss is not finite; lower --teacher_lr")
            run.log(step, teacher_loss=loss)
            if checkpoints.due(learner.done):
                checkpoints.save(learner.done, learner, run.log_sum(learner.done))
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()


def shape_accuracy(clip: Clip) -> float:
    """How many (%) of the drawn shapes that it has not seen a CLIP calls by their names."""
    images, labels, _ = captioned_shapes("test", 0, clip.image_size)
    vectors = clip.images(normalised(images.to(clip.net.logit_scale.device), clip.mean, clip.std)).cpu()
    scores = zero_shot_scores(vectors, class_vectors(clip.texts, list(SHAPES), PHOTO))
    return 100 * float((scores.argmax(1) == labels).double().mean())


def _view(root: Path, file: str, size: int) -> Tensor:
    with picture(root / file, root) as image:
        return plain_view(image.convert("RGB"), size)
