"""Small worlds that the tests of this folder share: the toy set with tiny towers, and a run to hang things on."""

from dataclasses import dataclass

import pytest
import torch

from data.captions import DataConfig
from methods.core.retrieval import Corpus
from methods.lors import Similarity
from methods.pair_files import read_phases
from methods.pairs import PairsConfig, Phase, SyntheticPairs
from networks.towers import TowerConfig
from utils.config import option, section
from utils.run import Run, RunConfig

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pairs(*counts: int, size: int = 4, width: int = 5, seed: int = 0, clamp: bool = False, **options) -> SyntheticPairs:
    """Random pairs, `counts` in each phase (none given: six in one)."""
    cfg, rng = PairsConfig(**{"num_pairs": counts or (6,), "sim_rank": 2} | options), generator(seed)
    phases = []
    for count in cfg.num_pairs:
        images, texts = torch.randn(count, 3, size, size, generator=rng), torch.randn(count, width, generator=rng)
        similarity = Similarity(cfg.sim_type, count, cfg.sim_rank, cfg.alpha, rng, CPU, clamp)
        phases.append(Phase(images, texts, similarity, cfg))
    return SyntheticPairs(phases, cfg)


def everything(learned: SyntheticPairs) -> list[torch.Tensor]:
    """Copies of all pixels, embeddings and rates."""
    return [
        part.detach().clone() for phase in learned.phases for part in (phase.images, phase.texts, *phase.lr.values())
    ]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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


def load_pairs(path, device):
    """The phases in a distilled file, to train on, and what was noted with them."""
    phases, noted = read_phases(path)
    return [phase.pair_set(device) for phase in phases], noted
