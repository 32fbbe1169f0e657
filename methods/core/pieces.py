"""A loss over more examples than fit in memory at once: its value and its gradient, summed up piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def summed(loss: Callable[[Tensor, Any], Tensor], weights: Tensor, pieces: Iterable[Any]) -> Tensor:
    """Σ loss(weights, piece), once differentiable in the weights; one piece's graph is in memory at a time."""
    return _Summed.apply(weights, loss, list(pieces))


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Callable[[Tensor, Any], Tensor], pieces: list[Any]) -> Tensor:
        leaf = weights.detach().requires_grad_()
        total, grads = weights.new_zeros(()), torch.zeros_like(weights)
        for piece in pieces:
            with torch.enable_grad():
                part = loss(leaf, piece)
            grads += torch.autograd.grad(part, leaf)[0]
            total += part.detach()
        ctx.save_for_backward(grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        return upstream * grads, None, None
