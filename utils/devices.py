"""From one device to another, and to the same bits on any day."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from utils.errors import UserError


def moved(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` on the device, without waiting for what it is still computing.

    A plain `.to` of ordinary memory makes the host wait until a CUDA GPU has done everything before it; a copy out of
    pinned memory takes its turn among the GPU's work.
    """
    device = torch.device(device)
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=device.type != "mps")  # which would read memory that is gone by then


@contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """Within the block, if `on`, whatever PyTorch computes twice on one device is the same to the bit, or UserError
    names the operation that has no such way. To be entered before CUDA starts."""
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once; sums in one order need it
    cudnn, was = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    before = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error).split(". ")[0].lower():
            raise
        what = str(error).split(" does not have")[0] if " does not have" in str(error) else "an operation of CUDA"
        raise UserError(
            f"{what} may give other bits each time; leave out --deterministic, or give --device cpu"
        ) from error
    finally:
        torch.use_deterministic_algorithms(was)
        cudnn.deterministic, cudnn.benchmark = before
