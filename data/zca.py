"""ZCA whitening: images whose pixels are decorrelated but which still look like images, and the way back.

With μ the mean image and Σ = U diag(S) Uᵀ the covariance of pixels, T = U diag((S + ε)^−½) Uᵀ; an image x, flattened to
D = C·H·W values in [0, 1], becomes z = (x − μ) T, with ε = 0.1. This is the kind of MTT and its successors.

The kind of RaT-BPTT and PoDD first gives each image a mean of 0 and a length of 1, by its own mean and length, and has
no mean image: Σ is the mean of x xᵀ, whose trace is 1, and ε a tenth of its mean eigenvalue, 0.1 / D.

The transformation belongs to what is learned in its space, so it is saved with buffers and results and named by a
digest: another fit, even of the same images, is another space, and so is the other kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import digest, load_vectors, save_vectors
from utils.progress import progress

KINDS = ("mtt", "podd")
ANEW = "delete it, to be made anew"  # what to do about a damaged one, where the command fits it
EPS = 0.1  # as published; large beside most eigenvalues, so that noise is not blown up; podd: of their mean
FLAT = 1e-5  # of a length: what rounding leaves of an image of one tone; one pixel one tone off leaves 3e-5 or more
SPREAD = 3.0  # deviations either side of its middle that a picture shows
_ROWS = 2048  # images turned to float64 at once
_LONG = 10_000_000  # values that take seconds, and a progress bar


class ZCA:
    """A whitening transformation.

    mean     (D,)
    matrix   (D, D), T; symmetric
    inverse  (D, D), T⁻¹; worked out of T when it is first needed and not given
    unit     whether images are first centred and scaled to length 1, each by itself (podd); the mean is zeros then
    """

    def __init__(self, mean: Tensor, matrix: Tensor, inverse: Tensor | None = None, unit: bool = False) -> None:
        if mean.ndim != 1 or matrix.shape != 2 * mean.shape:
            raise ValueError(f"a mean {tuple(mean.shape)} and a matrix {tuple(matrix.shape)} do not fit")
        self.mean, self.matrix, self.unit = mean, matrix, unit
        if inverse is not None:
            self.inverse = inverse

    @cached_property
    def inverse(self) -> Tensor:
        # T's eigenvalues span less than three orders of magnitude: in float64 nothing is lost.
        return torch.linalg.inv(_exactly(self.matrix)).to(self.matrix)

    @property
    def kind(self) -> str:
        """Which of KINDS this is."""
        return "podd" if self.unit else "mtt"

    def whiten(self, images: Tensor) -> Tensor:
        """Images (..., C, H, W) in [0, 1], whitened; of the unit kind in any range, and zeros where all is one tone."""
        flat = images.flatten(-3)
        flat = _unit(flat) if self.unit else flat - self.mean.to(flat)
        return (flat @ self.matrix.to(flat)).view(images.shape)

    def unwhiten(self, images: Tensor) -> Tensor:
        """Whitened images (..., C, H, W) back in [0, 1], or near it where they were changed.

        Of the unit kind, the inverse alone: an image of mean 0 and length 1, as its own are not known.
        """
        flat = images.flatten(-3)
        return (flat @ self.inverse.to(flat) + self.mean.to(flat)).view(images.shape)

    def visible(self, images: Tensor) -> Tensor:
        """Whitened images (..., C, H, W) to look at, in [0, 1] or near it: unwhitened, and of the unit kind each drawn
        SPREAD of its own deviations either side of its own mean."""
        plain = self.unwhiten(images)
        if not self.unit:
            return plain
        flat = plain.flatten(-3)
        deviation, mean = torch.std_mean(flat, -1, correction=0, keepdim=True)
        return ((flat - mean) / (2 * SPREAD * deviation.clamp_min(1e-12)) + 0.5).view(images.shape)

    def to(self, device: torch.device | str) -> ZCA:
        """The same transformation on another device."""
        if self.matrix.device == torch.device(device):
            return self
        inverse = self.__dict__.get("inverse")
        inverse = None if inverse is None else inverse.to(device)
        return ZCA(self.mean.to(device), self.matrix.to(device), inverse, self.unit)

    @cached_property
    def digest(self) -> str:
        """A name for this very transformation: 64 hex digits that follow from its kind, mean and matrix."""
        return digest(self.mean, self.matrix, *(["unit"] if self.unit else []))

    def state(self) -> dict[str, Tensor]:
        """What `from_state` needs, tensors on the CPU; the inverse is left out, to halve the file."""
        unit = {"unit": torch.tensor(True)} if self.unit else {}
        return {"mean": self.mean.cpu(), "matrix": self.matrix.cpu(), **unit}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ZCA:
        """The transformation that `state()` described; UserError when it is not one."""
        try:
            return cls(state["mean"], state["matrix"], unit=bool(state.get("unit", False)))
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the recorded whitening is not a mean and a matrix ({error}); make the file anew"
            ) from None

    def save(self, path: Path | str) -> None:
        """Write `path`, a `.safetensors` file, whole or not at all."""
        save_vectors(path, {name: tensor.contiguous() for name, tensor in self.state().items()})

    @classmethod
    def load(cls, path: Path | str, remedy: str = ANEW) -> ZCA:
        """The transformation in a file of `save`; UserError, that ends with `remedy`, when it is missing or damaged."""
        return cls.from_state(load_vectors(path, "whitening", remedy))


def _exactly(values: Tensor) -> Tensor:
    """In float64, on the CPU where a device (mps) has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _unit(rows: Tensor) -> Tensor:
    """Rows (..., D) of mean 0 and length 1; zeros for a row of equal values, which has no direction."""
    centred = rows - rows.mean(-1, keepdim=True)
    length = centred.norm(dim=-1, keepdim=True)
    flat = length <= FLAT * rows.norm(dim=-1, keepdim=True)
    return (centred / length.masked_fill(flat, 1)).masked_fill(flat, 0)


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
    covariance = _products(rows, lambda part: part / unit - mean).div_(max(count - 1, 1))
    return _transformation(mean, covariance, eps, images.dtype)


def fit_unit_zca(images: Tensor, eps: float = EPS) -> ZCA:
    """The whitening of PoDD's kind of `images` (N, C, H, W), of any range or uint8, in float64 on their device.

    eps  as a share of the mean eigenvalue, 1 / D (that of images none of which is of one tone)
    """
    rows = images.flatten(1)
    count, width = rows.shape
    moment = _products(rows, _unit).div_(count)
    return _transformation(rows.new_zeros(width, dtype=torch.float64), moment, eps / width, images.dtype, unit=True)


def _products(rows: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum (D, D) of x xᵀ over `rows` (N, D), each `prepare`d, in float64."""
    count, width = rows.shape
    total = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
    for part in progress(rows.split(_ROWS), "whitening", leave=False, disable=count * width < _LONG):
        prepared = prepare(part.double())
        total.addmm_(prepared.T, prepared)
    return total


def _transformation(mean: Tensor, moment: Tensor, eps: float, kind: torch.dtype, unit: bool = False) -> ZCA:
    """The whitening of images with this mean (D,) and second moment (D, D) about it; float64 where `kind` is."""
    values, vectors = torch.linalg.eigh(moment)
    root = (values.clamp(min=0) + eps).sqrt()  # rounding may make the least ones negative
    kind = torch.float64 if kind == torch.float64 else torch.float32
    matrix, inverse = (((vectors * scale) @ vectors.T).to(kind) for scale in (1 / root, root))
    return ZCA(mean.to(kind), matrix, inverse, unit)
