"""ResNets by name: `ResNet18`, 34, 50, 101 and 152, with instance norm, or batch norm where the name says `BN`.

The stem is that of small images (3×3, stride 1), the published size 32 pixels (28 of one channel does as well).
`_AP` replaces every strided convolution by one of stride 1 and a 2×2 average, and keeps its last map whole.
`_Adaptive` takes any size with as many weights, `_Tiny` (DATM's) 64 pixels by a stem of stride 2. `ResNet18ImageNet`
and `ResNet6ImageNet` have the 7×7 stem and take any size. IDC's ResNets, whose stem follows the size of the image, are
`build_sized_resnet`.
Source: He et al., CVPR 2016, as in DC (Zhao et al., ICLR 2021) and MTT (Cazenavette et al., CVPR 2022).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import Tensor, nn

from networks.layers import NORMS, Classifier, check_size, side_after
from utils.errors import UserError

_NAME = re.compile(r"ResNet(?P<depth>\d+)(?P<norm>BN)?(?P<ap>_AP)?(?:_(?P<variant>Tiny|Adaptive)|(?P<large>ImageNet))?")

# Blocks at each of the four widths, and whether they are bottlenecks (four times as wide at their end).
_DEPTHS = {
    "6": ((1, 1, 1, 1), False),
    "10": ((1, 1, 1, 1), False),
    "18": ((2, 2, 2, 2), False),
    "34": ((3, 4, 6, 3), False),
    "50": ((3, 4, 6, 3), True),
    "101": ((3, 4, 23, 3), True),
    "152": ((3, 8, 36, 3), True),
    "200": ((3, 24, 36, 3), True),
}


class Block(nn.Module):
    """ReLU of `body` + `shortcut`: (B, before, H, W) → (B, width or 4 · width, H / stride, W / stride)."""

    def __init__(self, before: int, width: int, stride: int, norm: str, averaging: bool, bottleneck: bool) -> None:
        super().__init__()
        after = 4 * width if bottleneck else width
        # Where the name says _AP, an average does what the stride would have done.
        step, pool = (1, stride) if averaging else (stride, 1)
        if bottleneck:
            body = [*_conv(before, width, 1, 1, norm), nn.ReLU(), *_conv(width, width, 3, step, norm)]
            body += [nn.ReLU(), *_pool(pool), *_conv(width, after, 1, 1, norm)]
        else:
            body = [*_conv(before, width, 3, step, norm), nn.ReLU(), *_pool(pool), *_conv(width, width, 3, 1, norm)]
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential()
        if stride > 1 or before != after:
            conv, normed = _conv(before, after, 1, step, norm)
            self.shortcut = nn.Sequential(conv, *_pool(pool), normed)

    def forward(self, maps: Tensor) -> Tensor:
        return (self.body(maps) + self.shortcut(maps)).relu()


def build_resnet(name: str, image_size: int, num_classes: int | None = None, channels: int = 3) -> Classifier:
    """A ResNet of one of the names above. UserError for a size that its variant does not take."""
    said = _NAME.fullmatch(name).groupdict()
    blocks, bottleneck = _DEPTHS[said["depth"]]
    norm, averaging = "bn" if said["norm"] else "in", bool(said["ap"])
    if said["large"]:
        layers = [*_conv(channels, 64, 7, 2, norm), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    else:
        layers = [*_conv(channels, 64, 3, 2 if said["variant"] == "Tiny" else 1, norm), nn.ReLU()]
    side = side_after(layers, image_size)
    side = side // 8 if averaging else -(-side // 8)  # three halvings follow: a convolution rounds up, a pool down
    if not said["large"] and said["variant"] != "Adaptive":
        check_size(name, image_size, channels)
    if side < 1:
        raise UserError(f"network '{name}' has nothing left of {image_size} pixels; take one without _AP")
    stages, before = _stages(blocks, 64, norm, averaging, bottleneck)
    layers += stages
    if not averaging:
        side = 1
        layers.append(nn.AdaptiveAvgPool2d(1))
    elif said["variant"]:
        side = 3 if channels == 1 else 4  # as at the published 28 and 32 pixels
        layers.append(nn.AdaptiveAvgPool2d(side))
    return Classifier(nn.Sequential(*layers, nn.Flatten()), before * side**2, num_classes)


def build_sized_resnet(
    depth: int, image_size: int, num_classes: int, norm: str, averaging: bool, planes: int = 64, cifar: bool = False
) -> Classifier:
    """IDC's ResNet, or its ResNet-AP where `averaging`, for (B, 3, image_size, image_size).

    Above 128 pixels the stem quarters the image, above 64 it halves it, below that it keeps every pixel. The last map
    is averaged to one pixel, and convolutions begin as N(0, 2 / (side² · planes out)).

    depth   10, 18, 34, 50, 101, 152 or 200; with `cifar` 6n + 2, for four stages of n blocks at half the widths
    norm    in, bn or nn
    planes  of the first stage; they double from stage to stage

    UserError for another depth, or an image of which an average leaves nothing.
    Source: IDC (Kim et al., ICML 2022), whose depth 10 is the ResNetAP-10 of Minimax diffusion and VLCP.
    """
    if cifar:
        blocks, bottleneck, planes = ((depth - 2) // 6,) * 4, False, planes // 2
    elif str(depth) in _DEPTHS and depth > 6:
        blocks, bottleneck = _DEPTHS[str(depth)]
    else:
        known = [name for name in _DEPTHS if name != "6"]
        raise UserError(f"there is no ResNet of --depth {depth}; choose from {', '.join(known)}")
    if not blocks[0] or planes < 1:
        raise UserError(f"a ResNet of depth {depth} with {planes} planes has no blocks; take more depth or width")
    small, large = cifar or image_size <= 64, image_size > 128
    step = 2 if large and not averaging else 1
    stem = [*_conv(3, planes, 7 if large else 3, step, norm), nn.ReLU()]
    if not small:
        stem.append(nn.AvgPool2d(4 if large else 2) if averaging else nn.MaxPool2d(3, stride=2, padding=1))
    side = side_after(stem, image_size)
    if side < (8 if averaging else 1):  # three averages halve it
        raise UserError(f"images of {image_size} pixels are too small for a ResNet-AP; take --net_type resnet")
    stages, features = _stages(blocks, planes, norm, averaging, bottleneck)
    net = Classifier(nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten()), features, num_classes)
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, 0, math.sqrt(2 / (part.kernel_size[0] ** 2 * part.out_channels)))
    return net


def _stages(
    blocks: Sequence[int], planes: int, norm: str, averaging: bool, bottleneck: bool
) -> tuple[list[nn.Module], int]:
    """So many blocks at each width, from `planes` on, each the double of the last; and the planes at the end."""
    stages, before = [], planes
    for place, count in enumerate(blocks):
        for block in range(count):
            width, stride = planes << place, 2 if place and not block else 1
            stages.append(Block(before, width, stride, norm, averaging, bottleneck))
            before = 4 * width if bottleneck else width
    return stages, before


def _conv(before: int, after: int, kernel: int, stride: int, norm: str) -> list[nn.Module]:
    bias = norm == "nn"  # a norm has one of its own
    return [nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=bias), NORMS[norm](after, 0)]


def _pool(stride: int) -> list[nn.Module]:
    return [nn.AvgPool2d(stride)] if stride > 1 else []
