"""ZCA whitening: images whose pixels are decorrelated but which still look like images, and the way back.

With μ the mean image and Σ = U diag(S) Uᵀ the covariance of pixels, T = U diag((S + ε)^−½) Uᵀ; an image x, flattened to
D = C·H·W values in [0, 1], becomes z = (x − μ) T. The transformation belongs to what is learned in its space, so it is
saved with buffers and results and named by a digest: another fit, even of the same images, is another space.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import digest, save_vectors
from utils.progress import progress

EPS = 0.1  # as published; large beside most eigenvalues, so that noise is not blown up
_ROWS = 2048  # images turned to float64 at once
_LONG = 10_000_000  # values that take seconds, and a progress bar


class ZCA:
    """A whitening transformation.

    mean     (D,)
    matrix   (D, D), T; symmetric
    inverse  (D, D), T⁻¹; worked out of T when it is first needed and not given
    """

    def __init__(self, mean: Tensor, matrix: Tensor, inverse: Tensor | None = None) -> None:
        if mean.ndim != 1 or matrix.shape != 2 * mean.shape:
            raise ValueError(f"a mean {tuple(mean.shape)} and a matrix {tuple(matrix.shape)} do not fit")
        self.mean, self.matrix = mean, matrix
        if inverse is not None:
            self.inverse = inverse

    @cached_property
    def inverse(self) -> Tensor:
        # T's eigenvalues span less than three orders of magnitude: in float64 nothing is lost.
        return torch.linalg.inv(_exactly(self.matrix)).to(self.matrix)

    def whiten(self, images: Tensor) -> Tensor:
        """Images (..., C, H, W) in [0, 1], whitened."""
        flat = images.flatten(-3)
        return ((flat - self.mean.to(flat)) @ self.matrix.to(flat)).view(images.shape)

    def unwhiten(self, images: Tensor) -> Tensor:
        """Whitened images (..., C, H, W) back in [0, 1], or near it where they were changed."""
        flat = images.flatten(-3)
        return (flat @ self.inverse.to(flat) + self.mean.to(flat)).view(images.shape)

    def to(self, device: torch.device | str) -> ZCA:
        """The same transformation on another device."""
        if self.matrix.device == torch.device(device):
            return self
        inverse = self.__dict__.get("inverse")
        return ZCA(self.mean.to(device), self.matrix.to(device), None if inverse is None else inverse.to(device))

    @cached_property
    def digest(self) -> str:
        """A name for this very transformation: 64 hex digits that follow from mean and matrix."""
        return digest(self.mean, self.matrix)

    def state(self) -> dict[str, Tensor]:
        """What `from_state` needs, tensors on the CPU; the inverse is left out, to halve the file."""
        return {"mean": self.mean.cpu(), "matrix": self.matrix.cpu()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ZCA:
        """The transformation that `state()` described; UserError when it is not one."""
        try:
            return cls(state["mean"], state["matrix"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"the recorded whitening is not a mean and a matrix ({error}); make the file anew"
            ) from None

    def save(self, path: Path | str) -> None:
        """Write `path`, a `.safetensors` file, whole or not at all."""
        save_vectors(path, {name: tensor.contiguous() for name, tensor in self.state().items()})

    @classmethod
    def load(cls, path: Path | str) -> ZCA:
        """The transformation in a file of `save`; UserError when it is missing or damaged."""
        from safetensors.torch import load_file

        if not Path(path).is_file():
            raise UserError(f"no whitening at {path}")
        try:
            state = load_file(path)
        except Exception as error:  # safetensors has an exception of its own, and passes others on
            raise UserError(f"whitening {path} cannot be read ({error}); delete it, to be made anew") from None
        return cls.from_state(state)


def _exactly(values: Tensor) -> Tensor:
    """In float64, on the CPU where a device (mps) has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def fit_zca(images: Tensor, eps: float = EPS) -> ZCA:
    """The whitening of `images` (N, C, H, W), floats in [0, 1] or uint8, worked out in float64 on their device.

    The covariance is unbiased (n − 1). float64 images give a float64 transformation, others a float32 one.
    """
    rows = images.flatten(1)
    count, width = rows.shape
    unit = 255 if images.dtype == torch.uint8 else 1
    mean = torch.zeros(width, dtype=torch.float64, device=images.device)
    for part in rows.split(_ROWS):
        mean += part.double().sum(0)
    mean /= unit * count
    covariance = torch.zeros(width, width, dtype=torch.float64, device=images.device)
    for part in progress(rows.split(_ROWS), "whitening", leave=False, disable=count * width < _LONG):
        centred = part.double() / unit - mean
        covariance.addmm_(centred.T, centred)
    values, vectors = torch.linalg.eigh(covariance.div_(max(count - 1, 1)))
    root = (values.clamp(min=0) + eps).sqrt()  # rounding may make the least ones negative
    kind = torch.float64 if images.dtype == torch.float64 else torch.float32
    matrix, inverse = (((vectors * scale) @ vectors.T).to(kind) for scale in (1 / root, root))
    return ZCA(mean.to(kind), matrix, inverse)
