"""How fast a teacher's features are extracted, beside its bare tower on tensors that are in memory.

    python -m tests.benchmarks.clip_features --images 128
    python -m tests.benchmarks.clip_features --images 2000 --batch 256 --device cuda

What extraction adds is decoding, the resized view, normalisation, and files. Images are photographs (500 × 375 JPEG
files) and an array of 224² pixels that needs neither decoding nor resizing; sentences are captions of drawn shapes. The
networks have random weights: `tiny`, whose tower costs next to nothing, so that all of the rest shows, and the image
tower of ViT-B/32.

Figures are items per second and, as `ratio`, the median over interleaved repeats of the time beside the bare tower's.
On the CPU they are seconds of computing, of all threads, not of waiting for a core.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.pools import ImagePool, PoolsConfig, TextPool, open_images, open_texts
from data.views import normalised, plain_view
from methods.clip_features import FeatureConfig, extract_images, extract_texts
from networks.clip import Clip, load_clip
from networks.tiny import tiny_clip
from networks.weights import quiet_transformers
from tests.benchmarks.loading import photographs

NETWORKS = ("tiny", "ViT-B/32")
FORMS = ("npy", "tsv")
Job = Callable[[], object]


def network(name: str, folder: Path, device: str) -> Clip:
    """A CLIP with random weights; the image tower of ViT-B/32 is the library's default."""
    from transformers import CLIPConfig, CLIPModel

    place = folder / name.replace("/", "-")
    tiny = tiny_clip(folder)
    if name != "tiny":
        shutil.copytree(tiny, place)
        (place / "preprocessor_config.json").unlink()
        with quiet_transformers():
            text = CLIPConfig.from_pretrained(tiny).text_config
            CLIPModel(CLIPConfig(text_config=text.to_dict(), projection_dim=512)).save_pretrained(place)
    dtype = torch.float16 if device == "cuda" else torch.float32
    return load_clip(str(tiny if name == "tiny" else place), folder, device, dtype)


def quiet(work: Job) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        work()


def measure(
    title: str, unit: str, count: int, work: dict[str, Callable[[], object]], repeats: int, device: str
) -> None:
    """Print the rates of some pieces of work on `count` items, and their times beside the first's."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    turns: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        turns.append({})
        for name, job in work.items():
            start = clock()
            quiet(job)
            if device == "cuda":
                torch.cuda.synchronize()
            turns[-1][name] = clock() - start
    del turns[0]  # it warms up
    print(f"\n{title}\n{'':34}{unit + '/s':>12}{'ratio':>8}")
    bare = next(iter(work))
    for name in work:
        spent = statistics.median(turn[name] for turn in turns)
        ratio = statistics.median(turn[name] / turn[bare] for turn in turns)
        print(f"{name:34}{count / spent:12.1f}{ratio:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(args, folder)


def run(args: argparse.Namespace, folder: Path) -> None:
    (folder / "photographs").mkdir()
    photographs(folder / "photographs", args.images)
    pixels = np.random.default_rng(0).integers(0, 256, (args.images, 224, 224, 3), dtype=np.uint8)
    np.save(folder / "array.npy", pixels)
    pools = PoolsConfig(toy_texts=args.sentences)
    sources = {"photographs": open_images([str(folder / "photographs")], pools)}
    sources["an array of 224²"] = open_images([str(folder / "array.npy")], pools)
    texts = open_texts(["toy"], pools)
    print(f"{args.device}, {torch.get_num_threads()} threads, {args.workers} that decode, torch {torch.__version__}")
    for name in NETWORKS:
        clip = network(name, folder, args.device)
        plain = [plain_view(sources["photographs"].image(row), clip.image_size) for row in range(args.images)]
        ready = normalised(torch.stack(plain).to(args.device), clip.mean, clip.std)
        work = {"the bare tower": partial(bare, clip.images, ready, args.batch)}
        for source, pool in sources.items():
            for form in FORMS:
                work[f"{source}, {form}"] = partial(images_to_files, clip, pool, args.batch, form, args.workers)
        measure(f"{name}: {args.images} images", "images", args.images, work, args.repeats, args.device)
    clip, said = network("tiny", folder, args.device), [texts.text(row) for row in range(len(texts))]
    work = {"the bare tower and its tokenizer": partial(bare, clip.texts, said, args.batch)}
    work |= {f"sentences, {form}": partial(texts_to_files, clip, texts, args.batch, form) for form in FORMS}
    measure(f"tiny: {len(said)} sentences", "texts", len(said), work, args.repeats, args.device)


def bare(embed: Callable[[object], object], items: torch.Tensor | list[str], batch: int) -> None:
    for start in range(0, len(items), batch):
        embed(items[start : start + batch])


def images_to_files(clip: Clip, pool: ImagePool, batch: int, form: str, workers: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        extract_images(clip, pool, Path(place), "features", FeatureConfig(form, batch), workers)


def texts_to_files(clip: Clip, pool: TextPool, batch: int, form: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        extract_texts(clip, pool, Path(place), "features", FeatureConfig(form, batch))


if __name__ == "__main__":
    main()
