"""Networks by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.registry import Registry, nearest

if TYPE_CHECKING:
    from torch import nn

_VGGS = [f"VGG{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "BN")]
_RESNETS = [f"ResNet{depth}{norm}" for depth in (18, 34, 50, 101, 152) for norm in ("", "BN")]
_VARIANTS = ("", "_Tiny", "_Adaptive")  # the published size, 64 pixels, any size

NETWORKS = Registry("network")


@NETWORKS("ConvNet")
def _convnet(*args, **options) -> nn.Module:
    from networks.convnet import build_convnet

    return build_convnet(*args, **options)


@NETWORKS("MLP", "MLP_Tiny")
def _mlp(*args, **options) -> nn.Module:
    from networks.classic import build_mlp

    return build_mlp(*args, **options)


@NETWORKS(*(f"LeNet{variant}" for variant in _VARIANTS))
def _lenet(*args, **options) -> nn.Module:
    from networks.classic import build_lenet

    return build_lenet(*args, **options)


@NETWORKS(*(f"AlexNet{variant}" for variant in _VARIANTS))
def _alexnet(*args, **options) -> nn.Module:
    from networks.classic import build_alexnet

    return build_alexnet(*args, **options)


@NETWORKS(*(f"{name}{variant}" for name in _VGGS for variant in _VARIANTS))
def _vgg(*args, **options) -> nn.Module:
    from networks.classic import build_vgg

    return build_vgg(*args, **options)


@NETWORKS(*(f"{name}{variant}" for name in _RESNETS for variant in (*_VARIANTS, "_AP", "_AP_Adaptive")))
@NETWORKS("ResNet6ImageNet", "ResNet18ImageNet")
def _resnet(*args, **options) -> nn.Module:
    from networks.resnet import build_resnet

    return build_resnet(*args, **options)


# However a name is typed: `resnet18bn_ap`, or as DD-Ranking writes it, `ResNet-18-BN`.
_SPELLED = {name.lower(): name for name in NETWORKS.names()}


def build_network(name: str, image_size: int, num_classes: int | None = None, channels: int = 3) -> nn.Module:
    """A freshly drawn classifier of (B, channels, image_size, image_size) → (B, num_classes).

    Without `num_classes` it gives its features (B, num_features) instead. UserError for a name nobody knows, naming
    the nearest one, or an image too small for the network, or of a size for which it has another name.
    """
    found = _published(name)
    if found is None:
        raise UserError(
            f"unknown network '{name}'{nearest(name, [*NETWORKS.names(), *_SPELLED])}; known: ConvNet (ConvNetD4W64BN, "
            "…), MLP, LeNet, AlexNet, VGG11 to 19, ResNet18 to 152 (BN, _AP), many also _Adaptive, _Tiny; "
            "ResNet6ImageNet, ResNet18ImageNet"
        )
    return NETWORKS[found](name if found == "ConvNet" else found, image_size, num_classes, channels)


def is_network(name: str) -> bool:
    """Whether `build_network` has a builder for this name."""
    return _published(name) is not None


def has_batch_norm(net: nn.Module) -> bool:
    """Whether a network keeps running statistics, which lie outside its weights."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(module, _BatchNorm) for module in net.modules())


def list_networks() -> list[str]:
    """The names `build_network` knows, in any case; `ConvNet` also takes depth, width and more: `ConvNetD4W64BN`."""
    return NETWORKS.names()


def _published(name: str) -> str | None:
    """A network's name as the papers spell it (the ConvNets' first word alone), None for one nobody knows."""
    typed = name.lower()
    return "ConvNet" if typed.startswith("convnet") else _SPELLED.get(typed.replace("-", ""))
