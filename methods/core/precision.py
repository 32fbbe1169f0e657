"""How precisely inner loops and experts compute: `--precision`.

float32   everywhere, and strictly: on a CUDA GPU convolutions, too, which PyTorch by itself lets round their factors to
          TF32's ten bits. Differences of gradients, many steps long, come out alike on a CPU and on any GPU only where
          nothing is rounded away on purpose. So this is the default, although it is the slowest.
tf32      matrix products and convolutions of float32 numbers whose factors are rounded to TF32. Needs a CUDA GPU.
bf16      networks run in bfloat16 (torch.autocast), forward and backward; weights, gradients, what is matched and the
          optimisers stay float32, and so do losses, which get the networks' outputs as float32.

Only inner loops and the training of experts (vldd, mtt, podd) have this choice. Scores of these methods, and networks
that judge their sets, are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from utils.config import option
from utils.errors import UserError

PRECISIONS = ("float32", "tf32", "bf16")


@dataclass(frozen=True)
class SpeedConfig:
    """How inner loops and experts compute."""

    precision: str = option(
        "float32",
        "of inner loops and experts: float32, strictly; tf32: products rounded (CUDA); bf16: networks in bfloat16",
        choices=PRECISIONS,
    )

    channels_last: bool = option(
        False, "lay images out channels last in front of convolutions; worth a try on a GPU with --precision bf16"
    )

    def on(self, device: torch.device) -> Speed:
        """These choices on a device; UserError where it has no such numbers."""
        return Speed(self.precision, device)

    def lay_out(self, net: nn.Module, name: str) -> None:
        """Have a network see images channels last, if that is asked for; UserError where it has no convolution.

        Every layer behind keeps to the layout of what it gets. Weights stay views of one flat vector: a convolution
        lays its own out, which is small beside images.
        """
        if not self.channels_last:
            return
        if not any(isinstance(part, nn.Conv2d) for part in net.modules()):
            raise UserError(f"--channels_last is for convolutions, and {name} has none; leave it out")
        net.register_forward_pre_hook(_last)


class Speed:
    """A precision on a device, as two contexts; UserError where the device does not have it."""

    def __init__(self, precision: str = "float32", device: torch.device | str = "cpu") -> None:
        self.precision, self.device = precision, torch.device(device)
        if precision == "tf32":
            _check_tf32(self.device)
        if precision == "bf16" and self.device.type not in ("cpu", "cuda"):
            raise UserError(f"--precision bf16 is for CPUs and CUDA GPUs, not for {self.device.type}; leave it out")

    def numbers(self) -> AbstractContextManager[None]:
        """Around all that learns, forward and backward: how float32 numbers are multiplied."""
        return numbers("tf32" if self.precision == "tf32" else "float32")

    def forward(self) -> AbstractContextManager[None]:
        """Around the forward pass of a network alone: what it computes in. Its outputs may be bfloat16: see `wide`."""
        if self.precision != "bf16":
            return nullcontext()
        # The cache of weights already cast would outlive a step's graph, and mix two steps' weights.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)


@contextmanager
def numbers(precision: str) -> Iterator[None]:
    """Within the block CUDA GPUs multiply float32 numbers as `float32` or `tf32` says; afterwards as before.

    Also a decorator: `@numbers("float32")`.
    """
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before


def _last(net: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    images, *rest = inputs
    # Of one channel both layouts hold the same, and `contiguous` would leave the strides of the other.
    laid = images.clone if images.shape[1] == 1 else images.contiguous
    return laid(memory_format=torch.channels_last), *rest


def _check_tf32(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(
            f"--precision tf32 needs a CUDA GPU, and this run is on {device.type}; give --precision bf16 or float32"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise UserError(
            f"--precision tf32 needs a CUDA GPU of compute capability 8.0, and this one has {major}.{minor}; "
            "give --precision float32"
        )
