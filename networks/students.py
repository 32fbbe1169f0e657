"""The networks of the validation protocol that Minimax diffusion took from IDC, by net type, depth, width and norm."""

from __future__ import annotations

from torch import nn

from networks.convnet import build_convnet
from networks.resnet import build_sized_resnet
from utils.errors import UserError

NET_TYPES = ("convnet", "resnet", "resnet_ap", "efficient", "densenet")
NORM_TYPES = {"instance": "in", "batch": "bn", "none": "nn"}


def student_depth(net_type: str, image_size: int, depth: int = 0) -> int:
    """The depth, where 0 stands for the published one: 10 for resnet_ap, 18 for resnet, and so many blocks of a ConvNet
    that its last map is 3 or 4 pixels wide (6 at 224)."""
    if depth or net_type not in ("convnet", "resnet", "resnet_ap"):
        return depth
    if net_type != "convnet":
        return {"resnet": 18, "resnet_ap": 10}[net_type]
    return max(1, (image_size // 3).bit_length() - 1)


def build_student(
    net_type: str,
    image_size: int,
    num_classes: int,
    depth: int = 0,
    width: float = 1.0,
    norm: str = "instance",
    cifar: bool = False,
) -> nn.Module:
    """An untrained student of (B, 3, image_size, image_size) → (B, num_classes).

    depth   see `student_depth`
    width   times the published one; of a ConvNet and of resnet_ap
    norm    instance, batch or none; efficient and densenet have batch norm
    cifar   the narrower ResNets that the published code has for CIFAR

    UserError for what does not exist.
    """
    depth = student_depth(net_type, image_size, depth)
    if net_type == "convnet":
        return build_convnet(f"ConvNetD{depth}W{int(128 * width)}{NORM_TYPES[norm]}", image_size, num_classes)
    if net_type in ("resnet", "resnet_ap"):
        averaging = net_type == "resnet_ap"
        if norm == "none" and not averaging:
            raise UserError(
                "--norm_type none is for --net_type convnet and resnet_ap, not resnet; take instance or batch"
            )
        planes = int((64 * width) if averaging else 64)
        return build_sized_resnet(depth, image_size, num_classes, NORM_TYPES[norm], averaging, planes, cifar)
    from torchvision import models

    if net_type == "efficient":
        return models.efficientnet_b0(num_classes=num_classes)
    net = models.DenseNet(12, (6, 12, 24, 16), 24, num_classes=num_classes)
    if image_size <= 64:  # the stem of small images: one convolution, nothing halved
        net.features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        for part in ("norm0", "relu0", "pool0"):
            delattr(net.features, part)
    return net
