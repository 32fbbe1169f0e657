"""Stochastic depth that does not depend on which process has an image.

Networks such as Swin leave out a block for some of a batch's images, as torch's global chance has it: with each process
drawing for its own share, two would not learn what one does. Here the chance is drawn for the whole batch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from utils.rng import generator


class Depths:
    """Takes over the chance of a network's DropPath layers (timm's); `draw` it before each step.

    rows  of a whole batch, of which this process has `own`
    """

    def __init__(self, net: nn.Module, seed: int, rows: int, own: slice) -> None:
        self.seed, self.rows, self.own = seed, rows, own
        self.layers = [layer for layer in net.modules() if type(layer).__name__ == "DropPath" and layer.drop_prob]
        self._chances = torch.empty(0)
        for number, layer in enumerate(self.layers):
            layer.forward = functools.partial(self._forward, layer, layer.forward, number)

    def draw(self, step: int, device: torch.device) -> None:
        """The chance of this step, of each layer and image."""
        if self.layers:
            rng = generator(self.seed, "depth", step)
            chances = torch.rand(len(self.layers), self.rows, generator=rng)[:, self.own]
            # From pinned memory, or the processor would wait here until the GPU has done all steps before.
            self._chances = (chances.pin_memory() if device.type == "cuda" else chances).to(device, non_blocking=True)

    def _forward(self, layer: nn.Module, usual: functools.partial[Tensor], number: int, x: Tensor) -> Tensor:
        if not layer.training or len(x) != self._chances.shape[-1]:  # a layer that sees parts of images is left alone
            return usual(x)
        kept = (self._chances[number] >= layer.drop_prob).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return x * (kept / (1 - layer.drop_prob) if layer.scale_by_keep else kept)
