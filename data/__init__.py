"""Data sets by name. Nothing is read, decoded or downloaded before it is asked for."""

from __future__ import annotations

import torch

from data.captions import COCO, FLICKR, DataConfig, PairData, files_data
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


def list_datasets() -> list[str]:
    """Every name that `build_dataset` knows."""
    return CAPTIONED.names()


def is_captioned(name: str) -> bool:
    """Whether the data set `name` has captions (rather than class labels)."""
    return name in CAPTIONED
