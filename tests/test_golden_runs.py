"""Runs that an earlier toolkit left unfinished are gone on with, those of a later one refused: through the scripts, for
the files that a run keeps of its own state."""

import shutil
from pathlib import Path

import pytest
import torch

from methods.core.trajectories import open_trajectories
from tests.conftest import contents, works
from tests.golden.make import BEGUN, CLASSES, EXPERTS, FEW, LEARN, write_data
from utils.files import load_tensors, save_tensors

FIRST = Path(__file__).parent / "golden" / "1"
STORE = Path("begun/npz/ConvNetD1W4")
DISTILL = ("--method", "mtt", *CLASSES, *LEARN, *FEW, "--ipc", "1", "--buffer_path", "experts", "--save_dir", "o")
pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(autouse=True)
def data(own_folder) -> None:
    write_data(Path("data.npz"))


def newer(path: Path) -> None:
    state = load_tensors(path, "state")
    save_tensors(path, state | {"format": state.get("format", 1) + 1})


def refused_as_newer(refused, verb: str, path: Path, *flags: str) -> None:
    newer(path)
    before = contents(Path())
    line = refused(verb, *flags, "--resume")
    assert f"{path} is of format 2, newer than this 1; update the toolkit" in line
    assert contents(Path()) == before


def test_experts_in_progress(refused):
    """`progress.pt` of format 1: the second epoch ends where it does when nothing came between."""
    shutil.copytree(FIRST / "begun", "begun")
    assert load_tensors(STORE / "expert_000/progress.pt", "state")["format"] == 1
    works("buffer", *BEGUN, "--resume")
    works("buffer", *BEGUN, "--buffer_path", "whole")
    found, whole = (open_trajectories(path, ("net",)) for path in (STORE, Path("whole/npz/ConvNetD1W4")))
    assert found.epochs(0) == whole.epochs(0) == [0, 1, 2]
    for epoch in range(3):
        torch.testing.assert_close(found.read(0, epoch)["net"], whole.read(0, epoch)["net"])
    assert not list(STORE.rglob("progress.pt"))


def test_experts_in_progress_of_a_newer_format(refused):
    shutil.copytree(FIRST / "begun", "begun")
    refused_as_newer(refused, "buffer", STORE / "expert_000/progress.pt", *BEGUN)


@pytest.fixture
def distilled(own_folder) -> Path:
    """A run of distill.py of one step, and its checkpoint."""
    works("buffer", "--method", "mtt", *CLASSES, *EXPERTS, "--buffer_path", "experts")
    works("distill", *DISTILL)
    return Path("o/checkpoint.pt")


def test_a_run_of_distill(distilled):
    """`checkpoint.pt` of format 1: a run goes on from its images."""
    shutil.copy(FIRST / "images_checkpoint.pt", distilled)
    works("distill", *DISTILL, "--iterations", "2", "--resume")
    state, first = (load_tensors(path, "state") for path in (distilled, FIRST / "images_checkpoint.pt"))
    assert state["step"] == 2 and state["format"] == 1 and first["step"] == 1
    assert not torch.equal(state["learned"]["images"], first["learned"]["images"])
    assert "format" not in first  # it is of the first days


def test_a_run_of_distill_of_a_newer_format(refused, distilled):
    refused_as_newer(refused, "distill", distilled, *DISTILL, "--iterations", "2")
