"""The inner step as compiled code: `--compile`.

A step's loss comes in two parts: `batch(draw)`, all that differs from step to step, computed as ever, and
`loss(weights, *batch)`, a function of tensors alone. Of the loss two kernels are made, its gradient and the pull of
inner.py (the gradient of ⟨v, ∇ℓ⟩ in the weights and in the batch). torch.compile does not differentiate twice, so both
are traced first, derivatives and all, to one graph of plain operations, which it then compiles as it would any
inference; on a CUDA GPU a CUDA graph replays its kernels at once. Each shape of a batch is compiled once.

Dropout is drawn ahead, as masks beside the batch, so that it is an input, too: on a CPU those that the network itself
would have drawn, on a GPU others of their kind. A network that draws anything else, or counts what it sees (batch
norm), is not compiled. One line says so, or what else hinders compiling; such steps run as they always do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from methods.core.inner import Draw, Params
from utils.rng import seeded

MOST = 16  # shapes that are compiled; where there are more, something keeps changing, and compiling would never end
Batch = Sequence[Tensor | None]
Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Parts:
    """A step's loss in its two parts: called it is that loss, and beside it an engine of inner.py.

    batch     what a draw stands for: tensors (or None), of which those with a graph lead to what is learned
    kernels   of the loss; several kinds of batch may share them
    """

    batch: Callable[[Draw], Batch]
    kernels: Kernels

    def __call__(self, weights: Params, draw: Draw) -> Tensor:
        return self.kernels.loss(weights, *self.batch(draw))

    def gradient(self, weights: Params, draw: Draw) -> Params:
        with torch.no_grad():
            batch = self.batch(draw)
        return dict(zip(weights, self.kernels("gradient", weights, (), batch, (), draw.seed), strict=True))

    def pull(
        self, weights: Params, vector: Params, draw: Draw, leaves: Sequence[Tensor]
    ) -> tuple[Params, Sequence[Tensor | None]]:
        along = [torch.zeros_like(weights[group]) if value is None else value for group, value in vector.items()]
        with torch.enable_grad():
            batch = self.batch(draw)
        learned = [place for place, part in enumerate(batch) if part is not None and part.requires_grad]
        found = self.kernels("pull", weights, along, batch, learned, draw.seed)
        bent, through = dict(zip(weights, found, strict=False)), found[len(weights) :]
        if not learned:
            return bent, [None] * len(leaves)
        return bent, torch.autograd.grad([batch[at] for at in learned], leaves, through, allow_unused=True)


class Kernels:
    """The gradient of a loss and its pull, compiled for each shape of their inputs.

    loss(weights, *batch)   a scalar; group → flat vector
    why                     what hindered compiling, once anything did
    """

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss, self.why = loss, ""
        self._found: dict[Any, Function] = {}
        self._dropped: dict[Any, list[tuple[torch.Size, torch.dtype, float]]] = {}

    def __call__(
        self,
        kind: str,
        weights: Params,
        along: Sequence[Tensor],
        batch: Batch,
        learned: Sequence[int],
        seed: int,
    ) -> tuple[Tensor, ...]:
        """`gradient`: ∇ℓ of each group. `pull`: the gradients of ⟨along, ∇ℓ⟩ in each group, and in the batch's tensors
        at the places `learned`."""
        groups, there = tuple(weights), tuple(place for place, part in enumerate(batch) if part is not None)
        tensors = [*weights.values(), *along, *(batch[place] for place in there)]
        inputs = [part.detach() for part in tensors]
        inputs += self._masks(weights, batch, seed)
        shapes = tuple((part.shape, part.stride(), part.dtype) for part in inputs)
        key = kind, groups, len(batch), there, tuple(learned), shapes
        if key in self._found:
            with torch.no_grad():
                return _kept(self._found[key](*inputs))
        function = self._function(kind, groups, len(batch), there, learned)
        if self.why or len(self._found) == MOST:
            self._hinder("its batches have too many shapes")
            return function(*inputs)
        plain = function(*inputs)
        try:
            kernel = _compiled(function, inputs)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice, such as to let products be rounded: see precision.py
                found = _kept(kernel(*inputs))
            if not all(_near(*both) for both in zip(found, plain, strict=True)):
                raise RuntimeError("what came of it is not the same")
            self._found[key] = kernel
        except Exception as error:  # whatever a compiler, or one that is not there, may raise
            self._hinder(_first_line(error))
            self._found[key] = function
        return plain

    def _hinder(self, why: str) -> None:
        if not self.why:
            self.why = why
            print(f"note: --compile: inner steps are not compiled, and run as ever: {why}")

    def _function(
        self, kind: str, groups: Sequence[str], count: int, there: Sequence[int], learned: Sequence[int]
    ) -> Function:
        """The kernel in plain torch: weights, vectors, what there is of a batch, masks → gradients."""

        def slope(heads: Sequence[Tensor], rest: Sequence[Tensor], graph: bool) -> tuple[Tensor, ...]:
            batch = [None] * count
            for place, part in zip(there, rest, strict=False):
                batch[place] = part
            with _Given(rest[len(there) :]):
                loss = self.loss(dict(zip(groups, heads, strict=True)), *batch)
            return torch.autograd.grad(loss, heads, create_graph=graph)

        @torch.enable_grad()
        def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
            heads = [value.detach().requires_grad_() for value in inputs[: len(groups)]]
            return slope(heads, inputs[len(groups) :], False)

        @torch.enable_grad()
        def pull(*inputs: Tensor) -> tuple[Tensor, ...]:
            heads = [value.detach().requires_grad_() for value in inputs[: len(groups)]]
            along, rest = inputs[len(groups) : 2 * len(groups)], list(inputs[2 * len(groups) :])
            wanted = [there.index(place) for place in learned]
            for place in wanted:
                rest[place] = rest[place].detach().requires_grad_()
            inner = [*heads, *(rest[place] for place in wanted)]
            found = torch.autograd.grad(slope(heads, rest, True), inner, along, allow_unused=True)
            pairs = zip(found, inner, strict=True)
            return tuple(torch.zeros_like(part) if grad is None else grad for grad, part in pairs)

        return {"gradient": gradient, "pull": pull}[kind]

    def _masks(self, weights: Params, batch: Batch, seed: int) -> list[Tensor]:
        """What dropout multiplies by in one pass, in order."""
        key = tuple(part if part is None else (part.shape, part.dtype) for part in batch)
        if key not in self._dropped:
            with torch.no_grad(), _Counted() as counted:
                self.loss(weights, *batch)
            self._dropped[key] = counted.places
        if not (places := self._dropped[key]):
            return []
        device = next(iter(weights.values())).device
        with seeded(seed, device):
            return [
                torch.empty(shape, device=device, dtype=dtype).bernoulli_(1 - p).div_(1 - p)
                for shape, dtype, p in places
            ]


class _Counted(TorchFunctionMode):
    """Within the block dropout does nothing but note the shape of its input, and its probability."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[tuple[torch.Size, torch.dtype, float]] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.dropout:
            return func(*args, **kwargs)
        return self.dropped(*args, **kwargs)

    def dropped(self, values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if training and p:
            self.places.append((values.shape, values.dtype, p))
        return values


class _Given(_Counted):
    """Within the block dropout multiplies by these masks, one after another."""

    def __init__(self, masks: Sequence[Tensor]) -> None:
        super().__init__()
        self.masks = list(masks)

    def dropped(self, values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return values * self.masks.pop(0) if training and p else values


def _compiled(function: Function, inputs: Sequence[Tensor]) -> Function:
    """The function for inputs of these shapes; RuntimeError where it is none of its inputs alone."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts of torch that it loads for the first time
        traced = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        traced.graph.eliminate_dead_code()
        traced.recompile()
        _check(traced)
        # A CUDA graph's outputs lie where its next replay writes: see `_kept`.
        mode = "reduce-overhead" if inputs[0].is_cuda else "default"
        return torch.compile(traced, fullgraph=True, dynamic=False, mode=mode)


def _check(traced: torch.fx.GraphModule) -> None:
    """RuntimeError where a pass draws by chance, or changes what is not its own."""
    for node in traced.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise RuntimeError(f"the network draws by chance ({node.target})")
        for given, argument in zip(node.args, node.target._schema.arguments, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and getattr(given, "op", "") in ("get_attr", "placeholder"):
                raise RuntimeError(f"the network counts what it sees ({node.target})")


def _kept(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs of a CUDA graph, copied from where the next replay writes."""
    return tuple(part.clone() if part.is_cuda else part for part in outputs)


def _near(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding, which is that of bfloat16 where networks run in it."""
    return bool((one - other).norm() <= 0.05 * other.norm() + 1e-12)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
