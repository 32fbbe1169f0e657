"""The inner loop (a network trained for a few steps on the learned set) and the gradient that goes back through it.

One inner step s maps weights θ_s (and, for Adam, its moments) to the next ones, using the gradient of the loss on the
batch that a `Draw` picks. An objective scores the final weights; `hypergradient` returns it and adds its gradient to
whatever was learned: pixels, texts, labels, step sizes. Three ways of computing that gradient:

exact      Run the steps without a graph and keep only the states. Then sweep backwards: rebuild one step from its state
           and its draw, and pull the adjoint λ_{s+1} = ∂objective/∂θ_{s+1} through it to λ_s and to the learned set.
           Memory: one step's graph, and S states.  The gradient is that of `unroll` to float precision.
unroll     Plain back-propagation through all steps: the oracle. Memory grows with S.
detached   TESLA (Cui et al., ICML 2023), as in LoRS: the same sweep with λ held at its final value, so all Hessian
           terms are dropped. Plain SGD only; exact for S = 1, an approximation beyond.

In forward passes F a step costs some 3 F without a graph and 9 F from its loss to the end of the pull, so `unroll`
takes 9 F a step and `exact` 12 F, but for the last `keep` steps, whose graphs it builds at once: 9 F. replay.py fills
a memory budget with them. pull.py has a way through a step for some 11 F in all.

With a `window` only the last steps are differentiated, in any mode: those before it leave weights and moments, which
are constants then (RaT-BPTT, Feng et al., ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from utils.rng import seeded

Params = dict[str, Tensor]  # weight group → flat vector (P_g,)
MODES = ("exact", "unroll", "detached")


@dataclass(frozen=True)
class Draw:
    """One inner step's chance. Replaying it gives the same loss.

    indices   (B,) long, the learned items in the batch
    seed      of dropout, crops and every other random choice of the step
    """

    indices: Tensor
    seed: int


StepLoss = Callable[[Params, Draw], Tensor]


class Inner(Protocol):
    """A pure, differentiable optimiser. Its state is a flat dict: the weight groups and, beside them, its moments."""

    def start(self, params: Params) -> Params: ...
    def step(self, number: int, state: Params, grads: Params) -> Params: ...


class InnerSGD:
    """θ ← θ − η g, with one learnable scalar η a group (or one for all); otherwise as `torch.optim.SGD`.

    milestones   steps from which on the rate is `gamma` times what it was before
    """

    def __init__(
        self,
        lr: Params | Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        milestones: Sequence[int] = (),
        gamma: float = 0.1,
    ) -> None:
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.milestones, self.gamma = milestones, gamma

    def start(self, params: Params) -> Params:
        if not self.momentum:
            return dict(params)
        return dict(params) | {f"{group}.velocity": torch.zeros_like(params[group]) for group in params}

    def step(self, number: int, state: Params, grads: Params) -> Params:
        factor = self.gamma ** sum(number >= milestone for milestone in self.milestones)
        following: Params = {}
        for group, grad in grads.items():
            if self.weight_decay:
                grad = grad + self.weight_decay * state[group]
            if self.momentum:
                grad = following[f"{group}.velocity"] = self.momentum * state[f"{group}.velocity"] + grad
            rate = _rate(self.lr, group)
            following[group] = state[group] - (rate if factor == 1 else factor * rate) * grad
        return following


class InnerAdam:
    """Adam as in `torch.optim.Adam` (no weight decay), differentiable in its weights, gradients, moments and rates."""

    def __init__(self, lr: Params | Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.lr, self.betas, self.eps = lr, betas, eps

    def start(self, params: Params) -> Params:
        zeros = {f"{group}.{m}": torch.zeros_like(params[group]) for group in params for m in ("mean", "square")}
        return dict(params) | zeros

    def step(self, number: int, state: Params, grads: Params) -> Params:
        first, second = self.betas
        following: Params = {}
        for group, grad in grads.items():
            mean = first * state[f"{group}.mean"] + (1 - first) * grad
            square = second * state[f"{group}.square"] + (1 - second) * grad * grad
            # A weight that never had a gradient has square = 0, where the slope of the root is infinite.
            root = (square / (1 - second ** (number + 1))).clamp_min(torch.finfo(square.dtype).tiny).sqrt()
            update = mean / (1 - first ** (number + 1)) / (root + self.eps)
            following[group] = state[group] - _rate(self.lr, group) * update
            following[f"{group}.mean"], following[f"{group}.square"] = mean, square
        return following


def unroll(
    step_loss: StepLoss, start: Params, draws: Sequence[Draw], inner: Inner, window: int | None = None
) -> Params:
    """The weights after training from `start` on `draws`; only the last `window` steps (None: all) carry a graph."""
    first = _first(draws, window)
    state = inner.start(start)
    for number, draw in enumerate(draws):
        if number >= first:
            state = _step(step_loss, inner, number, _attached(state), draw, tuple(start))
        else:
            state = _step_without_graph(step_loss, inner, number, state, draw, tuple(start))
    return {group: state[group] for group in start}


class Engine(Protocol):
    """Another way through an inner step than by this file's graphs, such as pull.py's or compiled code.

    gradient(weights, draw)              ∇ℓ, the gradient of the step's loss, without a graph
    pull(weights, vector, draw, leaves)  the gradients of ⟨vector, ∇ℓ⟩ in the weights, and in each leaf that has any
    """

    def gradient(self, weights: Params, draw: Draw) -> Params: ...
    def pull(
        self, weights: Params, vector: Params, draw: Draw, leaves: Sequence[Tensor]
    ) -> tuple[Params, Sequence[Tensor | None]]: ...


def hypergradient(
    step_loss: StepLoss,
    start: Params,
    draws: Sequence[Draw],
    inner: Inner,
    objective: Callable[[Params], Tensor],
    leaves: Sequence[Tensor],
    mode: str = "exact",
    window: int | None = None,
    keep: int = 1,
    engine: Engine | None = None,
) -> Tensor:
    """`objective` of the weights after the inner loop; its gradient is added to `.grad` of the `leaves`.

    leaves   the learned tensors, inner rates among them; one that plays no part is left as it is
    mode     `exact`, `unroll` or `detached`, as this module's docstring tells
    window   differentiate only the last so many steps (None: all), in any mode
    keep     build the graphs of so many last steps at once, `exact` only. 0 works the objective out before any graph is
             built: for one that takes memory itself
    engine   replays steps in place of `step_loss`, except those that are kept; not for `unroll`
    """
    if mode not in MODES:
        raise ValueError(f"mode is '{mode}', not one of {MODES}")
    if mode == "detached" and (not isinstance(inner, InnerSGD) or inner.momentum or inner.weight_decay):
        raise ValueError(
            "mode 'detached' drops the terms that carry Adam's moments, momentum and decay; use it with plain SGD"
        )
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    if mode == "unroll" or not draws:
        loss = objective(unroll(step_loss, start, draws, inner, window))
        _add_grads(leaves, torch.autograd.grad(loss, leaves, allow_unused=True))
        return loss.detach()

    loop = _Loop(step_loss, inner, tuple(start), leaves, engine)
    first = _first(draws, window)
    ahead = max(first, len(draws) - (keep if mode == "exact" else min(keep, 1)))
    state, past = loop.walk(start, draws[:ahead], first)
    # The last steps are built with their graphs, and the objective on top of them. The weights that the window starts
    # from were not learned here, so nothing is pulled back to them.
    begun = final = _attached(state)
    for number in range(ahead, len(draws)):
        final = loop.step(number, final, draws[number])
    back = begun if ahead > first else {}
    if ahead == len(draws) or mode == "detached":
        loss, adjoint = loop.slope(objective, final)
        if ahead < len(draws):
            _add_grads(leaves, _pull(final, adjoint, leaves))
    else:
        loss = objective({group: final[group] for group in start})
        adjoint = loop.pull({"": loss}, {"": torch.ones_like(loss)}, back)
    del final, begun, back, state

    for number in range(ahead - 1, first - 1, -1):
        pulled = loop.pull_step(number, *past.pop(number), draws[number], adjoint, mode == "exact" and number > first)
        adjoint = adjoint if mode == "detached" else pulled
    return loss.detach()


@dataclass(frozen=True)
class _Loop:
    """An inner loop and what is differentiated: all that a walk forwards and a sweep backwards have in common."""

    step_loss: StepLoss
    inner: Inner
    groups: Sequence[str]
    leaves: Sequence[Tensor]
    engine: Engine | None

    def walk(
        self, start: Params, draws: Sequence[Draw], first: int
    ) -> tuple[Params, dict[int, tuple[Params, Params | None]]]:
        """The state after these steps without a graph, and those before each step from `first` on; beside each, where
        there is an engine, the gradient that was found there."""
        state, past = {name: value.detach() for name, value in self.inner.start(start).items()}, {}
        for number, draw in enumerate(draws):
            weights = {group: state[group] for group in self.groups}
            if self.engine is None:
                grads = loss_gradient(self.step_loss, weights, draw)
            else:
                grads = self.engine.gradient(weights, draw)
            if number >= first:
                past[number] = state, None if self.engine is None else grads
            with torch.no_grad():
                state = self.inner.step(number, state, grads)
        return state, past

    def step(self, number: int, state: Params, draw: Draw) -> Params:
        return _step(self.step_loss, self.inner, number, state, draw, self.groups)

    def pull_step(
        self, number: int, state: Params, grads: Params | None, draw: Draw, adjoint: Params, back: bool
    ) -> Params:
        """Pull the adjoint of the state after a step to the one before it, if it is asked for, and to the leaves."""
        state = _attached(state)
        if self.engine is None:
            return self.pull(self.step(number, state, draw), adjoint, state if back else {})
        # The update alone gives what is direct, and the adjoint of the gradient; the engine takes that one further.
        grads = _attached(grads)
        direct = _pull(self.inner.step(number, state, grads), adjoint, [*state.values(), *grads.values(), *self.leaves])
        vector = dict(zip(self.groups, direct[len(state) :], strict=False))
        weights = {group: state[group].detach() for group in self.groups}
        bent, through = self.engine.pull(weights, vector, draw, self.leaves)
        for found in (direct[len(state) + len(grads) :], through):
            _add_grads(self.leaves, found)
        pulled = dict(zip(state, direct, strict=False))
        return pulled | {group: _sum(pulled[group], bent[group]) for group in self.groups} if back else {}

    def slope(self, objective: Callable[[Params], Tensor], state: Params) -> tuple[Tensor, Params]:
        """The objective at these weights, taken as constants, and its gradient in them; that in the leaves is added."""
        heads = {group: state[group].detach().requires_grad_() for group in self.groups}
        loss = objective(heads)
        return loss, self.pull({"": loss}, {"": torch.ones_like(loss)}, heads)

    def pull(self, outputs: Params, adjoint: Params, state: Params) -> Params:
        """`_pull` to a state, which is returned, and to the leaves, whose gradients are added."""
        pulled = _pull(outputs, adjoint, [*state.values(), *self.leaves])
        _add_grads(self.leaves, pulled[len(state) :])
        return dict(zip(state, pulled, strict=False))


def _step(step_loss: StepLoss, inner: Inner, number: int, state: Params, draw: Draw, groups: Sequence[str]) -> Params:
    """The next state, with a graph back to `state` and to all that the loss read."""
    grads = _gradient(step_loss, state, draw, groups, graph=True)
    return inner.step(number, state, grads)


def loss_gradient(step_loss: StepLoss, weights: Params, draw: Draw) -> Params:
    """The gradient of a step's loss in the weights, taken as constants, without a graph."""
    return _gradient(step_loss, _attached(weights), draw, tuple(weights), graph=False)


def second_derivative(
    step_loss: StepLoss, weights: Params, vector: Params, draw: Draw, leaves: Sequence[Tensor]
) -> tuple[Params, Sequence[Tensor | None]]:
    """The gradients of ⟨vector, ∇ℓ⟩ in the weights and in each leaf, by differentiating twice: what an engine's `pull`
    has to give."""
    heads = {group: value.detach().requires_grad_() for group, value in weights.items()}
    grads = _gradient(step_loss, heads, draw, tuple(heads), graph=True)
    found = _pull(grads, vector, [*heads.values(), *leaves])
    return dict(zip(heads, found, strict=False)), found[len(heads) :]


def _step_without_graph(
    step_loss: StepLoss, inner: Inner, number: int, state: Params, draw: Draw, groups: Sequence[str]
) -> Params:
    grads = loss_gradient(step_loss, {group: state[group] for group in groups}, draw)
    with torch.no_grad():
        return inner.step(number, state, grads)


def _gradient(step_loss: StepLoss, state: Params, draw: Draw, groups: Sequence[str], graph: bool) -> Params:
    weights = {group: state[group] for group in groups}
    with torch.enable_grad():
        with seeded(draw.seed, next(iter(weights.values())).device):
            loss = step_loss(weights, draw)
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=graph)
    return dict(zip(groups, grads, strict=True))


def _attached(state: Params) -> Params:
    """The state with graph-carrying tensors as they are and all others turned into leaves that ask for a gradient."""
    return {name: value if value.requires_grad else value.detach().requires_grad_() for name, value in state.items()}


def _pull(outputs: Params, adjoint: Params, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The vector–Jacobian products of a step: `adjoint` of its outputs, pulled back to its inputs."""
    known = [name for name, vector in adjoint.items() if vector is not None and outputs[name].requires_grad]
    return torch.autograd.grad(
        [outputs[name] for name in known], inputs, [adjoint[name] for name in known], allow_unused=True
    )


def _add_grads(leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for leaf, grad in zip(leaves, grads, strict=True):
        if grad is not None:
            leaf.grad = grad.detach().clone() if leaf.grad is None else leaf.grad.add_(grad)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other


def _rate(lr: Params | Tensor, group: str) -> Tensor:
    return lr[group] if isinstance(lr, dict) else lr


def _first(draws: Sequence[Draw], window: int | None) -> int:
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; at least the last step must carry a graph")
    return 0 if window is None else max(0, len(draws) - window)
