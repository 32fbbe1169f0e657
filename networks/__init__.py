"""Networks by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from utils.registry import Registry

if TYPE_CHECKING:
    from torch import nn

NETWORKS = Registry("network")


@NETWORKS("convnet")
def _convnet(*args, **options) -> nn.Module:
    from networks.convnet import build_convnet

    return build_convnet(*args, **options)


@NETWORKS("mlp")
def _mlp(*args, **options) -> nn.Module:
    from networks.classic import build_mlp

    return build_mlp(*args, **options)


def build_network(name: str, image_size: int, num_classes: int | None = None, channels: int = 3) -> nn.Module:
    """A freshly drawn classifier of (B, channels, image_size, image_size) → (B, num_classes).

    Without `num_classes` it gives its features (B, num_features) instead. UserError for a name nobody knows, naming
    the nearest one, or an image too small for the network.
    """
    return NETWORKS[_family(name)](name, image_size, num_classes, channels)


def is_network(name: str) -> bool:
    """Whether `build_network` has a builder for this name."""
    return _family(name) in NETWORKS


def has_batch_norm(net: nn.Module) -> bool:
    """Whether a network keeps running statistics, which lie outside its weights."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(module, _BatchNorm) for module in net.modules())


def list_networks() -> list[str]:
    """The names `build_network` knows; `convnet` also takes depth, width and norm: `ConvNetD4W64BN`."""
    return NETWORKS.names()


def _family(name: str) -> str:
    return "convnet" if name.lower().startswith("convnet") else name.lower()
