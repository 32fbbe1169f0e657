"""An offline stand-in for published image weights: the trunk learns to classify labelled images before anything else.

Experts, students and judged networks then all start from the same trunk, as they do from ImageNet weights in the paper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.captions import normalise
from data.npz import read_npz
from methods.core.training import Recipe, Trainer, partition
from networks.towers import TowerConfig, build_image_tower
from utils.config import option
from utils.files import digest, file_digest, save_vectors
from utils.rng import generator, seeded


@dataclass(frozen=True)
class TrunkConfig:
    """How the image trunk is prepared where no published weights are at hand."""

    trunk_images: str = option("", "labelled images (.npz) that the trunk learns to classify first (empty: none)")
    trunk_epochs: int = option(30, "epochs on them", low=1)
    trunk_lr: float = option(0.02, "rate on them (momentum 0.9, weight decay 5e-4, cut to a tenth twice)", above=0)


def with_trunk(
    towers: TowerConfig, cfg: TrunkConfig, image_size: int, cache_dir: Path, device: torch.device
) -> TowerConfig:
    """The tower config with `image_weights` naming a trunk trained as `cfg` asks; it is trained once and cached."""
    if not cfg.trunk_images:
        return towers
    plain = {"joint_width": 0, "image_projection": False, "lora_rank": 0, "image_trainable": True}  # the trunk alone
    bare = dataclasses.replace(towers, image_pretrained=False, **plain)
    start = file_digest(bare.image_weights) if bare.image_weights else ""
    network = bare.image_encoder, bare.image_output, start, image_size
    key = digest(file_digest(cfg.trunk_images), *network, cfg.trunk_epochs, cfg.trunk_lr)
    path = cache_dir / "trunks" / f"{key[:24]}.safetensors"
    if not path.exists():
        _train(bare, cfg, image_size, path, device)
    return dataclasses.replace(towers, image_weights=str(path), image_pretrained=False)


def _train(towers: TowerConfig, cfg: TrunkConfig, size: int, path: Path, device: torch.device) -> None:
    pixels, labels = read_npz(cfg.trunk_images)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    if images.shape[2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    images, classes = images.to(device), torch.from_numpy(labels).to(device)
    tower = build_image_tower(towers, size, 0)
    with seeded(0):
        net = nn.Sequential(tower, nn.Linear(tower.width, int(labels.max()) + 1)).to(device)
    thirds = (cfg.trunk_epochs // 2, cfg.trunk_epochs * 5 // 6)
    recipe = Recipe({"net": cfg.trunk_lr}, cfg.trunk_epochs, 0.9, 5e-4, thirds)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        rng = generator(0, "trunk", epoch)
        for rows in partition(len(images), 128, rng, drop_last=True):
            yield _shift_and_flip(normalise(images[rows.to(device)]), rng), classes[rows.to(device)]

    trainer = Trainer(net, {"net": list(net.parameters())}, recipe, 0)
    trainer.fit(batches, lambda batch: F.cross_entropy(net(batch[0]), batch[1]), what="trunk")
    save_vectors(path, {name: tensor.cpu().contiguous() for name, tensor in tower.trunk.state_dict().items()})


def _shift_and_flip(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image moved by up to an eighth of its side (edges repeated) and mirrored half of the time."""
    size, reach = images.shape[-1], images.shape[-1] // 8
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    down, right = torch.randint(2 * reach + 1, (2, len(images)), generator=rng)
    span = torch.arange(size)
    columns = right[:, None] + span
    mirrored = torch.rand(len(images), generator=rng) < 0.5
    columns[mirrored] = columns[mirrored].flip(1)
    rows, columns = (down[:, None] + span).to(images.device), columns.to(images.device)
    item = torch.arange(len(images), device=images.device)
    return padded[item[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
