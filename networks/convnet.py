"""The ConvNet of the dataset-distillation papers, trained from scratch.

A name says what it is, in this order and in any case: `ConvNet`, depth (`ConvNetD4`), width (`W64`; `W64x2` doubles it
from block to block: 64, 128, 256), activation (AS sigmoid, AR ReLU, AL leaky ReLU), norm (IN instance, BN batch, LN
layer, GN group with 4 groups, NN none), pooling (AP average, MP maximum, NP none), and GAP for one global average
before the classifier: `ConvNetD4W64GNMP`. What is not said is depth 3, width 128, AR, IN, AP. `ConvNetKIP` is width
1024 without norm; `ConvNet-4` and `ConvNet-3-BN` are DD-Ranking's spellings of depth and norm. The size of the image is
always that of the data, never a fixed 32.
Source: Gidaris & Komodakis, CVPR 2018, as used by DC (Zhao et al., ICLR 2021) and MTT (Cazenavette et al., CVPR 2022).
"""

from __future__ import annotations

import re

from torch import nn

from networks.layers import ACTIVATIONS, NORMS, POOLS, Classifier
from utils.errors import UserError

_NAME = re.compile(
    r"convnet(?:(?P<kip>kip)|-(?P<blocks>\d+)(?:-(?P<suffix>in|bn|ln|gn|nn))?|"
    r"(?:d(?P<depth>\d+))?(?:w(?P<width>\d+)(?P<double>x2)?)?(?P<act>as|ar|al)?(?P<norm>in|bn|ln|gn|nn)?(?P<pool>np|mp|ap)?"
    r"(?P<globally>gap)?)",
    re.IGNORECASE,
)
MAX_WIDTH = 1 << 16  # of a net that doubles its width: beyond, a block's weights take hundreds of gigabytes
MAX_DEPTH = 32  # only without pooling can a net be this deep: any other runs out of image before


def build_convnet(name: str, image_size: int, num_classes: int | None = None, channels: int = 3) -> Classifier:
    """A ConvNet for (B, channels, image_size, image_size): blocks of 3×3 convolution, norm, activation, 2×2 pool.

    Gives (B, num_classes), or (B, width · side²) features where `num_classes` is None; side = image_size / 2^depth, and
    width that of the last block. UserError for a name it cannot read, or where nothing is left of the image after
    `depth` pools.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"cannot read the network name '{name}'; write ConvNet, ConvNetD4, ConvNetW64 or, in this order, "
            "ConvNetD3W64ASBNMP"
        )
    said = {part: (text or "").lower() for part, text in match.groupdict().items()}
    depth = int(said["depth"] or said["blocks"] or 3)
    width = int(said["width"] or (1024 if said["kip"] else 128))
    norm = said["norm"] or said["suffix"] or ("nn" if said["kip"] else "in")
    act, pool = said["act"] or "ar", said["pool"] or "ap"
    if depth < 1 or width < 1 or (norm == "gn" and width % 4):
        raise UserError(f"network '{name}' needs a depth and a width of at least 1 (a multiple of 4 for GN)")
    # One-channel images are padded by two pixels more on each side, so that 28 becomes 32, as in the papers.
    padding = 3 if channels == 1 else 1
    side = image_size + 2 * (padding - 1)
    if pool == "np":
        if depth > MAX_DEPTH:
            raise UserError(f"network '{name}' is too deep; take a depth of at most {MAX_DEPTH}")
    elif side >> depth < 1:
        raise UserError(
            f"network '{name}' halves the image {depth} times, and {image_size} pixels are too few for that; "
            f"take a depth of at most {side.bit_length() - 1}"
        )
    widths = [width << block if said["double"] else width for block in range(depth)]
    if said["double"] and widths[-1] > MAX_WIDTH:
        raise UserError(
            f"network '{name}' doubles its width to {widths[-1]}, more than {MAX_WIDTH}; take less width or depth"
        )
    layers: list[nn.Module] = []
    for before, width in zip([channels, *widths], widths, strict=False):
        layers += [
            nn.Conv2d(before, width, 3, padding=1 if layers else padding),
            NORMS[norm](width, side),
            ACTIVATIONS[act](),
            POOLS[pool](),
        ]
        side //= 1 if pool == "np" else 2
    if said["globally"]:
        layers.append(nn.AdaptiveAvgPool2d(1))
        side = 1
    return Classifier(nn.Sequential(*layers, nn.Flatten()), width * side**2, num_classes)
