"""From a class's images to its pairs (image prototype, text prototype), one class at a time.

1. Each training image, squashed to `size` pixels, is encoded: z, (4, size/8, size/8). Latents are kept in a file.
2. The `contamination` share of the class that lies loosest among its neighbours (local outlier factor) is left out.
3. k-means finds ipc clusters of the rest. The mean of a cluster is an image prototype; it tells layout and colour, for
   the texture of many latents averages out. `--medoid` takes the member nearest to it instead.
4. One caption of the cluster is its text prototype (prototype_texts.py).

No more than one class is in memory, in float32. A class whose files note the same inputs is not made again, and a
class's prototypes depend on no other class.

Paper: VLCP (Zou et al., ICCV 2025). Its released code clusters random samples of the autoencoder's posterior; the
default here is the posterior's mode, which is the same every time. `COMPAT` are the released code's choices.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.cache import ImageFiles
from data.catalogue import Catalogue, Kind
from methods import prototype_texts
from methods.prototype_files import Prototypes, load_prototypes, save_prototypes, stamp
from methods.prototype_texts import TextConfig, text_prototypes
from utils.cluster import inliers, kmeans, outliers
from utils.config import option
from utils.errors import RunError, UserError
from utils.files import digest, load_vectors, save_vectors
from utils.progress import progress
from utils.rng import generator

COMPAT = {**prototype_texts.COMPAT, "latent": "sample", "medoid": False}

VERSION = 1  # of what is made; a change makes old files unseen
NEIGHBOURS = 10  # of the local outlier factor


@dataclass(frozen=True)
class PrototypeConfig:
    """How prototypes are found."""

    ipc: int = option(10, "prototypes a class, and images made of them", low=1)
    contamination: float = option(0.1, "share of a class's images that is left out as outliers; 0 is none", low=0)
    size: int = option(512, "images are resized to this side, whatever their shape, before they are encoded", low=8)
    latent: str = option(
        "mode", "what an image is encoded to: the posterior's mode or a sample", choices=("mode", "sample")
    )
    medoid: bool = option(False, "prototypes are the real members nearest to the clusters' means, not the means")
    few_images: str = option(
        "refuse",
        "classes with fewer images than --ipc: refuse, or share fewer prototypes (a divisor of --ipc) among the images",
        aliases=("few-images",),
        choices=("refuse", "share"),
    )
    keep_latents: str = option(
        "float32",
        "latents are kept in the run folder for the next run: as float32, as float16 (rounded, half the size), or none",
        choices=("float32", "float16", "none"),
    )
    batch_size: int = option(10, "images encoded at once", aliases=("encode_batch",), low=1, free=True)

    def check(self) -> None:
        if self.contamination > 0.5:
            raise UserError(f"--contamination is {self.contamination}; at most half of a class, 0.5, can be outliers")
        if self.size % 8:
            raise UserError(f"--size {self.size} is no multiple of 8, as latents need; give {-(-self.size // 8) * 8}")


def class_prototypes(
    cfg: PrototypeConfig,
    texts: TextConfig,
    catalogue: Catalogue,
    captions: dict[str, str],
    folder: Path | str,
    seed: int,
    model: str,
    load: Callable[[], Any],
) -> Iterator[Prototypes]:
    """The prototypes of each class in the order of the catalogue, found or read; also written to `folder`/prototypes.

    captions  "<class>/<file>" → caption; images that have none belong to clusters, too
    model     tells one autoencoder from another, such as a digest of its weights
    load      the model, whose `encode` gives scaled latents; called once, and only if a class needs it

    UserError at once for a class of too few images, and later where too few differ.
    """
    check_counts(cfg, catalogue)
    small = [number for number, files in enumerate(catalogue.train) if len(files) <= NEIGHBOURS]
    if small and cfg.contamination:
        print(
            f"note: {len(small)} of {len(catalogue.kinds)} classes have no more than {NEIGHBOURS} training images (the "
            f"first is {_named(catalogue.kinds[small[0]])}), too few to tell outliers well; --contamination 0 keeps all"
        )
    return _Classes(cfg, texts, catalogue, captions, Path(folder), seed, model, functools.cache(load)).all()


def check_counts(cfg: PrototypeConfig, catalogue: Catalogue) -> None:
    """UserError now, not after hours of encoding, where a class has too few images for its prototypes."""
    counts = [len(files) for files in catalogue.train]
    left = [count - outliers(count, cfg.contamination) for count in counts]
    few = [number for number, count in enumerate(left) if count < cfg.ipc]
    if few and cfg.few_images == "refuse":
        first, lower = few[0], "--ipc"
        told = f"{counts[first]} training images"
        if counts[first] >= cfg.ipc:
            told, lower = f"{left[first]} of its {told} left once outliers are out", "--ipc or --contamination"
        raise UserError(
            f"class {_named(catalogue.kinds[first])} has {told}, fewer than --ipc {cfg.ipc} "
            f"(as {len(few)} of {len(counts)} classes have); lower {lower}, or give --few_images share"
        )


@dataclass
class _Classes:
    """What `class_prototypes` was given, and the steps on one class."""

    cfg: PrototypeConfig
    texts: TextConfig
    catalogue: Catalogue
    captions: dict[str, str]
    folder: Path
    seed: int
    model: str
    load: Callable[[], Any]

    def all(self) -> Iterator[Prototypes]:
        with progress(total=sum(map(len, self.catalogue.train)), what="prototypes", unit="image") as bar:
            for number, kind in enumerate(self.catalogue.kinds):
                before = bar.n
                yield self._one(number, kind, bar)
                bar.update(before + len(self.catalogue.train[number]) - bar.n)  # those that needed no encoding

    def _one(self, number: int, kind: Kind, bar: progress) -> Prototypes:
        """The prototypes of one class, read if they are of the same inputs."""
        images = ImageFiles(
            self.catalogue.train_paths(number),
            self.cfg.size,
            Path(self.catalogue.cache_dir) / "images",
            self.catalogue.threads,
            kind.ident,
            self.catalogue.train_root,
            "bilinear",
            "--data_path",
        )
        files, source = self.catalogue.train[number], self._source(number, images)
        captions = {file: self.captions[file] for file in files if file in self.captions}
        cfg = self.cfg
        choices = cfg.contamination, cfg.ipc, cfg.medoid, cfg.few_images, self.seed, asdict(self.texts)
        inputs = digest("prototypes", VERSION, source, *choices, kind.label, captions)
        try:
            found = load_prototypes(self.folder / "prototypes", kind.ident)
        except UserError:  # none yet, or half of one
            found = None
        if found is None or found.inputs != inputs:
            latents = self._latents(kind, files, images, source, bar)
            found = find_prototypes(kind, files, latents, captions, cfg, self.texts, self.seed)
            found.inputs = inputs
            save_prototypes(self.folder / "prototypes", found)
        return found

    def _source(self, number: int, images: ImageFiles) -> str:
        """A digest of what a class's latents are made of."""
        cfg, names = self.cfg, self.catalogue.train[number]
        rounded = cfg.keep_latents == "float16"
        chance = self.seed if cfg.latent == "sample" else None
        content = images.content(quiet=True)
        return digest("latents", VERSION, names, content, self.model, cfg.size, cfg.latent, chance, rounded)

    def _latents(self, kind: Kind, files: tuple[str, ...], images: ImageFiles, source: str, bar: progress) -> Tensor:
        """(n, 4, h, w) float32, encoded or read."""
        path = self.folder / "latents" / f"{kind.ident}.safetensors"
        try:
            known = load_vectors(path, "latents", "")
        except UserError:
            known = {}
        if torch.equal(known.get("inputs", torch.empty(0)), stamp(source)):
            return known["latents"].float()
        latents = self._encoded(files, images, bar)
        if not torch.isfinite(latents).all():
            raise RunError(f"latents of class {_named(kind)} are not finite; encode them with --dtype float32")
        if self.cfg.keep_latents != "none":
            latents = latents.to(getattr(torch, self.cfg.keep_latents)).contiguous()
            save_vectors(path, {"latents": latents, "inputs": stamp(source)})
        return latents.float()

    def _encoded(self, files: tuple[str, ...], images: ImageFiles, bar: progress) -> Tensor:
        """Each image's latent; a sample has chance of its own, by the file's name."""
        names, parts = iter(files), []
        for pixels in images.passing(self.cfg.batch_size):
            some = itertools.islice(names, len(pixels))
            chance = [generator(self.seed, "latent", name) for name in some] if self.cfg.latent == "sample" else None
            parts.append(self.load().encode(pixels.float() / 127.5 - 1, chance).float().cpu())
            bar.update(len(pixels))
        return torch.cat(parts)


def find_prototypes(
    kind: Kind,
    files: tuple[str, ...],
    latents: Tensor,
    captions: dict[str, str],
    cfg: PrototypeConfig,
    texts: TextConfig,
    seed: int,
) -> Prototypes:
    """Steps 2 to 4 on one class.

    files     [n] sorted, such as "n01440764/1.JPEG"; `captions` of all or some of them
    latents   (n, 4, h, w) float32
    UserError where fewer than --ipc images, or different images, are left.
    """
    points = latents.flatten(1)
    kept = inliers(points, cfg.contamination, NEIGHBOURS).nonzero().flatten()
    labels, means = _clusters(kind, points[kept], len(files), cfg, seed)
    clusters = torch.full((len(files),), -1).index_put((kept,), labels)
    prototypes, order = [], []
    for number, mean in enumerate(means):
        members = (clusters == number).nonzero().flatten()
        ranks = (points[members] - mean).square().sum(1).argsort(stable=True)
        order.append([files[i] for i in members[ranks].tolist()])
        prototypes.append(points[members[ranks[0]]] if cfg.medoid else mean)
    pairs = [[(file, captions[file]) for file in sorted(members) if file in captions] for members in order]
    chosen = text_prototypes(pairs, kind.label, texts, order)
    return Prototypes(
        kind.ident,
        kind.label,
        torch.stack(prototypes).view(-1, *latents.shape[1:]),
        [one.text for one in chosen],
        [one.file for one in chosen],
        [list(one.words) for one in chosen],
        list(files),
        clusters.tolist(),
        [members[0] for members in order],
    )


def _clusters(kind: Kind, points: Tensor, images: int, cfg: PrototypeConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Labels (N,) and means (k, F) of clusters that all have members; k is --ipc, or a divisor of it on request."""
    count, what = len(points), "images"
    while True:
        if count < cfg.ipc and cfg.few_images == "refuse":
            raise UserError(
                f"class {_named(kind)} has {count} {what} of {images} left for its clusters, fewer than --ipc "
                f"{cfg.ipc}; lower --ipc or --contamination, or give --few_images share"
            )
        k = next(k for k in range(min(count, cfg.ipc), 0, -1) if cfg.ipc % k == 0)
        labels, means = kmeans(points, k, seed)
        count, what = len(labels.unique()), "different images"  # copies of an image are always together
        if count == k:
            return labels, means


def _named(kind: Kind) -> str:
    return kind.ident if kind.label == kind.ident else f"{kind.ident} ({kind.label})"
