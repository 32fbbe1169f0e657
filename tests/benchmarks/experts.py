"""How fast experts train on real images, beside the same steps of the same network on tensors that lie ready.

    python -m tests.benchmarks.experts

Real images come as in buffer.py: 8-bit pixels from memory (MTT) or from a cache of decoded photographs with captions
(VLDD), as they are, and augmented. Augmentation is computation, which nothing hides on a CPU; on a GPU it runs beside
the network (VLDD) or in front of it (MTT).
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.captions import DataConfig
from data.images import ImageSplit, MemoryPixels
from methods.core.classification import RealSet
from methods.core.retrieval import Corpus
from methods.core.stack import Stack, StackTrainer
from methods.core.training import Recipe, Trainer, partition
from methods.image_judging import NetworkConfig
from methods.lors import contrastive_loss
from networks import build_network
from networks.towers import TowerConfig
from tests.benchmarks.loading import photographs
from tests.benchmarks.table import Row, Scale, environment, judged, show
from tests.benchmarks.timing import Work, in_turns, profile_line, seconds
from utils.rng import generator

GROUP = "experts"
LEAST = 0.9
Batches = Callable[[int], Iterable[Any]]


class Images:
    """Experts of MTT: batches of 8-bit images in the device's memory, one epoch a call."""

    def __init__(self, name: str, size: int, batch: int, steps: int, device: str) -> None:
        self.what = f"MTT, {name}, {size} px, batches of {batch}"
        self.batch, self.steps, rng = batch, steps, generator(0, "images")
        pixels = torch.randint(256, (batch * steps, 3, size, size), generator=rng, dtype=torch.uint8)
        labels = torch.randint(10, (len(pixels),), generator=rng)
        held = MemoryPixels(pixels, torch.arange(len(pixels)), pixels, "")
        factor = torch.full((3, 1, 1), 1 / 64, device=device)
        self.split = ImageSplit(labels, held, (3, size, size), lambda x: x.float().mul_(factor).sub_(2), False, device)
        self.ready = [(torch.randn(batch, 3, size, size, device=device), self.split.labels[:batch]) for _ in range(4)]
        self.stack = Stack(build_network(name, size, 10).to(device))

    def sources(self) -> dict[str, Batches]:
        nothing, dsa = NetworkConfig(dsa_strategy="none"), NetworkConfig()
        return {
            "tensors": lambda epoch: itertools.islice(itertools.cycle(self.ready), self.steps),
            "as they are": self.real(nothing),
            "augmented": self.real(dsa),
        }

    def real(self, net: NetworkConfig) -> Batches:
        images = RealSet(self.split, 0.01, net.augment())

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            rng = generator(0, "epoch", epoch)
            return (images.batch(rows, rng) for rows in partition(len(images), self.batch, rng))

        return batches

    def trained(self, batches: Batches) -> Work:
        trainer = StackTrainer(self.stack, self.stack.draw([0]), Recipe({"net": 0.01}, 1), [0])

        def epoch() -> None:
            one_more(trainer)
            trainer.fit(lambda epoch: ([part[None] for part in batch] for batch in batches(epoch)))

        return epoch


class Photographs:
    """Experts of VLDD: cached photographs with captions, one epoch a call."""

    def __init__(self, name: str, size: int, batch: int, steps: int, device: str, folder: Path) -> None:
        self.what = f"VLDD, {name}, {size} px, batches of {batch}"
        self.batch, self.steps = batch, steps
        files = photographs(folder, batch * steps)
        notes = [
            {"image": file.name, "image_id": place, "caption": f"photograph {place} of {place % 7} things"}
            for place, file in enumerate(files)
        ]
        for split in ("train", "test"):
            (folder / f"some_{split}.json").write_text(json.dumps(notes))
        towers = TowerConfig(image_encoder=name, image_pretrained=False, text_encoder="tfidf")
        self.corpora = {
            plain: Corpus(
                DataConfig("folder", str(folder), str(folder), size, plain, cache_dir=str(folder / "cache")),
                towers,
                torch.device(device),
            )
            for plain in (True, False)
        }
        for corpus in self.corpora.values():
            corpus.ready("train", training=True)
        self.towers = self.corpora[True].towers(size, 0)
        self.ready = list(itertools.islice(self.real(plain=True)(0), 4))

    def sources(self) -> dict[str, Batches]:
        return {
            "tensors": lambda epoch: itertools.islice(itertools.cycle(self.ready), self.steps),
            "as they are": self.real(plain=True),
            "augmented": self.real(plain=False),
        }

    def real(self, plain: bool) -> Batches:
        return lambda epoch: self.corpora[plain].epoch(self.batch, generator(0, "epoch", epoch), "all")

    def trained(self, batches: Batches) -> Work:
        groups = {group: flat.parameters() for group, flat in self.towers.flat.items()}
        trainer = Trainer(self.towers, groups, Recipe(dict.fromkeys(groups, 1e-3), 1), 0)

        def loss(batch: tuple[Tensor, Tensor, None]) -> Tensor:
            u, v = self.towers.embed_images(batch[0]), self.towers.embed_texts(batch[1])
            return contrastive_loss(u @ v.T / 0.07)

        def epoch() -> None:
            one_more(trainer)
            trainer.fit(batches, loss)

        return epoch


def one_more(trainer: Trainer | StackTrainer) -> None:
    trainer.recipe = replace(trainer.recipe, epochs=trainer.epoch + 1)


def measured(case: Images | Photographs, device: str, repeats: int) -> Iterator[Row]:
    """Both kinds of real images; what they would allow a network that takes no time is in the note."""
    sources = case.sources()
    work = {name: case.trained(batches) for name, batches in sources.items()}
    found, images = in_turns(work, repeats, device), case.batch * case.steps
    alone = {name: (lambda batches=batches: sum(1 for _ in batches(0))) for name, batches in sources.items()}
    for name in ("as they are", "augmented"):
        rates = images / found["tensors"].seconds, images / seconds(alone[name], device, repeats)
        note = f"{rates[0]:,.0f} images/s from tensors; without a network {rates[1]:,.0f} images/s arrive"
        what = f"{case.what}, {name}: throughput to that of tensors"
        row = judged(GROUP, what, 1 / found[name].ratio, at_least=LEAST, note=note)
        yield row.explained(lambda name=name: profile_line(work[name], device))


def rows(scale: Scale) -> Iterator[Row]:
    device, repeats = scale.device, scale.of(1, 5, 7)
    sizes = scale.of(("ConvNetD2W8", 8, 8, 2), ("ConvNetD3", 32, 64, 4), ("ConvNetD3", 32, 256, 100))
    yield from measured(Images(*sizes, device), device, repeats)
    sizes = scale.of(("ConvNetD2W8", 16, 8, 2), ("ConvNetD4W64", 64, 32, 4), ("nfnet", 224, 128, 10))
    with tempfile.TemporaryDirectory() as folder:
        yield from measured(Photographs(*sizes, device, Path(folder)), device, repeats)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(environment(device))
    show(rows(Scale(device)))
