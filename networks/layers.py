"""What the classifiers are made of: activations, norms and pools by their two letters, the head, and sizes of maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from utils.errors import UserError

# The letters are those of the published names: ConvNetAS has a sigmoid, ConvNetBN batch norm, ConvNetMP max pooling.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "as": nn.Sigmoid,
    "ar": nn.ReLU,
    "al": lambda: nn.LeakyReLU(0.01),
}

# From width and side of the feature map to a norm layer. Instance norm is spelled as group norm: no running statistics.
NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "in": lambda width, side: nn.GroupNorm(width, width),
    "bn": lambda width, side: nn.BatchNorm2d(width),
    "ln": lambda width, side: nn.LayerNorm([width, side, side]),
    "gn": lambda width, side: nn.GroupNorm(4, width),
    "nn": lambda width, side: nn.Identity(),
}

POOLS: dict[str, Callable[[], nn.Module]] = {
    "ap": lambda: nn.AvgPool2d(2),
    "mp": lambda: nn.MaxPool2d(2),
    "np": nn.Identity,
}


def wide(values: Tensor) -> Tensor:
    """A network's output as a loss takes it: float32 where the network ran in half precision, else as it is."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


class Classifier(nn.Module):
    """`features`, flattened to (B, num_features), then one linear `classifier` where `num_classes` is given."""

    def __init__(self, features: nn.Module, num_features: int, num_classes: int | None) -> None:
        super().__init__()
        self.features = features
        self.num_features = num_features
        self.classifier = nn.Identity() if num_classes is None else nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def side_after(layers: Iterable[nn.Module], side: int) -> int:
    """The side of a square map of `side` pixels after these convolutions and pools; 0 where one has nothing left."""
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            kernel, stride, padding = (
                value[0] if isinstance(value, tuple) else value
                for value in (layer.kernel_size, layer.stride, layer.padding)
            )
            side = max((side + 2 * padding - kernel) // stride + 1, 0)
    return side


def check_size(name: str, image_size: int, channels: int, fits: bool = True) -> None:
    """UserError where a network whose classifier has a fixed size, as published, gets images of another.

    fits   whether its map ends at the side that the classifier was made for
    """
    tiny = name.endswith("_Tiny")
    sizes = (64,) if tiny else (28, 32) if channels == 1 else (32,)
    if image_size in sizes and fits:
        return
    plain = name.removesuffix("_Tiny")
    others = [f"{plain}_Adaptive"]
    if image_size == 64 and channels != 1 and not tiny and "_AP" not in name:
        others.append(f"{plain}_Tiny")
    raise UserError(
        f"network '{name}' does not take images of {channels} × {image_size} × {image_size}, only of "
        f"{' or '.join(map(str, sizes))} pixels; take {' or '.join(others)}"
    )
