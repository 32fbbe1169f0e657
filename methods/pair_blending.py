"""The mixing of features in front of the heads: `--blend` of VLDD, after RepBlend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from methods.core.inner import Draw
from utils.devices import moved
from utils.rng import derive_seed


@dataclass(frozen=True)
class Blending:
    """Each row mixed with another: shares (2,) of its own and of that at its place in order (B,)."""

    shares: Tensor
    order: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return self.shares[0] * rows + self.shares[1] * rows[self.order]


def blending(draw: Draw, spread: float) -> Blending | None:
    """What mixes the rows of a batch as RepBlend does (Zhang et al., NeurIPS 2025, arXiv 2505.14705): λ x + (1 − λ) x',
    x' another row and λ ~ Beta(spread, spread), one λ and one order for images and texts; None where spread is 0.

    Mixed features weaken what the contrastive loss makes of single pairs; the similarity is left as it is.
    """
    if not spread:
        return None
    rng = np.random.default_rng(derive_seed(draw.seed, "blend"))
    weight, order = rng.beta(spread, spread), torch.from_numpy(rng.permutation(len(draw.indices)))
    device = draw.indices.device
    return Blending(moved(torch.tensor([weight, 1 - weight]), device), moved(order, device))
