"""Data sets by name. Nothing is read, decoded or downloaded before it is asked for."""

from __future__ import annotations

import torch

from data import photographs, sources
from data.captions import COCO, FLICKR, DataConfig, PairData, files_data
from data.images import ImageData, ImagesConfig
from data.zca import ZCA
from utils.registry import Registry

CAPTIONED = Registry("dataset")


@CAPTIONED("flickr", "flickr30k")
def _flickr(cfg: DataConfig, device: torch.device | str) -> PairData:
    return files_data(cfg, device, FLICKR)


@CAPTIONED("coco")
def _coco(cfg: DataConfig, device: torch.device | str) -> PairData:
    return files_data(cfg, device, COCO)


@CAPTIONED("folder")
def _folder(cfg: DataConfig, device: torch.device | str) -> PairData:
    return files_data(cfg, device, None)


@CAPTIONED("toy")
def _toy(cfg: DataConfig, device: torch.device | str) -> PairData:
    from data.toy import toy_data

    return toy_data(cfg, device)


def build_dataset(cfg: DataConfig, device: torch.device | str) -> PairData:
    """The data set that `cfg.dataset` names, its images delivered on `device`; UserError for an unknown name."""
    return CAPTIONED[cfg.dataset](cfg, device)


LABELLED = Registry("dataset")
LABELLED(*sources.FETCHED)(sources.fetched_source)
LABELLED("tiny", "tiny-imagenet-200")(photographs.tiny_source)
LABELLED("cub200", "cub-200", "cub")(photographs.cub_source)
LABELLED("imagenet")(photographs.imagenet_source)
LABELLED("folder")(photographs.folder_source)
LABELLED("npz")(sources.npz_source)
LABELLED("digits")(sources.digits_source)
LABELLED("toy")(sources.toy_source)


def build_images(cfg: ImagesConfig, device: torch.device | str, zca: ZCA | None = None) -> ImageData:
    """The labelled data set that `cfg.dataset` names (in any case), its images delivered on `device`.

    zca  a whitening to use, such as one that was saved with a result; None fits one if `cfg.zca` asks for it

    UserError for an unknown name.
    """
    return ImageData(LABELLED[cfg.dataset.lower()](cfg), cfg, device, zca)


def published_name(name: str) -> str:
    """A labelled data set's name, in any case and spelling, as its authors spell it; folders are called after it."""
    spelt = [kind.name for kind in sources.FETCHED.values()] + ["Tiny", "CUB200", "ImageNet"]
    known = {name.lower(): name for name in spelt}
    known |= {"tiny-imagenet-200": "Tiny", "cub-200": "CUB200", "cub": "CUB200"}
    return known.get(name.lower(), name.lower())


def list_datasets() -> list[str]:
    """Every name that `build_dataset` or `build_images` knows."""
    return sorted({*CAPTIONED.names(), *LABELLED.names()})


def is_captioned(name: str) -> bool:
    """Whether the data set `name` has captions."""
    return name in CAPTIONED


def is_labelled(name: str) -> bool:
    """Whether the data set `name`, in any case, has class labels; `folder` and `toy` come with captions as well."""
    return name.lower() in LABELLED
