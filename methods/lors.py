"""Which image belongs to which text, learned: LoRS (Xu et al., ICML 2024, arXiv 2406.03793), an option of VLDD.

VLDD pairs image i with text i and with no other: its similarity matrix S is the identity. LoRS learns S beside the
pairs, as ω on the diagonal and a low-rank rest:

    S = diag(ω) + (α / r) L Rᵀ        ω = 1, L ~ N(0, 1), R = 0 at the start, so that S = I

`full` learns all N² entries. The losses accept any real S and equal the usual ones where S = I. The released code's
`WBCE` splits positives from negatives at S > 0.5, with no gradient through that split. As released nothing clamps or
normalises S, and most losses have no floor where it leaves [0, 1]; `--clamp_similarity` keeps it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.core.retrieval import LossFn
from utils.config import option
from utils.errors import UserError

EPS = 1e-6  # as released: inside the logarithms and beside the counts
KINDS = ("identity", "full", "lowrank")
BOUNDED = ("BCE",)  # losses of probabilities: outside [0, 1] a target means nothing to them


class Similarity:
    """The ground truth S between N images and N texts.

    kind    identity (nothing learned), full (N, N), lowrank: diag (N,), left and right (N, rank)
    clamp   whether all entries stay in [0, 1]
    """

    def __init__(
        self,
        kind: str,
        count: int,
        rank: int,
        alpha: float,
        rng: torch.Generator,
        device: Any,
        clamp: bool = False,
    ) -> None:
        if kind == "lowrank" and rank > count:
            raise UserError(f"sim_rank is {rank} for {count} pairs; it can be {count} at most")
        self.kind, self.count, self.scale, self.clamp = kind, count, alpha / rank, clamp
        start = {
            "identity": list,
            "full": lambda: [torch.eye(count)],
            "lowrank": lambda: [
                torch.ones(count),
                torch.randn(count, rank, generator=rng),
                torch.zeros(count, rank),
            ],
        }[kind]()
        self.leaves: list[Tensor] = [tensor.to(device).requires_grad_() for tensor in start]

    def matrix(self, indices: Tensor) -> Tensor | None:
        """S between the chosen pairs (B, B), differentiable; None stands for the identity."""
        if self.kind == "identity":
            return None
        if self.kind == "full":
            return self.leaves[0][indices][:, indices]  # what clamps it is `project`
        diag, left, right = (leaf[indices] for leaf in self.leaves)
        matrix = torch.diag(diag) + self.scale * left @ right.T
        if not self.clamp:
            return matrix
        # Entries on a bound go on learning, and at the start all are: some versions of torch's clamp would stop them.
        return torch.where((matrix < 0) | (matrix > 1), matrix.detach().clamp(0, 1), matrix)

    def project(self) -> None:
        """Put the entries of a full matrix back into [0, 1], where that is asked for; without a graph."""
        if self.clamp and self.kind == "full":
            self.leaves[0].clamp_(0, 1)

    def bounds(self) -> dict[str, Tensor]:
        """Least and greatest entry, to log: an unclamped S may run away unseen."""
        if self.kind == "identity":
            return {}
        with torch.no_grad():
            low, high = self.matrix(self._everything()).aminmax()
        return {"sim_min": low, "sim_max": high}

    def _everything(self) -> Tensor:
        return torch.arange(self.count, device=self.leaves[0].device)

    def saved(self) -> tuple[list[Tensor], Tensor]:
        """`similarity_params` and `similarity_mat` as LoRS saves them; the identity is saved as a full matrix."""
        if self.kind == "identity":
            eye = torch.eye(self.count)
            return [eye], eye
        return [leaf.detach().cpu().clone() for leaf in self.leaves], self.matrix(self._everything()).detach().cpu()


def contrastive_loss(logits: Tensor, similarity: Tensor | None = None, kind: str = "InfoNCE") -> Tensor:
    """The scalar loss of B images against B texts.

    logits      (B, B), images are rows, already multiplied by the logit scale
    similarity  (B, B) real; None is the identity
    kind        a name in `LOSSES`
    """
    if similarity is None:
        if kind in ("InfoNCE", "NCE"):
            own = torch.arange(len(logits), device=logits.device)
            return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        similarity = torch.eye(len(logits), device=logits.device, dtype=logits.dtype)
    return LOSSES[kind](logits, similarity)


def _expanded_nce(logits: Tensor, similarity: Tensor) -> Tensor:
    """eNCE: cross-entropy against the rows of S, which need not sum to one, in both directions."""
    to_text = -(similarity * logits.log_softmax(1)).sum(1).mean()
    to_image = -(similarity * logits.log_softmax(0)).sum(0).mean()
    return (to_text + to_image) / 2


def _cells(logits: Tensor, similarity: Tensor) -> Tensor:
    """Binary cross-entropy of each cell (B, B), for targets of any size: the library's refuses those outside [0, 1]."""
    p = logits.sigmoid()
    return -similarity * (p + EPS).log() - (1 - similarity) * (1 - p + EPS).log()


def _bce(logits: Tensor, similarity: Tensor) -> Tensor:
    return (F.softplus(logits) - similarity * logits).mean()


def _weighted_bce(logits: Tensor, similarity: Tensor) -> Tensor:
    """wBCE: the mean over the positive cells and that over the negative ones count the same."""
    cells, positive = _cells(logits, similarity), similarity.detach() > 0.5
    return sum((cells * part).sum() / (part.sum() + EPS) for part in (positive, ~positive)) / 2


def _weighted_nce(logits: Tensor, similarity: Tensor) -> Tensor:
    """CWCL: eNCE with each row of S divided by its sum, in both directions."""
    to_text = -(similarity / (similarity.sum(1, keepdim=True) + EPS) * logits.log_softmax(1)).sum(1).mean()
    to_image = -(similarity / (similarity.sum(0, keepdim=True) + EPS) * logits.log_softmax(0)).sum(0).mean()
    return (to_text + to_image) / 2


def _kl(logits: Tensor, similarity: Tensor) -> Tensor:
    """Mean-reduced KL to softmax(10 S), in both directions."""
    both = [(logits.log_softmax(axis), (10 * similarity).log_softmax(axis)) for axis in (0, 1)]
    # The library's own reduction "mean" is about to change its meaning.
    return sum(F.kl_div(ours, target, reduction="none", log_target=True).mean() for ours, target in both) / 2


def _mse(logits: Tensor, similarity: Tensor) -> Tensor:
    return (logits.sigmoid() - similarity).square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "InfoNCE": _expanded_nce,
    "NCE": _expanded_nce,
    "BCE": _bce,
    "WBCE": _weighted_bce,
    "BalanceBCE": _weighted_bce,
    "CWCL": _weighted_nce,
    "KL": _kl,
    "MSE": _mse,
}


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss, the same for students and for the networks that judge."""

    loss_type: str = option("InfoNCE", "loss on the learned pairs", choices=tuple(LOSSES))
    temperature: float = option(0.07, "cosines are divided by it, as in CLIP; saved with the pairs", above=0)
    clamp_similarity: bool = option(False, "keep every entry of the similarity in [0, 1]")


def judged_loss(cfg: LossConfig) -> LossFn:
    """The loss of the networks that judge: the true scale 1/temperature, whatever the students had."""
    return lambda u, v, similarity: contrastive_loss(u @ v.T / cfg.temperature, similarity, cfg.loss_type)
