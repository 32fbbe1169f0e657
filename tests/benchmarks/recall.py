"""How long retrieval_recall takes at COCO size, beside the bare product of similarities.

    python -m tests.benchmarks.recall

5,000 images, 25,010 captions, 768 numbers each; best of three. Memory is the peak above the inputs.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from utils.metrics import retrieval_recall

IMAGES, TEXTS, WIDTH = 5_000, 25_010, 768


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


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


def peak_above_now(work: Callable[[], object]) -> float:
    """MB by which the process's peak exceeds what it holds now (Linux: pages now, KB at the peak)."""
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - now) / 1e6


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    # Five captions an image, and ten images with a sixth; noise hides most, not all, of what they share.
    image_of = torch.cat([torch.arange(IMAGES).repeat_interleave(5), torch.arange(TEXTS - 5 * IMAGES)])
    images = normalize(torch.randn(IMAGES, WIDTH, generator=rng), dim=1)
    texts = normalize(images[image_of] + 0.25 * torch.randn(TEXTS, WIDTH, generator=rng), dim=1)

    images[:8] @ texts[:8].T  # the library's threads and buffers are not ours to count
    memory = peak_above_now(lambda: retrieval_recall(images, texts, image_of))
    # By turns, so that a busy machine is unfair to both.
    turns = [
        (timed(lambda: images @ texts.T), timed(lambda: retrieval_recall(images, texts, image_of))) for _ in range(3)
    ]
    product, recall = map(min, zip(*turns, strict=True))

    result = retrieval_recall(images, texts, image_of)
    scores = images @ texts.T
    tr = recall_by_sorting(scores, lambda a, b: image_of == torch.arange(a, b)[:, None])
    ir = recall_by_sorting(scores.T, lambda a, b: image_of[a:b, None] == torch.arange(IMAGES))
    sorted_ = {f"ir@{k}": value for k, value in ir.items()} | {f"tr@{k}": value for k, value in tr.items()}
    identical = all(result[name] == value for name, value in sorted_.items())
    identical &= result["r_mean"] == (statistics.fmean(ir.values()) + statistics.fmean(tr.values())) / 2

    print(
        f"{IMAGES:,} images x {TEXTS:,} texts x {WIDTH}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"product alone           {product:8.2f} s")
    print(f"retrieval_recall        {recall:8.2f} s")
    print(f"ratio                   {recall / product:8.2f}")
    print(f"peak above the inputs   {memory:8.0f} MB")
    print(f"identical to sorting    {'yes' if identical else 'no':>8}")
    print("  ".join(f"{name} {value:.2f}" for name, value in result.items()))


if __name__ == "__main__":
    main()
