"""A student so small that it learns in seconds, and what it learns from."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.feature_files import Features, FeatureWriter
from data.image_pools import BadImage, ImagePool, drawn_images
from methods.clip_batches import BatchConfig, Unpaired
from methods.clip_learning import LearnConfig, Learned, learn
from methods.dimefm import LossConfig, dime_losses
from networks.clip_students import ImageStudent, StudentSpec, build_student
from tests.conftest import plain
from utils.config import option, section
from utils.ranks import Ranks
from utils.rng import seeded
from utils.run import Run, RunConfig

DIM, IMAGES, TEXTS, SEED = 16, 44, 30, 5
SPEC = StudentSpec("small", "vit", 16, {"width": 32, "layers": 2, "heads": 2, "patch_size": 8})
# 40 images to learn from: 5 steps an epoch.
CFG = LearnConfig(
    BatchConfig(batch_size=8, text_batch=6, held_out=4), epochs=3, warmup_epochs=1.0, print_freq=2, base_lr=2e-3
)
LOSSES = functools.partial(dime_losses, cfg=LossConfig(use_pvl_loss=True, use_udist_loss=True, w_udist_loss=0.1))
ALONE = Ranks(torch.device("cpu"))


@dataclass(frozen=True)
class Command:
    method: str = option("dimefm", "the system")
    run: RunConfig = section(RunConfig)
    learn: LearnConfig = section(LearnConfig)


class Some(ImagePool):
    """Drawn images, a few of which cannot be decoded."""

    def __init__(self, bad=(), count=IMAGES):
        super().__init__([drawn_images(count, 20)], "images")
        self.broken = set(bad)

    def image(self, row):
        if row in self.broken:
            raise BadImage(self.key(row), "it is cut short")
        return super().image(row)


def student(dropout: float = 0.0, spec: StudentSpec = SPEC) -> ImageStudent:
    with seeded(1):
        net = build_student(spec, DIM)
    if dropout:
        net.visual.ln_post = nn.Sequential(net.visual.ln_post, nn.Dropout(dropout))
    return net


class World:
    """Features that can be told from the pictures, being their colours, mixed, and sentences near them.

    holes  the same features of images, two of which are noted as undecodable
    """

    def __init__(self, root: Path, images: int = IMAGES, texts: int = TEXTS) -> None:
        self.root, self.images, pool, self.features = root, images, Some(count=images), {}
        colours = np.stack([np.asarray(pool.image(row).resize((2, 2))).reshape(-1) for row in range(images)]) / 255.0
        mixed = torch.randn(12, DIM, generator=torch.Generator().manual_seed(0))
        found = (torch.from_numpy(colours).float() - 0.5) @ mixed
        made = {"images": (found, ()), "holes": (found, (3, 40)), "texts": (found[:texts] + 0.1, ())}
        for name, (rows, bad) in made.items():
            writer = FeatureWriter(root / "features", name, len(rows), DIM, {"model": "x"})
            writer.add(rows, bad)
            writer.finish()
            self.features[name] = Features([root / "features" / f"{name}.npy"], name)

    def feed(self, bad=(), cfg=CFG, ranks=ALONE, images="images", size=16, workers=1) -> Unpaired:
        """The steps of a run."""
        return Unpaired(
            Some(bad, self.images),
            self.features[images],
            self.features["texts"],
            cfg.batches,
            size,
            SEED,
            ranks,
            workers,
        )

    def run(
        self,
        name="run",
        cfg=CFG,
        bad=(),
        ranks=ALONE,
        net=None,
        spec=SPEC,
        share=1.0,
        losses=LOSSES,
        images="images",
        **note: Any,
    ) -> Learned:
        """Learn in the folder `name`; gone on with where it is there."""
        folder = self.root / name
        setup = RunConfig(device="cpu", seed=SEED, resume=(folder / "config.yaml").exists())
        opened = Run(folder, Command(run=setup, learn=cfg), "distill", "--save_dir", ranks)
        feed = self.feed(bad, cfg, ranks, images, spec.image_size)
        return learn(cfg, net or student(spec=spec), spec, feed, losses, opened, share, note)

    def files(self, name: str) -> dict[str, Any]:
        """What a run wrote."""
        folder = self.root / name
        found = {path.name: plain(torch.load(path, weights_only=True)) for path in folder.glob("*.pt")}
        return found | {"log": (folder / "log.jsonl").read_text()}
