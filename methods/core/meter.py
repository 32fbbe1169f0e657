"""What a piece of work takes: arithmetic, and the most memory at once."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, shape_wrapper


def _convolution_backward(
    gradient: Any, inputs: Any, weights: Any, *rest: Any, out_shape: Any = None, **options: Any
) -> int:
    """torch's own formula takes a convolution in groups for a full one; each gradient costs what the forward does."""
    transposed, mask = rest[4], rest[-1]
    spatial = (inputs if transposed else gradient)[2:]
    return 2 * inputs[0] * math.prod(spatial) * math.prod(weights) * (mask[0] + mask[1])


_FORMULAS = flop_registry | {torch.ops.aten.convolution_backward: shape_wrapper(_convolution_backward)}


class Meter(TorchDispatchMode):
    """Counts what happens within the block: `flops` of matrix products and convolutions; `live` bytes of the tensors
    that were made there and are still held, and their `peak`. Views, and what was there before, are free."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_iter((args, kwargs)):
            self._meet(value, count=False)
        result = func(*args, **kwargs)
        for value in tree_iter(result):
            self._meet(value, count=True)
        if count := _FORMULAS.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        return result

    def _meet(self, value: Any, count: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if count else 0
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def flops(work: Callable[[], object]) -> int:
    """Multiplications and additions of `work`, as torch counts them."""
    with Meter() as meter:
        work()
    return meter.flops


def memory(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes that the result of `work` holds, graph and all, and the most that was held on the way.

    On a CPU every tensor is counted as it comes and goes; on a GPU the allocator is asked.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        held, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        del result
        return held - before, peak - before
    with Meter() as meter:
        result = work()
        held = meter.live
        del result
    return held, meter.peak
