"""Image–caption pairs: the annotation files of Flickr30K and COCO retrieval, and the three splits they make.

A train file has one record a caption, `{"image", "caption": text, "image_id"}`; a val or test file has one record an
image, `{"image", "caption": [text, ...]}`. Captions are numbered in reading order, images by first appearance.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.config import option
from utils.devices import moved
from utils.errors import UserError
from utils.files import digest, read_json
from utils.parsing import is_below, is_utf8
from utils.ranks import neighbours

# CLIP's channel statistics, which the published pipelines use in front of every backbone.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class DataConfig:
    """The data set: which, where its files are, and how images are prepared."""

    dataset: str = option("flickr", "data set: flickr, coco, folder (files named *_train.json ...) or toy")
    image_root: str = option("", "folder that the annotations' image paths start from", free=True)
    ann_root: str = option("", "folder of the annotation files, such as flickr30k_train.json", free=True)
    image_size: int = option(224, "side of the square images, in pixels", low=8)
    no_aug: bool = option(False, "train on images prepared as for testing: no crop, no flip, no RandAugment")
    train_limit: int = option(0, "use only the first so many training images, for a quick trial; 0 is all", low=0)
    toy_images: int = option(1200, "training images of the toy set", low=1)
    cache_dir: str = option("cache", "folder for decoded images", free=True)
    workers: int = option(0, "threads that decode and crop images; 0: the cores, shared by processes", low=0, free=True)

    @property
    def threads(self) -> int:
        """`workers`, counted."""
        return self.workers or max((os.cpu_count() or 1) // neighbours(), 1)


def clean_caption(text: str, max_words: int = 30) -> str:
    """A caption as the published pipelines read it: lower case, without most marks, at most `max_words` words.

    The marks . ! " ( ) * # : ; ~ become spaces; commas, hyphens, apostrophes, ? and & stay.
    Source: BLIP's `pre_caption`, as in VLDD and LoRS.
    """
    text = re.sub(r'[.!"()*#:;~]', " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


class Pictures(Protocol):
    """Where a split's images come from, (B, 3, s, s) uint8; `indices` is a long tensor of B."""

    def plain(self, indices: Tensor) -> Tensor:
        """The images as for testing, on the CPU."""

    def whole(self) -> Tensor:
        """All images as for testing, not copied."""

    def augmented(self, indices: Tensor, rng: torch.Generator, device: torch.device | str) -> Tensor:
        """The images after the train transform, on `device`; all chance comes from `rng`."""

    def prepare(self) -> None:
        """Have at hand what `augmented` reads."""


@dataclass(frozen=True)
class Annotations:
    """Captions and the images they describe.

    captions  C cleaned texts
    image_of  for each caption, the index of its image
    paths     the images, as the annotations name them
    """

    captions: list[str]
    image_of: list[int]
    paths: list[str]

    def first(self, images: int) -> Annotations:
        """Only the first so many images and their captions."""
        kept = [(text, image) for text, image in zip(self.captions, self.image_of, strict=True) if image < images]
        return Annotations([text for text, _ in kept], [image for _, image in kept], self.paths[:images])


class CaptionSplit:
    """One split of a captioned data set.

    name         train, val or test
    captions     C cleaned texts, in reading order
    image_of     (C,) long, the image of each caption
    captions_of  for each image, the indices of its captions
    paths        the images, as the annotations name them
    """

    def __init__(
        self, name: str, notes: Annotations, pictures: Pictures, augment: bool, device: torch.device | str
    ) -> None:
        self.name, self.captions, self.paths = name, notes.captions, notes.paths
        self.image_of = torch.tensor(notes.image_of, dtype=torch.long)
        self.captions_of: list[list[int]] = [[] for _ in notes.paths]
        for caption, image in enumerate(notes.image_of):
            self.captions_of[image].append(caption)
        self._pictures, self._augment, self._device = pictures, augment, device

    @property
    def num_images(self) -> int:
        return len(self.paths)

    def decode(self, training: bool = False) -> None:
        """Have all images as for testing, or else as for training, at hand; files are decoded once, into a cache."""
        if training and self._augment:
            self._pictures.prepare()
        else:
            self._pictures.whole()

    def eval_images(self, indices: Tensor) -> Tensor:
        """Images (B, 3, s, s) float32, normalised, on the split's device: squashed to a square, nothing random.

        indices  (B,) long, repeats allowed
        """
        return normalise(moved(self._pictures.plain(indices.cpu()), self._device))

    def train_images(self, indices: Tensor, rng: torch.Generator) -> Tensor:
        """Images (B, 3, s, s) float32, normalised, on the split's device, after the train transform.

        indices  (B,) long, repeats allowed: each occurrence is transformed anew
        rng      a CPU generator, the only chance: an equal one gives equal images
        """
        if not self._augment:
            return self.eval_images(indices)
        return normalise(self._pictures.augmented(indices.cpu(), rng, self._device).to(self._device))


def normalise(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) uint8 as float32 with CLIP's channel statistics."""
    factor, offset = _affine(images.device)
    scaled = images.to(torch.float32, memory_format=torch.contiguous_format)
    return scaled.mul_(factor).sub_(offset)


@cache
def _affine(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    return 1 / (255 * std), mean / std


@dataclass
class PairData:
    """A captioned data set; each split is read when it is first asked for.

    name       the data set
    read       split name → its annotations
    pictures   split name, annotations → its images
    augment    whether `train_images` applies the train transform
    mean, std  (3, 1, 1) on the device: `images * std + mean` is within 0 and 1
    """

    name: str
    read: Callable[[str], Annotations]
    pictures: Callable[[str, Annotations], Pictures]
    augment: bool
    device: torch.device | str
    _splits: dict[str, CaptionSplit] = field(default_factory=dict, repr=False)

    @cached_property
    def train(self) -> CaptionSplit:
        return self._split("train")

    @cached_property
    def val(self) -> CaptionSplit:
        return self._split("val")

    @cached_property
    def test(self) -> CaptionSplit:
        return self._split("test")

    @property
    def mean(self) -> Tensor:
        return torch.tensor(MEAN, device=self.device).view(3, 1, 1)

    @property
    def std(self) -> Tensor:
        return torch.tensor(STD, device=self.device).view(3, 1, 1)

    def fingerprint(self, split: str) -> str:
        """A digest of a split's captions and of which image each describes; equal for equal annotations anywhere."""
        part: CaptionSplit = getattr(self, split)
        return digest(part.captions, part.image_of, part.paths)

    def _split(self, name: str) -> CaptionSplit:
        notes = self.read(name)
        split = CaptionSplit(name, notes, self.pictures(name, notes), self.augment, self.device)
        for other in self._splits.values():
            shared = set(split.paths) & set(other.paths)
            if shared:
                warnings.warn(
                    f"{self.name}: {len(shared)} images are in both {other.name} and {name}, such as {min(shared)}",
                    stacklevel=3,
                )
        self._splits[name] = split
        return split


@dataclass(frozen=True)
class Published:
    """Where a published data set is to be had, for the error that says it is not here."""

    pattern: str  # the annotation file of a split
    annotations: str  # its address
    images: str


FLICKR = Published(
    "flickr30k_{split}.json",
    "https://storage.googleapis.com/sfr-vision-language-research/datasets/flickr30k_{split}.json",
    "https://www.kaggle.com/datasets/hsankesara/flickr-image-dataset",
)
COCO = Published(
    "coco_karpathy_{split}.json",
    "https://storage.googleapis.com/sfr-vision-language-research/datasets/coco_karpathy_{split}.json",
    "https://cocodataset.org/#download",
)


def files_data(cfg: DataConfig, device: torch.device | str, published: Published | None) -> PairData:
    """A data set of annotation files and image files.

    published  the names of its files; None finds the one `*_<split>.json` in `ann_root`
    """

    def read(split: str) -> Annotations:
        notes = read_annotations(annotation_file(cfg.ann_root, split, published), split)
        return notes.first(cfg.train_limit) if split == "train" and cfg.train_limit else notes

    def pictures(split: str, notes: Annotations) -> Pictures:
        from data.cache import ImageFiles

        source = annotation_file(cfg.ann_root, split, published)
        files = image_files(cfg.image_root, notes.paths, published)
        return ImageFiles(files, cfg.image_size, Path(cfg.cache_dir) / "images", cfg.threads, split, source)

    return PairData(cfg.dataset, read, pictures, not cfg.no_aug, device)


def annotation_file(root: str, split: str, published: Published | None) -> Path:
    """The annotation file of a split; UserError says what is missing and where it can be had."""
    wanted = published.pattern.format(split=split) if published else f"*_{split}.json"
    if not root:
        raise UserError(f"no annotation folder; give --ann_root, the folder with {wanted} (or try --dataset toy)")
    if not Path(root).is_dir():
        raise UserError(f"no annotation folder {root}; correct --ann_root, the folder with {wanted}")
    if published:
        file = Path(root) / wanted
        if not file.is_file():
            address = published.annotations.format(split=split)
            raise UserError(f"no {split} annotations at {file}; fetch {address} into {root}")
        return file
    found = [path for path in sorted(Path(root).glob("*.json")) if re.fullmatch(rf"(.*[_-])?{split}", path.stem)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"--ann_root {root} needs one {wanted} with the {split} annotations; found {names}")
    return found[0]


def read_annotations(path: Path, split: str) -> Annotations:
    """The captions in an annotation file; UserError names the record (counted from 1) that is not as it should be."""
    records = read_json(path, f"{split} annotations")
    if not isinstance(records, list):
        raise UserError(f"{path} holds {type(records).__name__}, not a list of records; fetch it again")
    if not records:
        raise UserError(f"{path} is an empty list; fetch it again")
    reader = _Reader(path)
    for number, record in enumerate(records, 1):
        (reader.caption_record if split == "train" else reader.image_record)(record, f"record {number} of {path}")
    return Annotations(reader.captions, reader.image_of, reader.paths)


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.captions: list[str] = []
        self.image_of: list[int] = []
        self.paths: list[str] = []
        self.index: dict[str | int, int] = {}  # image_id → image

    def caption_record(self, record: Any, where: str) -> None:
        image, caption = self._fields(record, where)
        if isinstance(caption, list):
            raise UserError(
                f"{where} has a list of captions, as val and test files do; "
                "a train file has one caption and an image_id a record"
            )
        if "image_id" not in record:
            raise UserError(f"{where} has no 'image_id'; a train file needs one to tell which captions share an image")
        key = record["image_id"]
        if not isinstance(key, (str, int)):
            raise UserError(f"{where} has the image_id {key!r}; it must be text or a whole number")
        index = self.index.setdefault(key, len(self.paths))
        if index == len(self.paths):
            self.paths.append(image)
        elif self.paths[index] != image:
            raise UserError(f"{where} gives image_id {key!r} to {image}, an earlier one to {self.paths[index]}")
        self._add(caption, index, where)

    def image_record(self, record: Any, where: str) -> None:
        image, captions = self._fields(record, where)
        if isinstance(captions, str):
            raise UserError(
                f"{where} has a single caption, as train files do; a val or test file has a list of them a record"
            )
        if not isinstance(captions, list) or not captions:
            raise UserError(f"{where} has no captions ({captions!r}); drop the record or give it some")
        self.paths.append(image)
        for caption in captions:
            self._add(caption, len(self.paths) - 1, where)

    def _fields(self, record: Any, where: str) -> tuple[str, Any]:
        if not isinstance(record, dict):
            raise UserError(f"{where} is {type(record).__name__}, not an object with 'image' and 'caption'")
        for key in ("image", "caption"):
            if key not in record:
                raise UserError(f"{where} has no '{key}'; it has {', '.join(record) or 'nothing'}")
        image = record["image"]
        if not isinstance(image, str) or not image:
            raise UserError(f"{where} has the image {image!r}; it must be a path below the image folder")
        if not is_below(image):
            raise UserError(f"{where} has the image {image!r}, which is not below the image folder; correct the path")
        return image, record["caption"]

    def _add(self, caption: Any, image: int, where: str) -> None:
        if not isinstance(caption, str) or not is_utf8(caption):
            raise UserError(f"{where} has the caption {caption!r}; it must be text")
        self.captions.append(clean_caption(caption))
        self.image_of.append(image)


def image_files(root: str, paths: list[str], published: Published | None) -> list[Path]:
    """Each image's file. Archives unpack in several ways; the way that has the first image is taken for all."""
    source = f"; the images are at {published.images}" if published else ""
    if not root:
        raise UserError(f"no image folder; give --image_root, the folder that holds {paths[0]}{source}")
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"no image folder {root}; correct --image_root, the folder that holds {paths[0]}{source}")
    layouts: tuple[Callable[[str], Path], ...] = (
        lambda path: folder / path,
        lambda path: folder / "flickr30k_images" / "flickr30k_images" / PurePosixPath(path).name,  # Kaggle's archive
        lambda path: folder / "flickr30k_images" / PurePosixPath(path).name,
        lambda path: folder / PurePosixPath(path).name,
    )
    chosen = next((layout for layout in layouts if layout(paths[0]).is_file()), layouts[0])
    return [chosen(path) for path in paths]
