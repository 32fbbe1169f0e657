"""Any network as a function of one flat weight vector: `flat(vector, *inputs)`, differentiable twice in both."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class FlatModule:
    """A network whose trainable parameters are one vector (P,), in the order of `net.parameters()`.

    Frozen parameters and buffers stay the network's own (a BatchNorm in training mode goes on updating its running
    statistics). The trainable ones are found once, here: freeze first, wrap then. `net` is held, not copied, so
    `net.train()`, `net.eval()` and `net.to(device)` act on later calls. The field calls this a "ReparamModule".
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.shapes = [(name, weight.shape) for name, weight in net.named_parameters() if weight.requires_grad]
        self.sizes = [math.prod(shape) for _, shape in self.shapes]
        self.size = sum(self.sizes)

    def __call__(self, vector: Tensor, *inputs: Any) -> Any:
        """The network's output with the weights of `vector` (P,); ValueError for any other shape."""
        return functional_call(self.net, self.unflatten(vector), inputs)

    def flatten(self) -> Tensor:
        """A copy (P,) of the current weights, without a graph."""
        weights = [weight.detach().reshape(-1) for weight in self.parameters()]
        return torch.cat(weights) if weights else torch.empty(0)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The weights by name, as views of `vector` (P,)."""
        if vector.shape != (self.size,):
            raise ValueError(f"a weight vector of shape {tuple(vector.shape)} for {self.size} weights")
        # One split is one node of the graph, however many tensors there are.
        pieces = vector.split(self.sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes, pieces, strict=True)}

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters themselves, for an ordinary optimiser."""
        named = dict(self.net.named_parameters())
        return [named[name] for name, _ in self.shapes]

    @torch.no_grad()
    def load(self, vector: Tensor) -> None:
        """Write `vector` (P,) into the network, for ordinary training and evaluation."""
        for weight, value in zip(self.parameters(), self.unflatten(vector).values(), strict=True):
            weight.copy_(value)
