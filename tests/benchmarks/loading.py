"""How fast images are delivered: decoded from JPEG each time, from the cache, and through the train transform.

    python -m tests.benchmarks.loading --images 600 --image_size 224

Makes its own photographs (500×375, in a temporary folder) and prints images per second. The ratio is to one
DataLoader-like worker, which decodes and transforms item by item with torchvision; files are warm in memory.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.cache import ImageFiles
from data.captions import MEAN, STD, Annotations, CaptionSplit
from tests.benchmarks.table import Row, Scale, judged


def photographs(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    files = [folder / f"{i}.jpg" for i in range(count)]
    for file in files:
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, quality=90)
    return files


def rate(deliver: Callable[[torch.Tensor], torch.Tensor], images: int, batch: int, device: str) -> float:
    """Images per second over one pass in shuffled batches."""
    start = time.perf_counter()
    for indices in torch.randperm(images).split(batch):
        deliver(indices)
    if device == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def speeds(images: int, image_size: int, batch: int, workers: int, device: str) -> dict[str, float]:
    """Images a second of each way."""
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    plain = transforms.Compose(
        [
            transforms.Resize((image_size, image_size), bicubic),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    augmented = transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, (0.5, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.RandAugment(2, 5),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    with tempfile.TemporaryDirectory() as name:
        files = photographs(Path(name), images)
        pictures = ImageFiles(files, image_size, Path(name) / "cache", workers, "benchmark", Path(name))
        notes = Annotations([""] * images, list(range(images)), [file.name for file in files])
        split = CaptionSplit("train", notes, pictures, True, device)
        rng = torch.Generator().manual_seed(0)

        def per_item(transform: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
            def deliver(indices: torch.Tensor) -> torch.Tensor:
                threads = torch.get_num_threads()
                torch.set_num_threads(1)  # as a DataLoader's worker does
                items = [transform(Image.open(files[i]).convert("RGB")) for i in indices.tolist()]
                torch.set_num_threads(threads)
                return torch.stack(items).to(device)

            return deliver

        def measure(deliver: Callable[[torch.Tensor], torch.Tensor]) -> float:
            return rate(deliver, images, batch, device)

        return {
            "test: decode each time, one worker": measure(per_item(plain)),
            "test: first pass, builds the cache": measure(split.eval_images),
            "test: cached": measure(split.eval_images),
            "train: decode each time, one worker": measure(per_item(augmented)),
            "train: first pass, builds the cache": measure(lambda indices: split.train_images(indices, rng)),
            "train: cached": measure(lambda indices: split.train_images(indices, rng)),
        }


def rows(scale: Scale) -> list[Row]:
    count, size, workers = scale.of(8, 300, 600), scale.of(32, 224), os.cpu_count() or 1
    found = speeds(count, size, scale.of(4, 64, 128), workers, scale.device)
    rows = []
    for split in ("test", "train"):
        ways = ("decode each time, one worker", "first pass, builds the cache", "cached")
        slow, first, cached = (found[f"{split}: {way}"] for way in ways)
        note = f"{cached:,.0f} images a second; the first pass, which builds the cache, {first / slow:.1f} times"
        what = f"{split} images of {size} px a second from the cache, to decoding each in one worker"
        rows.append(judged("loading", what, cached / slow, "x", note=note, form=".1f"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"{args.images} images, {args.image_size} px, batches of {args.batch}, {args.workers} workers, {args.device}")
    print(f"{'':40}{'images/s':>10}{'ratio':>8}")
    base = 0.0
    for what, speed in speeds(args.images, args.image_size, args.batch, args.workers, args.device).items():
        base = speed if "each time" in what else base
        print(f"{what:40}{speed:10.0f}{speed / base:8.1f}")


if __name__ == "__main__":
    main()
