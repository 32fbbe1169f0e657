"""Zero-shot classification: a class is the mean direction of the sentences that name it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import RunError, UserError
from utils.progress import progress

SENTENCES = 256  # that are encoded at once


@torch.no_grad()
def class_vectors(encode: Callable[[list[str]], Tensor], classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """A unit vector of each class, (K, d) float32 on the CPU.

    encode     sentences → (B, d), of any length
    templates  sentences with a `{}` where a class's name goes

    A class's sentences are normalised, averaged, and the mean is normalised: so no sentence counts for more because its
    vector is longer. RunError where a class has no direction.
    """
    if not classes or not templates:
        raise UserError(f"there are {len(classes)} class names and {len(templates)} templates; both need at least one")
    sentences = [template.replace("{}", name) for name in classes for template in templates]
    unique = list(dict.fromkeys(sentences))  # a template without a {} is the same sentence for every class
    starts = range(0, len(unique), SENTENCES)
    bar = progress(starts, "class names", leave=False, disable=len(starts) < 2)
    found = torch.cat([encode(unique[start : start + SENTENCES]).float().cpu() for start in bar])
    place = {sentence: row for row, sentence in enumerate(unique)}
    vectors = F.normalize(found, dim=1)[[place[sentence] for sentence in sentences]]
    means = vectors.view(len(classes), len(templates), -1).mean(dim=1)
    if not torch.isfinite(means).all() or not means.norm(dim=1).all():
        raise RunError("a class's sentences have no direction: the text features are zero or not finite")
    return F.normalize(means, dim=1)


def zero_shot_scores(images: Tensor, classes: Tensor, scale: float = 100.0) -> Tensor:
    """`scale` · cosine of images (N, d) and classes (K, d), (N, K) float32; its softmax are CLIP's probabilities."""
    return scale * F.normalize(images.float(), dim=1) @ F.normalize(classes.float(), dim=1).T
