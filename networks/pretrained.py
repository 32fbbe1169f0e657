"""Architectures of torchvision by their names there, and the published weights of them: RDED's, and torchvision's own.

`resnet18_modified` (and 34, 50, 101, 152) has the stem of small images: a 3×3 convolution of stride 1, no pooling.
`conv3` to `conv6` are RDED's ConvNets: width 128, batch norm, average pooling.
Sources: torchvision; RDED (Sun et al., CVPR 2024).
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from networks.convnet import build_convnet
from networks.weights import load_state, read_state
from utils.errors import UserError, first_line
from utils.registry import nearest

_CONVNET = re.compile(r"conv(\d+)")
MODIFIED = "_modified"
PUBLISHED = "torchvision"  # where --teacher says this, the weights that torchvision publishes


def build_architecture(name: str, image_size: int, num_classes: int) -> nn.Module:
    """An untrained classifier of (B, 3, image_size, image_size) → (B, num_classes); UserError for a name nobody knows,
    or an image it does not take."""
    if depth := _CONVNET.fullmatch(name):
        return build_convnet(f"ConvNetD{depth[1]}BN", image_size, num_classes)
    from torchvision import models

    plain = name.removesuffix(MODIFIED)
    known = models.list_models(module=models)
    if plain not in known or (plain != name and not plain.startswith("resnet")):
        hint = nearest(name, [*known, "resnet18_modified", "conv3", "conv4", "conv5", "conv6"])
        raise UserError(f"unknown network '{name}'{hint}; take conv<depth>, resnet18_modified or a name of torchvision")
    options: dict[str, Any] = {"image_size": image_size} if plain.startswith("vit_") else {}
    if plain in ("inception_v3", "googlenet"):
        options |= {"aux_logits": False, "init_weights": True}
    try:
        net = models.get_model(plain, weights=None, num_classes=num_classes, **options)
    except (ValueError, AssertionError) as error:  # such as a transformer whose patches do not fit the image
        raise UserError(f"network '{name}' does not take images of {image_size} pixels ({first_line(error)})") from None
    if plain != name:
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return _tried(net, name, image_size)


def load_architecture(
    name: str, source: str, image_size: int, num_classes: int, rows: Sequence[int] | None = None
) -> nn.Module:
    """The classifier `name` with the weights in `source`, in evaluation mode.

    source  a file (`torch.save` with the weights under `model`, or .safetensors), or `torchvision`
    rows    which classes of the weights are ours, in our order; None: all, as many as `num_classes`
    """
    if source == PUBLISHED:
        state, where = _published(name), f"torchvision's {name}"
    else:
        state, where = read_state(source, "teacher"), str(source)
    last = next((key for key in reversed(state) if key.endswith(".weight") and state[key].ndim == 2), None)
    found = num_classes if last is None else len(state[last])
    net = build_architecture(name, image_size, num_classes if rows is None else found)
    load_state(net, _renamed(state) if _CONVNET.fullmatch(name) else state, where)
    if rows is not None:
        _keep(net, torch.as_tensor(rows), where)
    return net.eval()


def _keep(net: nn.Module, rows: Tensor, where: str) -> None:
    """Only these outputs of the last layer, in this order."""
    place, last = [(name, part) for name, part in net.named_modules() if isinstance(part, nn.Linear)][-1]
    if int(rows.max()) >= last.out_features:
        raise UserError(f"{where} knows {last.out_features} classes, none of number {int(rows.max())}")
    kept = nn.Linear(last.in_features, len(rows))
    kept.load_state_dict({name: value[rows] for name, value in last.state_dict().items()})
    parent, _, name = place.rpartition(".")
    setattr(net.get_submodule(parent), name, kept)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ConvNet's weights by our names, where they have RDED's: layers.conv.0.weight, layers.norm.0.weight."""
    found = {}
    for name, value in state.items():
        if match := re.fullmatch(r"layers\.(conv|norm)\.(\d+)\.(\w+)", name):
            kind, block, part = match.groups()
            name = f"features.{4 * int(block) + (kind == 'norm')}.{part}"
        found[name] = value
    return found


def _tried(net: nn.Module, name: str, image_size: int) -> nn.Module:
    """The network, if one image of this size goes through it."""
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError):
        raise UserError(
            f"network '{name}' does not take images of {image_size} pixels; take resnet18_modified or a larger --size"
        ) from None
    return net.train()


def _published(name: str) -> dict[str, Tensor]:
    """torchvision's first published weights, from its cache or its server."""
    from torchvision import models

    if name not in models.list_models(module=models):
        raise UserError(f"torchvision publishes no weights of '{name}'; give a file of them (--teacher)")
    weights = models.get_model_weights(name)["IMAGENET1K_V1"]
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    if file.is_file():
        return read_state(file, "teacher")
    remedy = f"put {weights.url} there, or give a file (--teacher)"
    try:
        # The download itself has no limit of time; this has.
        urllib.request.urlopen(urllib.request.Request(weights.url, method="HEAD"), timeout=5).close()
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UserError(f"weights {file} are not here and cannot be fetched ({first_line(error)}); {remedy}") from None
