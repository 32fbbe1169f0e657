"""What VLCP's steps cost beside the work they cannot do without: time as a ratio to that, and memory above the input.

    python -m tests.benchmarks.prototypes
    python -m tests.benchmarks.prototypes --full      # some minutes more

class      one class at ImageNet's size, 1,300 latents of 4 x 64 x 64: outliers, and k-means with k = 10. A pass is one
           product of the features with the ten centres. Beside it the released code's way, which holds each number as
           a Python float (32 bytes with its place in a list) and computes in float64: of a quarter of the images,
           whole with --full
files      published prototypes read class by class beside `json.load` of the whole file
captions   a file of 100,000 captions beside parsing its lines; the images need not be there
encoding   images to latents, ten at once, beside the autoencoder alone
tuning     a step of fine-tuning beside the denoiser there and back on latents and text that are ready

The last two are of the offline model tiny: they tell what the code around networks costs, and nothing of the shares of
Stable Diffusion's networks. Peak memory is that of a process of its own (Linux): what was resident at most, less what
was before. Times are seconds of computing, not of waiting for a core: medians of turns, but for a class of one.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.catalogue import Catalogue, Kind
from data.metadata import read_metadata, write_metadata
from methods.prototype_files import Prototypes, export_published, import_published
from methods.prototype_latents import moments
from methods.prototype_learning import Batch, Learner, to_signed
from methods.prototype_tuning import denoising_loss, sample_latents
from networks.diffusion import LatentModel, load_model, open_model
from tests.benchmarks.poster import MIB, _resident, table
from tests.benchmarks.table import environment
from tests.benchmarks.timing import in_turns, seconds
from utils.cluster import inliers, kmeans
from utils.rng import generator

LATENT = (4, 64, 64)  # of an image of 512 px
IMAGES, CLUSTERS, OUTLIERS, NEIGHBOURS, RESTARTS = 1300, 10, 0.1, 10, 10
CAPTIONS, CLASSES = 100_000, 1000
TURNS = 3  # of reading a file each way
ENCODED, TUNED = 10, 8  # images at once
CAPTION = "a large red circle beside a small blue square on a plain grey background"


def noise(count: int) -> Tensor:
    """(count, 16384): latents, as far as their cost goes."""
    return torch.randn(count, *LATENT, generator=generator(0, "latents")).flatten(1)


def published_clusters(features: Tensor) -> None:
    """Outliers and clusters as the released code finds them, a number a Python float, computed in float64."""
    from sklearn.cluster import KMeans
    from sklearn.neighbors import LocalOutlierFactor
    from threadpoolctl import threadpool_limits

    values = features.tolist()
    with threadpool_limits(limits=1):
        kept = LocalOutlierFactor(n_neighbors=NEIGHBOURS, contamination=OUTLIERS).fit_predict(values) == 1
        values = [value for value, keep in zip(values, kept, strict=True) if keep]
        KMeans(n_clusters=CLUSTERS, n_init=RESTARTS, random_state=0).fit(values)


def clusters(features: Tensor) -> None:
    kmeans(features, CLUSTERS, 0, RESTARTS)


def both(features: Tensor) -> None:
    clusters(features[inliers(features, OUTLIERS, NEIGHBOURS)])


CHOICES: dict[str, Callable[[Tensor], object]] = {
    "outliers": lambda features: inliers(features, OUTLIERS, NEIGHBOURS),
    "k-means": clusters,
    "both": both,
    "both, the released code's way": published_clusters,
}


def prepared(job: dict[str, Any]) -> Callable[[], object]:
    """The work of a job, its input in memory and its libraries loaded."""
    if "choice" in job:
        features, choose = noise(job["images"]), CHOICES[job["choice"]]
        choose(features[: 2 * CLUSTERS])
        return lambda: choose(features)
    paths = [Path(path) for path in job["paths"]]
    if job["whole"]:
        return lambda: json.loads(paths[0].read_text(encoding="utf-8"))
    catalogue = named_classes(job["classes"], 0)
    return lambda: [None for _ in import_published(*paths, catalogue, job["ipc"])]


def alone(job: dict[str, Any]) -> dict[str, float]:
    """Seconds and peak bytes of a job in a process of its own."""
    job = job | {"threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "tests.benchmarks.prototypes", "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(job: dict[str, Any]) -> dict[str, float]:
    torch.set_num_threads(job["threads"])
    work = prepared(job)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, spent = _resident("VmRSS"), seconds(work, "cpu")
    return {"seconds": spent, "peak": _resident("VmHWM") - before}


def print_class(full: bool) -> None:
    """Outliers and k-means of one class, in passes over its features."""
    rows = []
    for name in CHOICES:
        count = IMAGES if full or name != list(CHOICES)[-1] else IMAGES // 4
        features, centres = noise(count), noise(CLUSTERS)
        one_pass = min(seconds(lambda f=features, c=centres: f @ c.T, "cpu") for _ in range(7))
        found = alone({"choice": name, "images": count})
        above = [f"{found['peak'] / MIB:,.0f}", f"{found['peak'] / features.numel():.1f}"]
        rows.append([name, f"{count:,}", f"{found['seconds']:.2f}", f"{found['seconds'] / one_pass:,.0f}", *above])
    size = f"{IMAGES:,} latents are {IMAGES * noise(1).numel() * 4 / MIB:,.0f} MiB"
    header = ["one class", "images", "seconds", "passes", "MiB above the latents", "bytes a number"]
    table(f"Prototypes of a class, k = {CLUSTERS}, {RESTARTS} restarts; {size}, 4 bytes a number", header, rows)


def named_classes(classes: int, images: int) -> Catalogue:
    """A catalogue of image files that are nowhere."""
    kinds = tuple(Kind(f"n{number:08}", f"thing {number}") for number in range(classes))
    files = tuple(tuple(f"{kind.ident}/{kind.ident}_{i:05}.JPEG" for i in range(images)) for kind in kinds)
    return Catalogue("folder", "folder", kinds, Path("train"), Path("val"), files, (), "", "cache", 1)


def print_files(full: bool) -> None:
    """Published JSON of image prototypes, class by class and whole."""
    rows, ipc = [], 5
    for classes in (20, 80) if full else (20,):
        kinds = named_classes(classes, 0).kinds
        with tempfile.TemporaryDirectory() as folder:
            found = (Prototypes(*vars(kind).values(), noise(ipc).view(-1, *LATENT), [CAPTION] * ipc) for kind in kinds)
            paths = export_published(Path(folder), found, "folder", ipc, 0.7, 30, 1)
            size = paths[0].stat().st_size / MIB
            job = {"paths": list(map(str, paths)), "classes": classes, "ipc": ipc}
            turns = [[alone(job | {"whole": whole}) for whole in (True, False)] for _ in range(TURNS)]
        cells = []
        for what, unit, form in (("peak", MIB, ",.0f"), ("seconds", 1, ".2f")):
            cells += [
                format(statistics.median(way[what] / unit for way in ways), form) for ways in zip(*turns, strict=True)
            ]
            cells.append(f"{statistics.median(ours[what] / whole[what] for whole, ours in turns):.2f}")
        rows.append([f"{classes} classes of {ipc}, {size:,.0f} MiB", *cells])
    header = ["file", "json.load, MiB", "by class, MiB", "ratio", "json.load, s", "by class, s", "ratio"]
    table("Published prototypes read, and checked, class by class beside json.load of all", header, rows)


def print_captions(repeats: int) -> None:
    """A file of captions, checked against the images, beside its lines parsed."""
    catalogue = named_classes(CLASSES, CAPTIONS // CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metadata.jsonl"
        write_metadata(path, {name: CAPTION for names in catalogue.train for name in names})
        work = {
            "each line parsed": lambda: [json.loads(line) for line in path.open(encoding="utf-8")],
            "read and checked": lambda: read_metadata(path, catalogue),
        }
        found = in_turns(work, repeats)
    rows = [[name, f"{spent:.2f}", f"{ratio:.2f}"] for name, (spent, ratio) in found.items()]
    table(f"Captions of {CAPTIONS:,} images of {CLASSES:,} classes", ["way", "seconds", "to the first"], rows)


def print_encoding(model: LatentModel, sizes: list[int], repeats: int) -> None:
    """Images a second to latents, beside the autoencoder alone."""
    rows = []
    for size in sizes:
        images = torch.rand(ENCODED, 3, size, size, generator=generator(0, "images")) * 2 - 1
        work = {
            "bare": torch.no_grad()(functools.partial(model.vae.encode, images)),
            "mode": lambda x=images: model.encode(x),
            "sample": lambda x=images: model.encode(x, [generator(0, "latent", n) for n in range(ENCODED)]),
        }
        found = in_turns(work, repeats)
        speeds = [f"{ENCODED / spent:,.0f}" for spent, _ in found.values()]
        rows.append([f"{size} px", *speeds, *(f"{1 / found[name][1]:.2f}" for name in ("mode", "sample"))])
    header = ["images", "autoencoder alone, a second", "mode, a second", "sample, a second"]
    table(f"Encoding, {ENCODED} at once", [*header, "mode to alone", "sample to alone"], rows)


def print_tuning(model: LatentModel, sizes: list[int], repeats: int) -> None:
    """A step of fine-tuning, and its parts, beside the denoiser alone."""
    found = {size: in_turns(tuning_work(model, size), repeats) for size in sizes}
    rows = []
    for name in found[sizes[0]]:
        numbers = [found[size][name] for size in sizes]
        rows.append([name, *(cell for spent, ratio in numbers for cell in (f"{1e3 * spent:.1f}", f"{ratio:.2f}"))])
    header = ["part", *(cell for size in sizes for cell in (f"{size} px, ms", "to the first"))]
    table(f"A step of fine-tuning, {TUNED} images at once", header, rows)


def tuning_work(model: LatentModel, size: int) -> dict[str, Callable[[], object]]:
    """The step on a batch, and its parts, when called."""
    rng, schedule = generator(0, "tuning", size), model.noise()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (TUNED, 3, size, size), np.uint8))
    extent = (TUNED, 4, size // model.factor, size // model.factor)
    added, posterior = (torch.randn(extent, generator=rng) for _ in range(2))
    times = torch.randint(schedule.config.num_train_timesteps, (TUNED,), generator=rng)
    batch = Batch(pixels, [CAPTION] * TUNED, posterior, added, times)
    model.unet.requires_grad_(True).train()
    loss = functools.partial(denoising_loss, model, schedule)
    learner = Learner(model.unet, loss, 10**6, TUNED, 1e-5, 1.0, average=True)

    @torch.no_grad()
    def latents() -> Tensor:
        found = moments(model, to_signed(pixels, model.device))
        return sample_latents(found, posterior) * model.vae.config.scaling_factor

    states, noised = model.embed(batch.texts), schedule.add_noise(latents(), added, times)

    with torch.no_grad():
        known = replace(batch, images=None, encoded=(moments(model, to_signed(pixels, model.device)), states))

    def denoiser() -> None:
        F.mse_loss(model.unet(noised, times, states).sample, added).backward()

    return {
        "denoiser there and back": denoiser,
        "images to latents": latents,
        "captions to text states": lambda: model.embed(batch.texts),
        "all of these: the loss and its gradient": lambda: loss(batch).backward(),
        "the whole step: with AdamW and the moving average": lambda: learner.step(batch),
        "the same with --cache_latents": lambda: learner.step(known),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of what is measured side by side")
    parser.add_argument("--full", action="store_true", help="the released code's clusters whole, more classes, 512 px")
    parser.add_argument(
        "--only", default="", choices=("", "class", "files", "captions", "encoding", "tuning"), help="one table"
    )
    parser.add_argument("--job", default="", help=argparse.SUPPRESS)  # what `alone` asks for
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(json.loads(args.job))))
        return
    print(environment("cpu"))
    sizes = [64, 256] + [512] * args.full

    @functools.cache
    def tiny() -> LatentModel:
        with tempfile.TemporaryDirectory() as folder:
            return load_model(open_model("tiny", folder))

    tables = {
        "class": lambda: print_class(args.full),
        "files": lambda: print_files(args.full),
        "captions": lambda: print_captions(args.repeats),
        "encoding": lambda: print_encoding(tiny(), sizes, args.repeats),
        "tuning": lambda: print_tuning(tiny(), sizes, args.repeats),
    }
    for name, show in tables.items():
        if args.only in ("", name):
            show()


if __name__ == "__main__":
    main()
