"""The older classifiers that distilled images are judged with: MLP, LeNet, AlexNet, and the VGGs.

As published they take 32 pixels, or 28 of one channel; the MLP takes any. For other sizes each has variants with as
many weights: `_Adaptive` (any size) averages its last map to the side that it has at 32 pixels, `_Tiny` (64 pixels)
halves the image at its first convolution, the VGGs by taking every second position of the last map.
`VGG11BN` has batch norm, `VGG11` instance norm.
Source: as in DC (Zhao et al., ICLR 2021) and MTT (Cazenavette et al., CVPR 2022); `_Tiny` is DATM's (Guo et al., ICLR
2024).
"""

from __future__ import annotations

import re

from torch import nn

from networks.layers import NORMS, Classifier, check_size, side_after
from utils.errors import UserError

# Widths of the convolutions between two poolings.
_VGGS = {
    "11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "13": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    "16": ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    "19": ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


def build_mlp(name: str, image_size: int, num_classes: int | None = None, channels: int = 3) -> Classifier:
    """A perceptron on the pixels with two hidden layers of 128 units, the last of which are its features."""
    pixels = channels * image_size**2
    layers = (nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    return Classifier(nn.Sequential(*layers), 128, num_classes)


def build_lenet(name: str, image_size: int, num_classes: int | None = None, channels: int = 3) -> Classifier:
    """Two convolutions of 5×5 and two hidden layers of 120 and 84 units, the last of which are its features."""
    maps = [
        nn.Conv2d(channels, 6, 5, stride=_stride(name), padding=2 if channels == 1 else 0),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    maps += _last_pool(maps, 5, name, image_size, channels)
    units = (nn.Flatten(), nn.Linear(16 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())
    return Classifier(nn.Sequential(*maps, *units), 84, num_classes)


def build_alexnet(name: str, image_size: int, num_classes: int | None = None, channels: int = 3) -> Classifier:
    """Five convolutions and three poolings; a map of 192 × 4 × 4 is what its one linear layer sees."""
    maps = [
        nn.Conv2d(channels, 128, 5, stride=_stride(name), padding=4 if channels == 1 else 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(128, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(192, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 192, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(192, 192, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    maps += _last_pool(maps, 4, name, image_size, channels)
    return Classifier(nn.Sequential(*maps, nn.Flatten()), 192 * 4 * 4, num_classes)


def build_vgg(name: str, image_size: int, num_classes: int | None = None, channels: int = 3) -> Classifier:
    """Blocks of 3×3 convolution, norm and ReLU between five poolings, and one linear layer on 512 features."""
    depth, norm = re.match(r"VGG(\d+)(BN)?", name).groups()
    maps: list[nn.Module] = []
    before = channels
    for widths in _VGGS[depth]:
        for width in widths:
            first = 3 if channels == 1 and not maps else 1  # 28 pixels become 32, as in the ConvNet
            maps += [nn.Conv2d(before, width, 3, padding=first), NORMS["bn" if norm else "in"](width, 0), nn.ReLU()]
            before = width
        maps.append(nn.MaxPool2d(2))
    if name.endswith("_Tiny"):
        maps.append(nn.AvgPool2d(1, stride=2))  # DATM's way from 2 × 2 to one: nothing is averaged
    maps += _last_pool(maps, 1, name, image_size, channels)
    return Classifier(nn.Sequential(*maps, nn.Flatten()), 512, num_classes)


def _stride(name: str) -> int:
    return 2 if name.endswith("_Tiny") else 1


def _last_pool(maps: list[nn.Module], end: int, name: str, image_size: int, channels: int) -> list[nn.Module]:
    """What makes the last map `end` pixels wide; UserError where it is not and no variant was asked for."""
    side = side_after(maps, image_size)
    if not name.endswith("_Adaptive"):
        check_size(name, image_size, channels, side == end)
        return []
    if side < 1:
        raise UserError(f"network '{name}' has nothing left of {image_size} pixels; take a ConvNet of less depth")
    return [nn.AdaptiveAvgPool2d(end)]
