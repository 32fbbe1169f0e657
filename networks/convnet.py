"""Classifiers trained from scratch: the ConvNet of the dataset-distillation papers, and a small MLP.

A ConvNet's name says what it is: `ConvNet`, `ConvNetD4` (depth), `ConvNetW64` (width), `ConvNetD3W64BN` (norm), in any
case. Norms: IN instance (the default), BN batch, LN layer, GN group (4 groups), NN none.
Source: Gidaris & Komodakis, CVPR 2018, as used by DC (Zhao et al., ICLR 2021) and MTT (Cazenavette et al., CVPR 2022).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor, nn

from utils.errors import UserError

_NAME = re.compile(r"convnet(?:d(?P<depth>\d+))?(?:w(?P<width>\d+))?(?P<norm>in|bn|ln|gn|nn)?", re.IGNORECASE)

# From width and side of the feature map to a norm layer. Instance norm is spelled as group norm: no running statistics.
_NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "in": lambda width, side: nn.GroupNorm(width, width),
    "bn": lambda width, side: nn.BatchNorm2d(width),
    "ln": lambda width, side: nn.LayerNorm([width, side, side]),
    "gn": lambda width, side: nn.GroupNorm(4, width),
    "nn": lambda width, side: nn.Identity(),
}


class Classifier(nn.Module):
    """`features`, flattened to (B, num_features), then one linear `classifier` where `num_classes` is given."""

    def __init__(self, features: nn.Module, num_features: int, num_classes: int | None) -> None:
        super().__init__()
        self.features = features
        self.num_features = num_features
        self.classifier = nn.Identity() if num_classes is None else nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def build_convnet(name: str, image_size: int, num_classes: int | None = None, channels: int = 3) -> Classifier:
    """A ConvNet for (B, channels, image_size, image_size): blocks of 3×3 convolution, norm, ReLU, 2×2 average pool.

    Gives (B, num_classes), or (B, width · side²) features where `num_classes` is None; side = image_size / 2^depth.
    UserError for a name it cannot read, or where nothing is left of the image after `depth` pools.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"cannot read the network name '{name}'; write ConvNet, ConvNetD4, ConvNetW64 or ConvNetD3W64BN"
        )
    depth, width = int(match["depth"] or 3), int(match["width"] or 128)
    norm = (match["norm"] or "in").lower()
    if depth < 1 or width < 1 or (norm == "gn" and width % 4):
        raise UserError(f"network '{name}' needs a depth and a width of at least 1 (a multiple of 4 for GN)")
    # One-channel images are padded by two pixels more on each side, so that 28 becomes 32, as in the papers.
    padding = 3 if channels == 1 else 1
    side = image_size + 2 * (padding - 1)
    if side >> depth < 1:
        raise UserError(
            f"network '{name}' halves the image {depth} times, and {image_size} pixels are too few for that; "
            f"take a depth of at most {side.bit_length() - 1}"
        )
    layers: list[nn.Module] = []
    for block in range(depth):
        layers += [
            nn.Conv2d(channels if block == 0 else width, width, 3, padding=padding if block == 0 else 1),
            _NORMS[norm](width, side),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
        side //= 2
    return Classifier(nn.Sequential(*layers, nn.Flatten()), width * side**2, num_classes)


def build_mlp(name: str, image_size: int, num_classes: int | None = None, channels: int = 3) -> Classifier:
    """A perceptron on the pixels with two hidden layers of 128 units, the last of which are its features."""
    pixels = channels * image_size**2
    layers = (nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    return Classifier(nn.Sequential(*layers), 128, num_classes)
