"""What frozen encoders say of captioned images, found once: `--cache_latents` of the fine-tuning stage of vlcp.

While a denoiser is tuned, the autoencoder and the text encoder are not. Where images are cut from their middle they
look the same each time, but for a mirror; so the moments of their latents, of both sides if they are mirrored, and the
states of their captions lie in two memory-mapped files as long as the tuning takes.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from methods.prototype_learning import Pictures, to_signed
from networks.diffusion import LatentModel
from utils.arrays import map_array
from utils.folders import made_folder
from utils.progress import progress

AT_ONCE = 8  # images


@dataclass(frozen=True)
class Encoded:
    """Memory-mapped float32 arrays.

    moments   (N, sides, 8, h, w): mean and spread of unscaled latents; side 1 is mirrored
    states    (N, 77, E) of the captions
    """

    moments: np.ndarray
    states: np.ndarray

    def __call__(self, rows: list[int], mirrored: list[bool]) -> tuple[Tensor, Tensor]:
        """Moments (B, 8, h, w) and states (B, 77, E) of some pictures."""
        sides = [int(side) for side in mirrored]
        return torch.from_numpy(self.moments[rows, sides]), torch.from_numpy(self.states[rows])


def encoded(pictures: Pictures, model: LatentModel, folder: Path, half: AbstractContextManager) -> Encoded:
    """All of these pictures, read from `folder` or else written there; `half`: what the encoders run in."""

    def write(place: Path) -> None:
        with torch.no_grad(), half:
            _write(pictures, model, place)

    made_folder(folder, write, "the pictures are encoded anew")
    return Encoded(*(map_array(folder / f"{name}.npy") for name in ("moments", "states")))


def moments(model: LatentModel, images: Tensor) -> Tensor:
    """Mean and spread (B, 8, h, w) of the autoencoder's own, unscaled latents of images from -1 to 1."""
    found = model.vae.encode(images).latent_dist
    return torch.cat([found.mean, found.std], 1)


def _write(pictures: Pictures, model: LatentModel, folder: Path) -> None:
    chances = [(0.5, 0.5, 1.0), (0.5, 0.5, 0.0)][: 1 + pictures.flip]
    files: dict[str, np.ndarray] = {}
    with progress(total=len(pictures.files), what="encoding") as bar:
        for part in torch.arange(len(pictures.files)).split(AT_ONCE):
            rows = part.tolist()
            images = [torch.stack([pictures.read(row, chance) for row in rows]) for chance in chances]
            sides = torch.stack([moments(model, to_signed(side, model.device)) for side in images], 1)
            states = model.embed([pictures.texts[row] for row in rows])
            for name, found in (("moments", sides), ("states", states)):
                values = found.float().cpu().numpy()
                if name not in files:
                    files[name] = _room(folder / f"{name}.npy", (len(pictures.files), *values.shape[1:]))
                files[name][rows] = values
            bar.update(len(rows))


def _room(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A file for a float32 array, whose room on the disk is taken now: to write beyond a full one would end the process
    without a word."""
    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
