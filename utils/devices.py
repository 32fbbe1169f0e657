"""From one device to another."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` on the device, without waiting for what it is still computing.

    A plain `.to` of ordinary memory makes the host wait until a CUDA GPU has done everything before it; a copy out of
    pinned memory takes its turn among the GPU's work.
    """
    device = torch.device(device)
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=device.type != "mps")  # which would read memory that is gone by then
