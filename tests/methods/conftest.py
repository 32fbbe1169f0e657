"""Small worlds that the tests of this folder share: the toy set with tiny towers, and a run to hang things on."""

from dataclasses import dataclass

import pytest
import torch

from data.captions import DataConfig
from methods.core.retrieval import Corpus
from networks.towers import TowerConfig
from utils.config import option, section
from utils.run import Run, RunConfig


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """96 drawn training images of 16 pixels (200 in val and in test), a small ConvNet, embeddings of 16 numbers."""
    data = DataConfig(dataset="toy", image_size=16, toy_images=96, cache_dir=str(tmp_path_factory.mktemp("cache")))
    towers = TowerConfig(image_encoder="ConvNetD2W8", text_encoder="tfidf", text_dim=16, joint_width=32)
    return Corpus(data, towers, torch.device("cpu"))


@dataclass(frozen=True)
class Command:
    """The least that a run asks of a command's config."""

    method: str = option("vldd", "the system")
    run: RunConfig = section(RunConfig)


@pytest.fixture
def open_run(tmp_path):
    """`open_run(name, resume=False)`: a run in its own folder."""

    def make(name="run", resume=False, seed=0):
        command = Command(run=RunConfig(device="cpu", resume=resume, seed=seed))
        return Run(tmp_path / name, command, "distill", "--save_dir")

    return make
