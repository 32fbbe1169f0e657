"""What a classifier's scores are worth: the metrics of the ELEVATER benchmark, in percent.

Scores are (N, K), an image a row, higher for a likelier class; they may be logits, cosines or probabilities.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from utils.errors import RunError, UserError

MULTI = "11point_mAP"  # the one metric of images that may have several labels, or none


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Percentage of images whose class, `labels` (N,) long, scores highest; of equal scores the first class counts."""
    return 100 * int((scores.argmax(dim=1) == labels).sum()) / len(labels)


def mean_per_class(scores: Tensor, labels: Tensor) -> float:
    """The accuracy of each class by itself, averaged over those that have images: balanced accuracy."""
    right = (scores.argmax(dim=1) == labels).double()
    counts = torch.bincount(labels, minlength=scores.shape[1])
    hits = torch.bincount(labels, right, minlength=scores.shape[1])
    return 100 * float((hits / counts)[counts > 0].mean())


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Percentage of pairs, one image of class 1 and one of class 0, that (N,) scores of class 1 put in order.

    UserError where a class has no image. A pair that ties counts half.
    """
    from sklearn.metrics import roc_auc_score

    if len(labels.unique()) != 2:
        raise UserError("roc_auc compares images of two classes; the test images have one only")
    return 100 * float(roc_auc_score(labels.numpy(), scores.double().numpy()))


def eleven_point_map(scores: Tensor, positive: Tensor, compat: bool = False) -> float:
    """PASCAL VOC's average precision of 2007, averaged over the classes that have a positive image.

    positive  (N, K) bool
    compat    as ELEVATER's program has it: scikit-learn's end point (recall 0, precision 1) takes part, so the first
              of the eleven is always 1

    Of each class: the best precision at a recall of at least 0, 0.1, ... 1, averaged. UserError for no positive at all.
    """
    found = [
        _eleven_points(scores[:, k], positive[:, k], compat) for k in range(scores.shape[1]) if positive[:, k].any()
    ]
    if not found:
        raise UserError(f"{MULTI} needs positive images; no test image has a label")
    return 100 * sum(found) / len(found)


def _eleven_points(scores: Tensor, positive: Tensor, compat: bool) -> float:
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(positive.numpy(), scores.double().numpy())
    if not compat:
        precision, recall = precision[:-1], recall[:-1]
    return sum(float(precision[recall >= tenth / 10].max()) for tenth in range(11)) / 11


def classification_score(metric: str, scores: Tensor, labels: Tensor, compat: bool = False) -> float:
    """The metric of that name, in percent; UserError for a name that nobody knows.

    scores  (N, K) logits, such as 100 · cosine; RunError when one is not finite
    labels  (N,) long, or (N, K) bool for 11point_mAP
    compat  ELEVATER's 11point_mAP: its end point, and scores that compete in a softmax over the classes first, which
            changes the order of images; otherwise each class ranks by its own scores
    """
    scores, labels = scores.cpu(), labels.cpu()
    if not torch.isfinite(scores).all():
        raise RunError(f"{metric} cannot be scored: the classes' scores are not finite")
    if metric == MULTI:
        return eleven_point_map(scores.double().softmax(dim=1) if compat else scores, labels, compat)
    if metric not in METRICS:
        raise UserError(f"unknown metric '{metric}'; known: {', '.join((*METRICS, MULTI))}")
    return METRICS[metric](scores, labels)


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "mean-per-class": mean_per_class,
    # The softmax of two classes ranks as their difference does, which never rounds to a tie at 1.
    "roc_auc": lambda scores, labels: roc_auc(scores[:, 1] - scores[:, 0], labels),
}
