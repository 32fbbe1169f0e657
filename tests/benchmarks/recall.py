"""How long retrieval_recall takes at COCO size, beside the bare product of similarities.

    python -m tests.benchmarks.recall

5,000 images, 25,010 captions, 768 numbers each. Memory is the peak above the inputs. By itself it also sorts, slowly,
to see that all numbers are the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.benchmarks.table import Row, Scale, environment, judged, show
from tests.benchmarks.timing import in_turns, peak_bytes, profile_line
from utils.metrics import retrieval_recall

IMAGES, TEXTS, WIDTH = 5_000, 25_010, 768


def recall_by_sorting(scores: Tensor, positive_of: Callable[[int, int], Tensor]) -> dict[int, float]:
    """Each row sorted by score, negatives before positives that equal them: slow and obvious."""
    hits = dict.fromkeys((1, 5, 10), 0)
    for first in range(0, len(scores), 500):
        block = scores[first : first + 500]
        positive = positive_of(first, first + len(block))
        order = positive.int().argsort(dim=1, stable=True)
        order = order.gather(1, block.gather(1, order).argsort(dim=1, descending=True, stable=True))
        rank = positive.gather(1, order).int().argmax(dim=1)
        for k in hits:
            hits[k] += int((rank < k).sum())
    return {k: 100.0 * count / len(scores) for k, count in hits.items()}


def embeddings(images: int, texts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and whose they are: five captions an image and some with a sixth; noise hides most, not all."""
    rng = torch.Generator().manual_seed(0)
    image_of = torch.cat([torch.arange(images).repeat_interleave(5), torch.arange(texts - 5 * images)])
    owners = normalize(torch.randn(images, WIDTH, generator=rng), dim=1)
    captions = normalize(owners[image_of] + 0.25 * torch.randn(texts, WIDTH, generator=rng), dim=1)
    return owners, captions, image_of


def rows(scale: Scale) -> list[Row]:
    count, captions = scale.of((200, 1_002), (IMAGES, TEXTS))
    images, texts, image_of = (part.to(scale.device) for part in embeddings(count, captions))
    images[:8] @ texts[:8].T  # the library's threads and buffers are not ours to count
    work = {"product": lambda: images @ texts.T, "recall": lambda: retrieval_recall(images, texts, image_of)}
    above = peak_bytes(work["recall"], scale.device)
    found = in_turns(work, scale.of(1, 3, 20), scale.device)
    note = (
        f"{found['recall'].seconds:.2f} s; {above / 1e6:,.0f} MB above the inputs, {4e-6 * count * captions:,.0f} of "
    )
    what = f"recall@K of {count:,} images x {captions:,} captions to the similarity product alone, time"
    row = judged("recall", what, found["recall"].ratio, "x", at_most=1.5, note=f"{note}it the scores")
    return [row.explained(lambda: profile_line(work["recall"], scale.device))]


def identical_to_sorting() -> bool:
    images, texts, image_of = embeddings(IMAGES, TEXTS)
    result, scores = retrieval_recall(images, texts, image_of), images @ texts.T
    tr = recall_by_sorting(scores, lambda a, b: image_of == torch.arange(a, b)[:, None])
    ir = recall_by_sorting(scores.T, lambda a, b: image_of[a:b, None] == torch.arange(IMAGES))
    sorted_ = {f"ir@{k}": value for k, value in ir.items()} | {f"tr@{k}": value for k, value in tr.items()}
    mean = (statistics.fmean(ir.values()) + statistics.fmean(tr.values())) / 2
    return result["r_mean"] == mean and all(result[name] == value for name, value in sorted_.items())


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(environment(device))
    show(rows(Scale(device)))
    print(f"identical to sorting: {'yes' if identical_to_sorting() else 'no'}")


if __name__ == "__main__":
    main()
