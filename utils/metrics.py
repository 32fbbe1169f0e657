"""Tensors to numbers: retrieval recall in both directions, mean ± std, and DD-Ranking's scores of accuracies."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from utils.errors import RunError, UserError

# The columns of the retrieval tables, in their published order.
RETRIEVAL = ("ir@1", "ir@5", "ir@10", "tr@1", "tr@5", "tr@10", "r_mean")


def recall_at_k(
    scores: Tensor, positive: Tensor, ks: Sequence[int] = (1, 5, 10), ties: str = "against"
) -> dict[int, float]:
    """Percentage of queries with a positive among their k best candidates.

    scores    (Q, C) float, higher is closer; RunError when one is nan
    positive  (Q, C) bool, at least one True a row, else ValueError
    ties      "against": negatives that score as high as the best positive come before it, so a collapsed encoder
              scores nothing rather than by luck; "for": they come after it

    A k beyond C counts as C. Source: image–text retrieval as in VLDD (Wu et al., TMLR 2024).
    """
    if ties not in ("against", "for"):
        raise ValueError(f"ties are 'against' or 'for' the query, not {ties!r}")
    if scores.ndim != 2 or scores.shape != positive.shape or not len(scores):
        raise ValueError(f"scores {tuple(scores.shape)} and positive {tuple(positive.shape)} must be one (Q, C), Q > 0")
    if not positive.any(dim=1).all():
        raise ValueError("each query needs at least one positive candidate")
    if scores.isnan().any():
        raise RunError("retrieval scores hold nan: the embeddings are not finite")
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
    ahead = scores >= best if ties == "against" else scores > best
    return _recall((ahead & ~positive).sum(dim=1), ks)


@torch.no_grad()
def retrieval_recall(
    images: Tensor, texts: Tensor, image_of: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall of texts by images (`tr@k`) and of images by texts (`ir@k`) in percent, their means, and `r_mean`.

    images    (I, E) float, on any device; scores are the products with `texts`, so normalise both for cosines
    texts     (C, E) float, on the same device
    image_of  (C,) long, the image that each text describes; UserError when an image has no text

    tr@k counts an image as found when any of its texts ranks below k; r_mean is the mean of ir_mean and tr_mean.
    Ties count against the query, as in `recall_at_k`. RunError when embeddings are not finite. Besides the (I, C)
    scores in float32 it needs a few MB.
    """
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or image_of.shape != texts.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (images, texts, image_of))
        raise ValueError(f"images, texts, image_of have shapes {shapes}; expected (I, E), (C, E), (C,)")
    _check_owners(image_of, len(images))
    images, texts, image_of = images.float(), texts.float(), image_of.to(images.device)
    # |⟨u, v⟩| ≤ |u||v| bounds each score and each of its partial sums: this sees nan, inf and overflow at once.
    if not torch.isfinite(images.norm(dim=1).max() * texts.norm(dim=1).max()):
        raise RunError("retrieval cannot be scored: the embeddings are not finite")

    scores = images @ texts.T
    # The positives' scores are read out of the matrix: a second dot product may differ in its last bits and then
    # break, or fake, a tie.
    own = scores[image_of, torch.arange(len(texts), device=scores.device)]  # (C,)
    best = own.new_full((len(images),), -torch.inf).scatter_reduce(0, image_of, own, "amax")  # (I,)
    of_text, of_image = _count_reaching(scores, own, best)
    # What reaches the best positive includes positives: the text's one image, and the image's texts that equal it.
    positives = torch.zeros_like(of_image).index_add(0, image_of, (own >= best[image_of]).to(of_image.dtype))
    ir, tr = _recall(of_text - 1, ks), _recall(of_image - positives, ks)

    result = {f"ir@{k}": ir[k] for k in ks} | {f"tr@{k}": tr[k] for k in ks}
    result["ir_mean"], result["tr_mean"] = statistics.fmean(ir.values()), statistics.fmean(tr.values())
    result["r_mean"] = (result["ir_mean"] + result["tr_mean"]) / 2
    return result


def mean_std(values: Iterable[float]) -> tuple[float, float]:
    """Mean and population standard deviation (ddof 0, as in the published tables); ValueError for no values."""
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("no values to average")
    mean = sum(numbers) / len(numbers)
    return mean, (sum((number - mean) ** 2 for number in numbers) / len(numbers)) ** 0.5


def format_mean_std(mean: float, std: float, digits: int = 1) -> str:
    """`9.9 ± 0.3`; what rounds to nothing has no sign."""
    return f"{round(mean, digits) + 0.0:.{digits}f} ± {std:.{digits}f}"


def format_bytes(count: float) -> str:
    """`60.5 MB`; a MB is 10⁶ bytes."""
    if count < 1000:
        return f"{count:.0f} B"
    power = min(3, int(math.log(count / 0.99995, 1000)))  # 999.96 kB would be written 1000.0 kB
    return f"{count / 1000**power:.1f} {' kMG'[power]}B"


def _check_owners(image_of: Tensor, images: int) -> None:
    if images and len(image_of) and not 0 <= int(image_of.min()) <= int(image_of.max()) < images:
        raise ValueError(f"image_of names image {int(image_of.min())} to {int(image_of.max())} of {images}")
    bare = (torch.bincount(image_of, minlength=images) == 0).nonzero().flatten().tolist()
    if bare or not images:
        example = f", e.g. image {bare[0]}" if bare else ""
        raise UserError(f"{len(bare)} of {images} images have no caption{example}; retrieval needs one for each")


def _count_reaching(scores: Tensor, by_column: Tensor, by_row: Tensor) -> tuple[Tensor, Tensor]:
    """How many entries of each column reach `by_column` (C,), and of each row `by_row` (I,), as float counts."""
    # Comparing into a float buffer that stays in cache is six times faster than summing bools; float32 counts
    # exactly up to 2**24 candidates.
    columns = torch.zeros_like(by_column)
    rows = torch.empty_like(by_row)
    height = max(1, 2**20 // scores.shape[1])
    buffer = scores.new_empty(min(height, len(scores)), scores.shape[1])
    for first in range(0, len(scores), height):
        here = slice(first, first + height)
        block = scores[here]
        reach = buffer[: len(block)]
        columns += torch.ge(block, by_column, out=reach).sum(dim=0)
        rows[here] = torch.ge(block, by_row[here, None], out=reach).sum(dim=1)
    return columns, rows


def _recall(ranks: Tensor, ks: Sequence[int]) -> dict[int, float]:
    return {k: 100.0 * int((ranks < k).sum()) / len(ranks) for k in ks}


def improvement(
    real_hard: float, syn_hard: float, syn_own: float, random_own: float, weight: float = 0.5
) -> dict[str, float]:
    """DD-Ranking's scores of a distilled set: HLR and IOR in percentage points, LRS from 0 to 1.

    All four are accuracies in %: of all real images and of the set with hard labels, then of the set and of as many
    random images under the set's own recipe.

    HLR   what is lost to the real images under hard labels
    IOR   what is won over random images under the set's own recipe
    LRS   both as one: `weight` · IOR − (1 − weight) · HLR, in fractions, mapped from −1 … 1 to 0 … 1

    Source: DD-Ranking (arXiv 2505.13300). Its program puts percentages where the formula takes fractions; here they are
    fractions.
    """
    hlr, ior = real_hard - syn_hard, syn_own - random_own
    return {"hlr": hlr, "ior": ior, "lrs": _unit_score((weight * ior - (1 - weight) * hlr) / 100)}


def augmentation_robustness(
    syn_augmented: float, random_augmented: float, syn_bare: float, random_bare: float, weight: float = 0.5
) -> float:
    """DD-Ranking's ARS, from 0 to 1: what is won over random images, with augmentation and without; accuracies in %."""
    won = weight * (syn_augmented - random_augmented) + (1 - weight) * (syn_bare - random_bare)
    return _unit_score(won / 100)


def _unit_score(advantage: float) -> float:
    """−1 … 1 mapped to 0 … 1 by the exponential function."""
    return (math.exp(advantage) - math.exp(-1)) / (math.e - math.exp(-1))
