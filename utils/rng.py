"""Chance by name: every random choice comes from a generator that a seed and a name determine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the purpose that `names` spell; equal on every machine and in every process."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for the purpose that `names` spell."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


def draw_seed(rng: torch.Generator) -> int:
    """One fresh seed out of a generator."""
    return int(torch.randint(2**62, (), generator=rng))


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within the block, torch's global chance (dropout, initial weights) follows `seed`; afterwards it is as before."""
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also note each seed, with a stack trace, for devices that nobody has touched yet: it
        # takes longer than a small network's step, and is never forgotten.
        torch.default_generator.manual_seed(seed)
        for place in devices:
            with torch.cuda.device(place):
                torch.cuda.manual_seed(seed)
        if device.type == "mps":
            torch.mps.manual_seed(seed)
        yield
