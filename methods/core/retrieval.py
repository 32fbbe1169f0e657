"""Image–text retrieval: captioned images with their embedded captions, and fresh towers trained and scored on them.

Everything that judges a set of pairs is here: the protocols (how the fresh networks are trained, and which epoch
counts), recall@K on validation or test, and the three kinds of data to judge: a set of pairs, random pairs, all data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import PairData, build_dataset
from data.captions import CaptionSplit, DataConfig
from methods.core.evaluation import FreshConfig, Report, Scores, evaluate, one_by_one
from methods.core.training import Recipe, Trainer, partition, prefetch
from networks.text import TextEncoder, build_text_encoder
from networks.text_cache import cached_embeddings, published_cache
from networks.towers import TowerConfig, Towers, build_towers
from utils.config import option
from utils.devices import moved
from utils.errors import UserError
from utils.metrics import retrieval_recall
from utils.ranks import ALONE, Ranks
from utils.rng import derive_seed, draw_seed, generator

LossFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # u (B, E), v (B, E), similarity (B, B) or None → scalar


class Corpus:
    """A captioned data set and its caption embeddings, which are computed once and cached."""

    def __init__(self, data_cfg: DataConfig, tower_cfg: TowerConfig, device: torch.device) -> None:
        self.data: PairData = build_dataset(data_cfg, device)
        self.device, self._data_cfg, self._tower_cfg = device, data_cfg, tower_cfg
        self._embeddings: dict[str, np.ndarray] = {}
        self._encoded: dict[str, list[Tensor]] = {}

    def __getitem__(self, split: str) -> CaptionSplit:
        return getattr(self.data, split)

    @cached_property
    def encoder(self) -> TextEncoder:
        return build_text_encoder(self._tower_cfg, lambda: self.data.train.captions, self.device)

    def embeddings(self, split: str) -> np.ndarray:
        """The embedded captions of a split (C, D), memory-mapped."""
        if split not in self._embeddings:
            published = published_cache(self._tower_cfg, self._data_cfg.dataset, split)
            cache = Path(self._data_cfg.cache_dir)
            self._embeddings[split] = cached_embeddings(self.encoder, self[split].captions, cache, published)
        return self._embeddings[split]

    @property
    def text_width(self) -> int:
        """D, the width of the embeddings; with published embeddings the text encoder itself is not needed."""
        return self.embeddings("test").shape[1] if self._tower_cfg.text_cache else self.encoder.width

    @property
    def text_fingerprint(self) -> str | None:
        """What determines the embeddings; None where published ones are read, which do not say how they were made."""
        return None if self._tower_cfg.text_cache else self.encoder.fingerprint

    def ready(self, *splits: str, training: bool = False) -> None:
        """Have images (as for testing, or as for training) and embeddings of these splits on disk, so that nobody needs
        to make them later."""
        for split in splits:
            self[split].decode(training)
            self.embeddings(split)

    def texts(self, split: str, captions: Tensor | Sequence[int] | slice) -> Tensor:
        """Some caption embeddings (B, D) on the device."""
        rows = captions if isinstance(captions, slice) else np.asarray(captions)
        return moved(torch.from_numpy(np.array(self.embeddings(split)[rows])), self.device)

    def dropped_texts(self, split: str, captions: Tensor, seed: int) -> Tensor:
        """Some captions (B,) embedded anew (B, D), by the text encoder in training mode; its dropout follows `seed`."""
        words = self[split].captions
        return self.encoder.encode_dropped([words[caption] for caption in captions.tolist()], seed)

    def check_dropout(self) -> None:
        """UserError where the text encoder has no dropout."""
        some = torch.arange(min(8, len(self["train"].captions)))
        one, other = (self.dropped_texts("train", some, seed) for seed in range(2))
        if torch.equal(one, other):
            raise UserError(
                f"--text_encoder {self._tower_cfg.text_encoder} has no dropout that --text_dropout could leave on; "
                "leave it out"
            )

    def towers(self, image_size: int, seed: int) -> Towers:
        """Fresh towers that fit this corpus."""
        return build_towers(self._tower_cfg, self.text_width, image_size, seed, self.device)

    def recall(self, towers: Towers, split: str, batch: int = 128) -> Scores:
        """Recall@1/5/10 both ways, in %, of the towers as they are, on `val` or `test`."""
        part = self[split]
        towers.eval()
        with torch.no_grad():
            images = [towers.embed_encoded(encoded) for encoded in self._encode(towers, split, batch)]
            slices = [slice(at, at + 4096) for at in range(0, len(part.captions), 4096)]
            texts = [towers.embed_texts(self.texts(split, rows)) for rows in slices]
        return retrieval_recall(torch.cat(images), torch.cat(texts), part.image_of)

    def _encode(self, towers: Towers, split: str, batch: int) -> Iterable[Tensor]:
        """The images of a split, batch by batch, as `Towers.encode` gives them; a frozen trunk is asked only once."""
        part = self[split]
        if split not in self._encoded:
            found = (towers.encode(part.eval_images(rows)) for rows in torch.arange(part.num_images).split(batch))
            if not towers.frozen_trunk:
                return found
            self._encoded[split] = list(found)
        return self._encoded[split]

    def random_pairs(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` distinct random training images, each with one of its captions: image and caption indices."""
        train = self["train"]
        if count > train.num_images:
            raise UserError(f"num_pairs is {count}, but {self._data_cfg.dataset} trains on {train.num_images} images")
        images = torch.randperm(train.num_images, generator=rng)[:count]
        return images, _one_caption_each(train, images, rng)

    def epoch(
        self, batch: int, rng: torch.Generator, captions: str, text_dropout: int | None = None
    ) -> Iterable[tuple[Tensor, Tensor, None]]:
        """One epoch of real batches: augmented images, texts.

        captions       `all`: every caption once, as published; `one`: every image once, with one of its captions
        text_dropout   the seed of the text encoder's dropout, with which each batch is embedded anew; None: embeddings
                       are those of the cache
        """
        train = self["train"]
        if captions == "all":
            order = torch.arange(len(train.captions))
        else:
            order = _one_caption_each(train, torch.arange(train.num_images), rng)
        if text_dropout is None:
            self.embeddings("train")
        augment = torch.Generator().manual_seed(draw_seed(rng))

        def make(rows: Tensor) -> tuple[Tensor, Tensor, None]:
            ids = order[rows]
            texts = ids if text_dropout is not None else self.texts("train", ids)
            return train.train_images(train.image_of[ids], augment), texts, None

        batches = prefetch(make, partition(len(order), batch, rng, drop_last=True), device=self.device)
        return batches if text_dropout is None else self._dropped(batches, text_dropout)

    def _dropped(self, batches: Iterable[tuple[Tensor, Tensor, None]], seed: int) -> Iterator[tuple]:
        """The batches with their captions embedded: here, as dropout's chance is one of the whole process, and not in
        the thread that prepares images."""
        for step, (images, ids, rest) in enumerate(batches):
            yield images, self.dropped_texts("train", ids, derive_seed(seed, step)), rest


def _one_caption_each(split: CaptionSplit, images: Tensor, rng: torch.Generator) -> Tensor:
    picks = torch.rand(len(images), generator=rng)
    own = [split.captions_of[image] for image in images.tolist()]
    return torch.tensor([ids[int(pick * len(ids))] for ids, pick in zip(own, picks.tolist(), strict=True)])


@dataclass(frozen=True)
class Protocol:
    """How fresh networks are trained on a small set, and which of their epochs counts.

    batches   `partition`: each pair once an epoch; `subsets`: as many independent random subsets
    rates     `both`: a rate for each tower; `image`: the image tower's for both
    decay     every rate × 0.1 after this share of the epochs (None: never)
    """

    about: str
    epochs: int
    batch: int
    select: str
    batches: str = "partition"
    rates: str = "both"
    decay: float | None = None

    def visited(self, epochs: int) -> set[int]:
        """The epochs (counted from 1) at which a network is scored for selection."""
        if self.select == "last":
            return {epochs}
        stride = max(1, (epochs - epochs % 10) // 10)
        return {1, *range(1 + stride, epochs, stride), epochs}


PROTOCOLS = {
    "clean": Protocol("epoch chosen on validation, test scored once", 100, 64, "val"),
    # The reference loops over one epoch more than it is told: 51 and 101.
    "vldd": Protocol("last epoch; the image rate for both towers", 51, 64, "last", rates="image"),
    "lors": Protocol("best of eleven epochs ON TEST, as released", 101, 128, "test", batches="subsets", decay=0.5),
}


@dataclass(frozen=True)
class JudgeConfig(FreshConfig):
    """How a set of pairs is judged."""

    protocol: str = option("clean", "how networks are trained and which epoch counts", choices=tuple(PROTOCOLS))
    batch_size_test: int = option(128, "images a batch when scoring", low=1)


@dataclass(frozen=True)
class PairSet:
    """A set of pairs to train on, or one phase of it.

    images (N, 3, H, W) normalised, texts (N, D), similarity (N, N) or None for the identity, lr group → rate
    """

    images: Tensor
    texts: Tensor
    similarity: Tensor | None
    lr: dict[str, float]


class Judge:
    """Trains fresh towers on data and reports their recall; several processes share the networks."""

    def __init__(
        self, corpus: Corpus, cfg: JudgeConfig, image_size: int, loss_fn: LossFn, seed: int, ranks: Ranks = ALONE
    ) -> None:
        self.corpus, self.cfg, self.loss_fn, self.seed, self.ranks = corpus, cfg, loss_fn, seed, ranks
        self.protocol = PROTOCOLS[cfg.protocol]
        self.towers = corpus.towers(image_size, seed)

    def pairs(self, source: Callable[[int], Sequence[PairSet]], split: str = "test", label: str = "") -> Report:
        """Judge the sets that `source(network number)` gives: the same one, or a new random one for each network.

        A set is its phases; a network is trained on one after another, all epochs on each.
        """
        protocol = self.protocol
        epochs = self.cfg.epoch_eval_train or protocol.epochs
        first = source(0)
        phases = len(first)

        def train_one(number: int, watch: Callable[[int, object], None]) -> dict[str, Tensor]:
            towers = self._begin(number)
            for done, pairs in enumerate(source(number) if number else first):
                lr = dict(pairs.lr) | ({"txt": pairs.lr["img"]} if protocol.rates == "image" else {})
                milestones = () if protocol.decay is None else (math.floor(epochs * protocol.decay) + 1,)
                recipe = Recipe(lr, epochs, self.cfg.eval_mom, self.cfg.eval_l2, milestones)
                batches = self._small_batches(towers, pairs, number, done * epochs)
                self._train(number, recipe, batches, watch, label, done * epochs)
            return towers.state_dict()

        visited = {done * epochs + epoch for done in range(phases) for epoch in protocol.visited(epochs)}
        return self._report(train_one, phases * epochs, split, visited)

    def _small_batches(self, towers: Towers, pairs: PairSet, number: int, before: int) -> Callable:
        """The batches of each epoch on a set of pairs, whose images a frozen trunk encodes once."""
        with torch.no_grad():
            parts = pairs.images.split(self.cfg.batch_size_test)
            images = torch.cat([towers.encode(part) for part in parts])
        size = self.cfg.batch_train or self.protocol.batch

        def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
            rng = generator(self.seed, "judge", number, before + epoch)
            for rows in _rows(len(images), size, self.protocol.batches, rng):
                rows = rows.to(images.device)
                square = None if pairs.similarity is None else pairs.similarity[rows][:, rows]
                yield images[rows], pairs.texts[rows], square

        return batches

    def full(self, epochs: int, batch: int, lr: dict[str, float], captions: str, split: str = "test") -> Report:
        """Judge all training data: networks trained as the experts are, selected as the protocol selects."""

        def train_one(number: int, watch: Callable[[int, object], None]) -> dict[str, Tensor]:
            towers = self._begin(number)

            def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor, None]]:
                rng = generator(self.seed, "judge full", number, epoch)
                for images, texts, _ in self.corpus.epoch(batch, rng, captions):
                    yield towers.encode(images), texts, None

            self._train(number, Recipe(lr, epochs), batches, watch, "full")
            return towers.state_dict()

        visited = {epochs} if self.protocol.select == "last" else set(range(1, epochs + 1))
        return self._report(train_one, epochs, split, visited)

    def _begin(self, number: int) -> Towers:
        """The towers, fresh."""
        return self.towers.renew(derive_seed(self.seed, "judge net", number))

    def _train(
        self, number: int, recipe: Recipe, batches: Callable, watch: Callable, label: str, before: int = 0
    ) -> None:
        """Train the towers as they are; `before`: epochs that they have had."""
        towers = self.towers
        groups = {group: flat.parameters() for group, flat in towers.flat.items()}
        seed = derive_seed(self.seed, "judge drop", number, *([before] if before else []))
        trainer = Trainer(towers, groups, recipe, seed)

        def loss(batch: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
            encoded, texts, similarity = batch
            return self.loss_fn(towers.embed_encoded(encoded), towers.embed_texts(texts), similarity)

        what = f"{label} network {number + 1}/{self.cfg.num_eval}" if label else ""
        trainer.fit(batches, loss, lambda epoch, _: watch(before + epoch, towers.state_dict()), what)

    def _report(self, train_one: Callable, epochs: int, split: str, visited: set[int]) -> Report:
        def score(state: dict[str, Tensor], part: str) -> Scores:
            self.towers.load_state_dict(state)
            return self.corpus.recall(self.towers, part, self.cfg.batch_size_test)

        report = evaluate(
            one_by_one(train_one),
            score,
            range(self.cfg.num_eval),
            epochs,
            self.protocol.select,
            "r_mean",
            visited,
            split,
            ranks=self.ranks,
        )
        report.protocol |= {"protocol": self.cfg.protocol, "about": self.protocol.about, "split": split}
        return report


def _rows(count: int, size: int, kind: str, rng: torch.Generator) -> Iterable[Tensor]:
    if kind == "partition":
        return partition(count, size, rng)
    return (torch.randperm(count, generator=rng)[:size] for _ in range(math.ceil(count / size)))
