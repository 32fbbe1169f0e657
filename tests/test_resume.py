"""A run that was killed and resumed ends with the very numbers of one that was left alone."""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch

from methods.command import command
from tests.conftest import plain

WEIGHTS = ("--dataset", "toy", "--toy_images", "80", "--image_size", "8", "--image_encoder", "ConvNetD1W8")
TINY = (*WEIGHTS, "--text_encoder", "tfidf", "--text_dim", "16", "--device", "cpu", "--workers", "1")
EXPERTS = ("--num_experts", "2", "--train_epochs", "3", "--batch_size_train", "64", "--mom", "0.5")
PAIRS = ("--num_pairs", "6", "--syn_steps", "2", "--lr_img", "10", "--lr_txt", "10", "--lr_lr", "1e-6")
PAIRS = (*PAIRS, "--sim_type", "lowrank", "--sim_rank", "2", "--lr_sim", "0.1", "--loss_type", "WBCE")
JUDGED = ("--num_eval", "1", "--epoch_eval_train", "2", "--eval_it", "4", "--checkpoint_every", "3")


@pytest.fixture(scope="module")
def processes():
    """Processes that can be killed without harm and cost no import of torch each: forks of a clean, idle one."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    learned = ["sklearn.decomposition", "sklearn.feature_extraction.text"]
    late = ["torch._dynamo", "safetensors.torch", "PIL.Image", "data.toy", "networks.convnet"]
    context.set_forkserver_preload(["methods.vldd", *learned, *late])
    first = context.Process(target=int)  # the clean one is started with it
    first.start()
    first.join()
    return context


class Verb:
    """One verb with its flags, to be run, killed and resumed in folders of its own."""

    def __init__(self, processes, verb: str, place: str, flags: tuple[str, ...], cache: Path) -> None:
        self.processes, self.verb, self.place, self.wall = processes, verb, place, 0.0
        self.flags = [*TINY, *flags, "--cache_dir", str(cache)]

    def start(self, folder: Path, *more: str) -> multiprocessing.Process:
        flags = [*self.flags, f"--{self.place}", str(folder), *more]
        process = self.processes.Process(target=command, args=(self.verb, flags))
        process.start()
        return process

    def finish(self, folder: Path, *more: str) -> Path:
        began = time.monotonic()
        process = self.start(folder, *more)
        process.join(120)
        assert process.exitcode == 0
        self.wall = self.wall or time.monotonic() - began
        return folder

    def kill(self, folder: Path, share: float, *more: str) -> None:
        """`kill -9` after this share of the time that a whole run takes."""
        process = self.start(folder, "--resume", *more)
        process.join(share * self.wall)
        process.kill()
        process.join()


def leaf(folder: Path) -> Path:
    return folder / "toy" / "ConvNetD1W8" / "tfidf"


def snapshots(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def experts(folder: Path) -> tuple:
    """All that a buffer holds, apart from where it lies."""
    manifest = json.loads((leaf(folder) / "manifest.json").read_text())
    return snapshots(folder), manifest["experts"], (leaf(folder) / "log.jsonl").read_text()


def learned(folder: Path) -> tuple:
    """All that a distillation leaves, apart from where it lies."""
    tensors = {path.name: plain(torch.load(path, weights_only=True)) for path in sorted(folder.glob("distilled_*.pt"))}
    pictures = {path.name: path.read_bytes() for path in sorted(folder.glob("*synthetic_*"))}
    return tensors, pictures, (folder / "log.jsonl").read_text()


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("progress.pt")]


@pytest.fixture(scope="module")
def buffer(processes, tmp_path_factory) -> Verb:
    return Verb(processes, "buffer", "buffer_path", EXPERTS, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def buffers(buffer, tmp_path_factory) -> Path:
    return buffer.finish(tmp_path_factory.mktemp("whole") / "buffers")


@pytest.fixture(scope="module")
def distill(processes, buffer, buffers) -> Verb:
    flags = (*PAIRS, *JUDGED, "--buffer_path", str(buffers))
    return Verb(processes, "distill", "save_dir", flags, Path(buffer.flags[-1]))


@pytest.fixture(scope="module")
def whole(distill, tmp_path_factory) -> Path:
    return distill.finish(tmp_path_factory.mktemp("whole") / "run", "--iterations", "12")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_buffer_ends_with_the_same_experts(buffer, buffers, tmp_path, seed):
    moments = random.Random(seed)
    for _ in range(3):
        buffer.kill(tmp_path / "b", moments.uniform(0.1, 0.7))
    buffer.finish(tmp_path / "b", "--resume")
    assert experts(tmp_path / "b") == experts(buffers)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_distillation_ends_with_the_same_pairs(distill, whole, tmp_path, seed):
    moments = random.Random(seed)
    for _ in range(3):
        distill.kill(tmp_path / "run", moments.uniform(0.2, 0.8), "--iterations", "12")
    distill.finish(tmp_path / "run", "--resume", "--iterations", "12")
    assert learned(tmp_path / "run") == learned(whole)


class Died(BaseException):
    """Stands for a kill at an exact place; nothing may catch it."""


@pytest.fixture
def die_after(monkeypatch):
    """die_after(n): n/2 files are moved into place, and then all is over; half a file is one that was only written."""

    def arm(halves: int) -> None:
        left = [halves]

        def replace(old, new):
            if left[0] < 1:
                raise Died
            os.rename(old, new)
            left[0] -= 2
            if left[0] == -1:
                raise Died

        monkeypatch.setattr("utils.files.os.replace", replace)

    yield arm


def test_distillation_that_dies_at_any_file(distill, whole, tmp_path, die_after):
    flags = [*distill.flags, "--save_dir", str(tmp_path), "--iterations", "12", "--resume"]
    for halves in (1, 6, 9, 12, 15, 16, 17, 19, 22):
        die_after(halves)
        with pytest.raises(Died):
            command("distill", flags)
    die_after(1000)
    assert command("distill", flags) == 0
    assert learned(tmp_path) == learned(whole)


def test_buffer_that_dies_at_any_file(buffer, buffers, tmp_path, die_after):
    flags = [*buffer.flags, "--buffer_path", str(tmp_path), "--resume"]
    for halves in (1, 3, 4, 5, 7, 8, 9, 11, 12):
        die_after(halves)
        with pytest.raises(Died):
            command("buffer", flags)
    die_after(1000)
    assert command("buffer", flags) == 0
    assert experts(tmp_path) == experts(buffers)
    assert not leftovers(tmp_path)


def test_expert_starts_again_where_its_state_is_gone(buffer, buffers, tmp_path):
    buffer.kill(tmp_path, 0.6)
    for path in tmp_path.rglob("progress.pt"):
        path.unlink()
    buffer.finish(tmp_path, "--resume")
    assert experts(tmp_path) == experts(buffers)


def test_resuming_what_is_finished_changes_nothing(buffer, buffers, distill, whole):
    before = experts(buffers), learned(whole)
    buffer.finish(buffers, "--resume")
    distill.finish(whole, "--resume", "--iterations", "12")
    assert (experts(buffers), learned(whole)) == before


def test_more_iterations_equal_a_longer_run(distill, whole, tmp_path):
    distill.finish(tmp_path, "--iterations", "8")
    distill.finish(tmp_path, "--iterations", "12", "--resume")
    assert learned(tmp_path) == learned(whole)


def test_more_experts_leave_the_old_ones_alone(buffer, buffers, tmp_path):
    buffer.finish(tmp_path, "--num_experts", "1")
    old = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    buffer.finish(tmp_path, "--num_experts", "2", "--resume")
    assert experts(tmp_path) == experts(buffers)
    assert {path: path.stat().st_mtime_ns for path in old} == old
