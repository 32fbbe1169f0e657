"""ResNets by name: `ResNet18`, 34, 50, 101 and 152, with instance norm, or batch norm where the name says `BN`.

The stem is that of small images (3×3, stride 1), the published size 32 pixels (28 of one channel does as well).
`_AP` replaces every strided convolution by one of stride 1 and a 2×2 average, and keeps its last map whole.
`_Adaptive` takes any size with as many weights, `_Tiny` (DATM's) 64 pixels by a stem of stride 2. `ResNet18ImageNet`
and `ResNet6ImageNet` have the 7×7 stem and take any size.
Source: He et al., CVPR 2016, as in DC (Zhao et al., ICLR 2021) and MTT (Cazenavette et al., CVPR 2022).
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from networks.layers import NORMS, Classifier, check_size, side_after
from utils.errors import UserError

_NAME = re.compile(r"ResNet(?P<depth>\d+)(?P<norm>BN)?(?P<ap>_AP)?(?:_(?P<variant>Tiny|Adaptive)|(?P<large>ImageNet))?")

# Blocks at each of the four widths, and whether they are bottlenecks (four times as wide at their end).
_DEPTHS = {
    "6": ((1, 1, 1, 1), False),
    "18": ((2, 2, 2, 2), False),
    "34": ((3, 4, 6, 3), False),
    "50": ((3, 4, 6, 3), True),
    "101": ((3, 4, 23, 3), True),
    "152": ((3, 8, 36, 3), True),
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
    before = 64
    for place, count in enumerate(blocks):
        for block in range(count):
            width, stride = 64 << place, 2 if place and not block else 1
            layers.append(Block(before, width, stride, norm, averaging, bottleneck))
            before = 4 * width if bottleneck else width
    if not averaging:
        side = 1
        layers.append(nn.AdaptiveAvgPool2d(1))
    elif said["variant"]:
        side = 3 if channels == 1 else 4  # as at the published 28 and 32 pixels
        layers.append(nn.AdaptiveAvgPool2d(side))
    return Classifier(nn.Sequential(*layers, nn.Flatten()), before * side**2, num_classes)


def _conv(before: int, after: int, kernel: int, stride: int, norm: str) -> list[nn.Module]:
    return [nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False), NORMS[norm](after, 0)]


def _pool(stride: int) -> list[nn.Module]:
    return [nn.AvgPool2d(stride)] if stride > 1 else []
