"""The networks that eval.py judges, and what they say of images and sentences: computed once, kept in the cache.

A student is an image tower whose sentences are its teacher's; a CLIP has both. Features are kept in parts of some
thousand rows, named after the network, the images and how these are shown, so a killed command goes on, another command
finds them, and nothing is ever taken for what it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.benchmark_files import Listing
from data.views import Reader, normalised, plain_view
from methods.core.zero_shot import class_vectors
from networks.clip import Clip, load_clip
from networks.clip_students import load_student
from utils.errors import UserError
from utils.files import digest, load_tensors, save_tensors
from utils.progress import progress

PART = 4096  # rows of a file of features
STUDENT, TEACHER = "student", "teacher"
PUBLISHED_TEACHER = "ViT-L/14"  # of the released students, which do not say


@dataclass(frozen=True)
class Tower:
    """An image tower, and the CLIP whose text tower goes with it.

    name         student, teacher, or where a CLIP is from; `source`: what was loaded
    encode       normalised images (B, 3, S, S) → (B, d)
    weights      how many the image tower has
    fingerprint  a digest of what determines `encode`
    """

    name: str
    source: str
    encode: Callable[[Tensor], Tensor]
    clip: Clip
    weights: int
    fingerprint: str
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]


def open_towers(rows: Sequence[str], student: Path, teacher: str, cache_dir: str, device: torch.device) -> list[Tower]:
    """The networks by name: `student`, `teacher`, or any CLIP.

    student   its file; needed where it is among the rows, or where the teacher is to be the one that it notes
    teacher   a CLIP; empty: the one that the student notes

    UserError where the student did not learn from that teacher.
    """
    found: dict[str, Tower] = {}
    if STUDENT in rows or (TEACHER in rows and not teacher):
        found = _student(student, teacher, cache_dir, device)
    elif TEACHER in rows:
        found[TEACHER] = clip_tower(load_clip(teacher, cache_dir, device), TEACHER)
    for row in rows:
        if row not in found:
            found[row] = clip_tower(load_clip(row, cache_dir, device, flag="rows"), row)
    return [found[row] for row in dict.fromkeys(rows)]


def clip_tower(clip: Clip, name: str) -> Tower:
    """A CLIP's own image tower."""
    weights = sum(part.numel() for key, part in clip.net.named_parameters() if key.startswith("vis"))
    return Tower(name, clip.name, clip.images, clip, weights, clip.fingerprint, clip.image_size, clip.mean, clip.std)


def _student(path: Path, teacher: str, cache_dir: str, device: torch.device) -> dict[str, Tower]:
    if not path.is_file():
        raise UserError(f"no student at {path}; run distill.py first, or name its file by --ckpt")
    net, spec, note = load_student(path, device)
    named = teacher or note.get("teacher") or PUBLISHED_TEACHER
    clip = load_clip(named, cache_dir, device)
    known = note.get("teacher_fingerprint")
    if known and known != clip.fingerprint:
        raise UserError(
            f"student {path} learned from another CLIP than {named} ({known[:12]}, not {clip.fingerprint[:12]}); "
            "give its own by --teacher"
        )
    if net.dim != clip.dim:
        raise UserError(
            f"student {path} has {net.dim} features and the sentences of {named} have {clip.dim}; give its own teacher "
            "by --teacher"
        )

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return net(pixels).float()

    state = net.state_dict()
    parts = [value for name in sorted(state) for value in (name, state[name])]
    mark = digest("clip student 1", spec.name, spec.image_size, spec.options, *parts)
    weights = sum(part.numel() for part in net.parameters())
    own = Tower(STUDENT, str(path), encode, clip, weights, mark, net.image_size, net.mean, net.std)
    return {STUDENT: own, TEACHER: clip_tower(clip, TEACHER)}


@dataclass(frozen=True)
class FeatureCache:
    """What towers say, kept in files.

    folder   where; `workers`: threads that read images; `batch`: images at once
    """

    folder: Path
    workers: int
    batch: int
    device: torch.device

    def images(self, tower: Tower, listing: Listing, content: str, crop: bool, what: str) -> Tensor:
        """The features (N, d) float32 of all images, whole: the middle of each, or (`crop` false) all of it squeezed.

        content   the images' digest
        """
        shown = [tower.image_size, list(tower.mean), list(tower.std), crop]
        place = self.folder / digest("image features 1", tower.fingerprint, shown, content, PART)[:32]
        starts = range(0, len(listing.pictures), PART)
        files = [place / f"{start:09d}.pt" for start in starts]
        if any(not file.is_file() for file in files):
            with progress(total=len(listing.pictures), what=f"{tower.name}, {what}", unit="image") as bar:
                for start, file in zip(starts, files, strict=True):
                    stop = min(start + PART, len(listing.pictures))
                    if not file.is_file():
                        save_tensors(file, {"features": self._extract(tower, listing, range(start, stop), crop, bar)})
                    bar.update(stop - bar.n)
        return torch.cat([self._load(file) for file in files])

    def classes(self, tower: Tower, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """The class vectors (K, d) of a tower's sentences."""
        mark = digest("class vectors 1", tower.clip.fingerprint, list(names), list(templates))
        file = self.folder / f"classes-{mark[:32]}.pt"
        if not file.is_file():
            save_tensors(file, {"features": class_vectors(tower.clip.texts, names, templates)})
        return self._load(file)

    def _extract(self, tower: Tower, listing: Listing, rows: range, crop: bool, bar: progress) -> Tensor:
        batches = [rows[first : first + self.batch] for first in range(0, len(rows), self.batch)]
        found = []
        with closing(Reader(listing.pictures, self.workers)) as reader:
            views = reader.stream(
                (batch, lambda image, _: plain_view(image, tower.image_size, crop)) for batch in batches
            )
            for pixels, _ in views:
                images = normalised(pixels.to(self.device), tower.mean, tower.std)
                found.append(tower.encode(images).float().cpu())
                bar.update(len(pixels))
        return torch.cat(found)

    def _load(self, file: Path) -> Tensor:
        remedy = "remove it, and it is made again"
        found = load_tensors(file, "cached features", remedy=remedy)
        if not isinstance(found, dict) or not isinstance(found.get("features"), Tensor):
            raise UserError(f"cached features {file} are damaged; {remedy}")
        return found["features"]
