"""Photographs whose class is the direction and colour of their stripes: learned in seconds."""

from pathlib import Path

import torch
from PIL import Image

from methods.core.photos import Photos

IDENTS = ["across", "blue", "down"]


def stripes(folder: Path, each: int, size: int = 16, seed: int = 0, what: str = "train") -> Photos:
    """`each` images of each of the three classes."""
    rng, files, labels = torch.Generator().manual_seed(seed), [], []
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(3 * each):
        label = place % 3
        wave = 0.5 + 0.4 * torch.sin(torch.arange(size) * 1.5 + 6 * torch.rand((), generator=rng))
        image = wave.expand(3, size, size) if label == 2 else wave[:, None].expand(3, size, size)
        tint = torch.tensor([[0.9], [0.3], [1.0]] if label == 1 else [[0.8], [0.8], [0.3]])[:, :, None]
        noisy = (image * tint + 0.1 * torch.randn(3, size, size, generator=rng)).clamp(0, 1)
        files.append(folder / f"{place}.png")
        Image.fromarray((noisy * 255).byte().permute(1, 2, 0).numpy()).save(files[-1])
        labels.append(label)
    return Photos(files, torch.tensor(labels), folder / "cache", 2, what)
