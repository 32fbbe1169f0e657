"""Reverse over forward: another way back through one inner step, by fewer products than a second derivative takes.

What a step hands back is the gradient, in weights θ and in the learned batch x, of ⟨v, ∇ℓ(θ; x)⟩ for the adjoint v of
its gradient. That number is the slope of ℓ along v,
    ⟨v, ∇ℓ(θ; x)⟩ = d/dε ℓ(θ + ε v; x)  at ε = 0,
one pass forwards with dual numbers, through which one pass backwards is all that is left: 8 F for both, where a second
derivative takes 9 F. In time the two are near each other on a CPU, and it is the second derivative that is ahead
(docs/benchmarks.md); a GPU was not at hand.

torch's forward derivatives of its normalisation layers take their statistics for constants when they are differentiated
once more, and nothing tells. So they are written out here in plain operations, and `checked` compares the first pull of
a run with the ordinary one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from methods.core.inner import Draw, Engine, Params, StepLoss, loss_gradient, second_derivative
from utils.errors import first_line
from utils.rng import seeded

CLOSE = 1e-3  # relative difference from the ordinary pull, above which something is wrong rather than rounded


class Forward:
    """An `Engine` that pulls by reverse over forward."""

    def __init__(self, step_loss: StepLoss) -> None:
        self.step_loss = step_loss

    def gradient(self, weights: Params, draw: Draw) -> Params:
        return loss_gradient(self.step_loss, weights, draw)

    def pull(
        self, weights: Params, vector: Params, draw: Draw, leaves: Sequence[Tensor]
    ) -> tuple[Params, Sequence[Tensor | None]]:
        heads = {group: value.detach().requires_grad_() for group, value in weights.items()}
        along = {group: value for group, value in vector.items() if value is not None}

        def loss(moved: Params) -> Tensor:
            with _WrittenOut():
                return self.step_loss(heads | moved, draw)

        device = next(iter(weights.values())).device
        with torch.enable_grad(), seeded(draw.seed, device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of what it loads for its first forward derivative
            _, slope = torch.func.jvp(loss, ({group: heads[group] for group in along},), (along,))
        found = torch.autograd.grad(slope, [*heads.values(), *leaves], allow_unused=True)
        return dict(zip(heads, found, strict=False)), found[len(heads) :]


def checked(engine: Engine, step_loss: StepLoss, start: Params, draw: Draw, leaves: Sequence[Tensor]) -> str | None:
    """Why an engine cannot replace `step_loss`'s own graphs (None: it can): found out by one pull of either."""
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    weights = {group: value.detach() for group, value in start.items()}
    try:
        vector = engine.gradient(weights, draw)
        bent, through = engine.pull(weights, vector, draw, leaves)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        return first_line(error)
    wanted = second_derivative(step_loss, weights, vector, draw, leaves)
    for ours, theirs in zip((*bent.values(), *through), (*wanted[0].values(), *wanted[1]), strict=True):
        zero = torch.zeros(())
        ours, theirs = (zero if value is None else value.detach() for value in (ours, theirs))
        if not (ours - theirs).norm().cpu() <= CLOSE * theirs.norm().cpu() + 1e-12:
            return "its gradients are not those of the plain way"
    return None


def _standard(values: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    centred = values - values.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(values: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    values = values if weight is None else values * weight.view(shape)
    return values if bias is None else values + bias.view(shape)


def _layer_norm(
    values: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return _affine(_standard(values, list(range(-len(shape), 0)), eps), weight, bias, tuple(shape))


def _group_norm(
    values: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    standard = _standard(values.reshape(len(values), groups, -1), [-1], eps).view(values.shape)
    return _affine(standard, weight, bias, (1, -1, *[1] * (values.dim() - 2)))


def _batch_norm(
    values: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As weight standardisation uses it; running statistics are the network's own, and no function can change them."""
    if mean is not None and training:
        raise RuntimeError("batch norm counts what it sees")
    shape = (1, -1, *[1] * (values.dim() - 2))
    if mean is None:
        standard = _standard(values, [dim for dim in range(values.dim()) if dim != 1], eps)
    else:
        standard = (values - mean.view(shape)) * (var.view(shape) + eps).rsqrt()
    return _affine(standard, weight, bias, shape)


_PLAIN: dict[Callable, Callable] = {
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
}


class _WrittenOut(TorchFunctionMode):
    """Within the block normalisation layers are computed by plain operations."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))
