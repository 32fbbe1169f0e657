"""Many networks of one architecture trained side by side, as one matrix of weights.

Experts and the fresh networks that judge a set are independent copies of one small network: their weights are the rows
of a matrix (K, P), row k under its own seed and on its own batches. Each row's way is the one that it takes alone, to
float tolerance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from methods.core.training import EpochLoop, Recipe
from networks.flat import FlatModule
from networks.layers import wide
from utils.rng import seeded

SMALL = 2**17  # pixels in a network's batch: 128 images of 32 px
StackBatch = tuple[Tensor, Tensor]  # images (K, B, C, H, W), labels (K, B) long or (K, B, classes) float


class Stack:
    """K networks of one architecture as a function of their weights (K, P).

    vectorised   True: one call computes all networks (torch.func.vmap); False: one network after another. None: the
                 latter on a CPU, where a ConvNet's convolutions cost 1.4 to 2.1 times as much in one call as one by one
                 (tests/benchmarks/stack.py); on a GPU the former as long as a network's batch is so small that it
                 would wait for kernels to start, which also bounds the memory

    forward      what to run each network in: a fresh context (core/precision.py)

    `single` tells networks that can only be alone (K = 1): running statistics are the network's own and cannot be in
    two states at once, and dropout would draw for all networks together.
    """

    def __init__(
        self,
        net: nn.Module,
        vectorised: bool | None = None,
        forward: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.flat, self.forward = FlatModule(net), forward
        self.single = any(True for _ in net.buffers()) or any(
            isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0 for part in net.modules()
        )
        self.vectorised = vectorised
        self._template: nn.Module | None = None

    @property
    def net(self) -> nn.Module:
        return self.flat.net

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def at_once(self, images: Tensor) -> bool:
        """Whether one call computes all networks on images (K, B, C, H, W)."""
        if len(images) == 1:
            return False
        small = images.shape[1] * images.shape[-2:].numel() <= SMALL
        return self.device.type != "cpu" and small if self.vectorised is None else self.vectorised

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """Fresh weights (K, P), row k from seeds[k] alone, equal on every device. Running statistics begin anew."""
        self.check(len(seeds))
        if self._template is None:
            self._template = copy.deepcopy(self.net).cpu()
        template, rows = self._template, []
        for seed in seeds:
            with seeded(seed):
                for part in template.modules():
                    if hasattr(part, "reset_parameters"):
                        part.reset_parameters()
                    elif next(part.parameters(recurse=False), None) is not None:
                        raise ValueError(f"{type(part).__name__} has weights but no reset_parameters to draw them")
            rows.append(FlatModule(template).flatten())
        self.load_buffers(dict(template.named_buffers()))
        return torch.stack(rows).to(self.device)

    def __call__(self, weights: Tensor, images: Tensor) -> Tensor:
        """Logits (K, B, classes) of weights (K, P) on images (K, B, C, H, W), differentiable in both."""
        self.check(len(weights))
        if self.at_once(images):
            with self.forward():
                return wide(vmap(self.flat)(weights, images))
        return torch.stack([self.alone(row, own) for row, own in zip(weights, images, strict=True)])

    def alone(self, weights: Tensor, images: Tensor) -> Tensor:
        """Logits (B, classes) of one network's weights (P,) on its images (B, C, H, W)."""
        with self.forward():
            return wide(self.flat(weights, images))

    def gradient(self, weights: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each network's mean cross-entropy (K,) and its gradient (K, P).

        labels   (K, B) long, or (K, B, classes) float probabilities
        """
        self.check(len(weights))
        if self.at_once(images):
            leaf = weights.detach().requires_grad_()
            loss = stack_loss(self(leaf, images), labels)
            return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]
        # Only one network's graph at a time: it stays in the processor's cache.
        losses, grads = weights.new_empty(len(weights)), torch.empty_like(weights)
        for k, row in enumerate(weights):
            leaf = row.detach().requires_grad_()
            loss = F.cross_entropy(self.alone(leaf, images[k]), labels[k])
            losses[k], grads[k] = loss.detach(), torch.autograd.grad(loss, leaf)[0]
        return losses, grads

    def check(self, count: int) -> None:
        """ValueError for more than one network of a kind that can only be alone."""
        if self.single and count != 1:
            raise ValueError(f"{count} networks with running statistics or dropout in one stack; train them one by one")

    def buffers(self) -> dict[str, Tensor]:
        """A copy of the running statistics (of a network that has none: nothing)."""
        return {name: value.detach().clone() for name, value in self.net.named_buffers()}

    @torch.no_grad()
    def load_buffers(self, values: dict[str, Tensor]) -> None:
        for name, value in self.net.named_buffers():
            value.copy_(values[name])


def stack_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each network (K,): logits (K, B, classes), labels (K, B) long or (K, B, classes) float."""
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1), reduction="none")
    return each.view(logits.shape[:2]).mean(1)


@dataclass(frozen=True)
class Ascent:
    """GSAM with a constant radius, around the gradient of each step: experts whose way is flat.

    rho        radius ρ of the step uphill, after which the gradient is taken once more; 0 leaves plain SGD
    alpha      share of the plain gradient, as far as it is orthogonal to the second one, that is taken away
    adaptive   the step uphill is measured in units of each weight

    With g = ∇L(w), e = ρ w² g / (‖|w| g‖ + 1e-12) and p = ∇L(w + e), on the same batch, the step is along
    p − alpha (g − cos(g, p) ‖g‖ p / ‖p‖).
    Source: FTD (Du et al., CVPR 2023), after GSAM (Zhuang et al., ICLR 2022) and ASAM (Kwon et al., ICML 2021).
    """

    rho: float
    alpha: float
    adaptive: bool = True

    def uphill(self, weights: Tensor, grads: Tensor) -> Tensor:
        """e (K, P), each network by its own norms."""
        scale = weights.abs() if self.adaptive else torch.ones_like(weights)
        return self.rho * scale.square() * grads / ((scale * grads).norm(dim=1, keepdim=True) + 1e-12)

    def direction(self, grads: Tensor, second: Tensor) -> Tensor:
        """The gradient to step along (K, P), from the one at the weights and the one uphill."""
        # cos(g, p) ‖g‖ p / ‖p‖ is the projection of g on p.
        along = (grads * second).sum(1, keepdim=True) / second.square().sum(1, keepdim=True).clamp_min(1e-30)
        return second - self.alpha * (grads - along * second)


class StackTrainer(EpochLoop):
    """SGD on K networks at once; the whole state (weights, momentum, epoch) can be saved between two epochs.

    weights   (K, P), changed in place of a copy
    recipe    as for one network; its rate is that of the group `net`
    seeds     (K) of dropout; only networks that are alone have any
    ascent    GSAM in place of the plain gradient
    names     of the networks, for the error of one whose loss is not finite
    """

    def __init__(
        self,
        stack: Stack,
        weights: Tensor,
        recipe: Recipe,
        seeds: Sequence[int],
        ascent: Ascent | None = None,
        names: Sequence[str] = (),
    ) -> None:
        if len(seeds) != len(weights):
            raise ValueError(f"{len(seeds)} seeds for {len(weights)} networks")
        stack.check(len(weights))
        names = names or [f"network {k}" for k in range(len(weights))] if len(weights) > 1 else names
        super().__init__(stack.net, recipe, seeds[0], names)
        self.stack, self.ascent = stack, ascent if ascent is not None and ascent.rho > 0 else None
        self.weights = weights.detach().clone()
        self._momentum: Tensor | None = None

    @property
    def lr(self) -> float:
        """The rate of the present epoch."""
        passed = sum(self.epoch >= milestone for milestone in self.recipe.milestones)
        return self.recipe.lr["net"] * self.recipe.gamma**passed

    def fit(
        self,
        batches: Callable[[int], Iterable[StackBatch]],
        on_epoch: Callable[[int, Tensor], None] | None = None,
        what: str = "",
    ) -> None:
        """Train from the present epoch to the last; `on_epoch(epochs done, mean loss (K,))` after each.

        batches(epoch) gives images (K, B, C, H, W) and labels (K, B) long or (K, B, classes) float probabilities.
        RunError names the network, epoch and step of a loss that is not finite.
        """
        self._run(batches, on_epoch, what)

    def _step(self, batch: StackBatch) -> Tensor:
        images, labels = batch
        loss, grads = self.stack.gradient(self.weights, images, labels)
        if self.ascent is not None:
            statistics = self.stack.buffers()  # the second look at a batch must not count twice
            uphill = self.weights + self.ascent.uphill(self.weights, grads)
            grads = self.ascent.direction(grads, self.stack.gradient(uphill, images, labels)[1])
            self.stack.load_buffers(statistics)
        if self.recipe.weight_decay:
            grads.add_(self.weights, alpha=self.recipe.weight_decay)
        if self.recipe.momentum:
            if self._momentum is None:
                self._momentum = torch.zeros_like(self.weights)
            grads = self._momentum.mul_(self.recipe.momentum).add_(grads)
        self.weights.add_(grads, alpha=-self.lr)
        return loss

    def _epoch_over(self) -> None:
        if self.recipe.reset_momentum and self.epoch + 1 in self.recipe.milestones:
            self._momentum = None

    def state_dict(self) -> dict[str, object]:
        """Everything, as copies; the momentum is None before the first step and where there is none."""
        momentum = None if self._momentum is None else self._momentum.clone()
        return {
            "weights": self.weights.clone(),
            "momentum": momentum,
            "buffers": self.stack.buffers(),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict) -> None:
        device = self.weights.device
        self.weights = state["weights"].to(device, copy=True)
        momentum = state["momentum"]
        self._momentum = None if momentum is None else momentum.to(device, copy=True)
        self.stack.load_buffers(state["buffers"])
        self.epoch = state["epoch"]
