"""A pass that must not make the host wait for the device."""

import contextlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten
# What ends on the host, or has a result whose size the values decide.
ASKS = {
    ATEN._local_scalar_dense,
    ATEN.is_nonzero,
    ATEN.equal,
    ATEN.nonzero,
    ATEN.masked_select,
    ATEN._unique2,
    ATEN.unique_dim,
    ATEN.unique_consecutive,
    ATEN.bincount,
}
COPIES = {ATEN._to_copy, ATEN.copy_, ATEN._copy_from, ATEN._copy_from_and_resize}


class Waiting(AssertionError):
    """What a GPU would have been waited for."""


class NoWaiting(TorchDispatchMode):
    """Raises where a tensor of the `device` is asked for its value, and where a copy to or from it blocks."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self.device = torch.device(device).type

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, tensors = kwargs or {}, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here = [tensor.device.type == self.device for tensor in tensors]
        packet = func.overloadpacket
        if packet in ASKS and any(here):
            raise Waiting(f"{func} asks the device for a value")
        if packet is ATEN.index and any(here) and any(tensor.dtype == torch.bool for tensor in tensors[1:]):
            raise Waiting(f"{func} by a mask: the device decides how much it is")
        if packet in COPIES:
            target = kwargs.get("device") or tensors[0].device
            crosses = {torch.device(target).type, tensors[-1].device.type}
            if len(crosses) == 2 and self.device in crosses and not (kwargs.get("non_blocking") or True in args[2:]):
                raise Waiting(f"{func} is a copy that waits for the device")
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_waiting(device: torch.device | str = "meta") -> Iterator[None]:
    """`meta` stands in for a GPU, as in test_devices.py; on a CUDA GPU PyTorch itself tells."""
    if torch.device(device).type != "cuda":
        with NoWaiting(device):
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
