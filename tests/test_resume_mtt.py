"""Image distillation that was interrupted in the middle of a step ends with the very numbers of one that was not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.images import ImageSplit
from methods import mtt
from methods.command import command
from tests.conftest import contents, plain

DATA = ("--dataset", "npz", "--model", "ConvNetD1W8", "--device", "cpu")
EXPERTS = ("--num_experts", "4", "--train_epochs", "3", "--batch_train", "8", "--mom", "0.5", "--lr_teacher", "0.05")
LEARN = ("--syn_steps", "2", "--expert_epochs", "1", "--max_start_epoch", "2", "--lr_img", "10", "--lr_teacher", "0.02")
LEARN = (*LEARN, "--iterations", "8", "--eval_it", "4", "--checkpoint_every", "3", "--num_eval", "2")
LEARN = (*LEARN, "--epoch_eval_train", "2")
KINDS = {
    "hard": ("--batch_syn", "4", "--ipc", "2"),
    "grown": (
        *("--Sequential_Generation", "--current_max_start_epoch", "1", "--expansion_end_epoch", "6"),
        *("--lr_img", "3000", "--threshold", "0.9", "--labels", "learned", "--ema_decay", "0.8", "--lr_y", "2"),
        *("--pix_init", "samples_predicted_correctly", "--select", "test"),
    ),
    "teacher": ("--labels", "teacher", "--mode", "detached", "--load_all"),
    "texture": ("--texture", "--canvas_samples", "2", "--select", "last", "--no_aug"),
    "whitened": ("--zca", "--dsa", "false"),
}


def write_data(path: Path, **changes) -> None:
    """Thirty images of 8 x 8 in three classes that can be told apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    images = (rng.integers(0, 80, (30, 8, 8, 3)) + 80 * labels[:, None, None, None]).astype(np.uint8)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images[:9], "test_labels": labels[:9]}
    np.savez(path, **arrays | changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The data, and four experts in `world / plain` and `world / whitened`; nobody writes here."""
    root = tmp_path_factory.mktemp("world")
    write_data(root / "data.npz")
    for name, flags in (("plain", ()), ("whitened", ("--zca", "--dsa", "false"))):
        run("buffer", root, *EXPERTS, *flags, "--buffer_path", root / name)
    return root


def run(verb: str, world: Path, *flags: object, code: int = 0) -> None:
    places = ("--data_path", world / "data.npz", "--cache_dir", world / "cache")
    words = [*DATA, *places, *flags]  # a later flag wins
    assert command(verb, [str(word) for word in words]) == code


def distill(world: Path, kind: str, folder: Path, *more: object, code: int = 0) -> Path:
    buffers = world / ("whitened" if kind == "whitened" else "plain")
    flags = (*LEARN, *KINDS[kind], "--buffer_path", buffers, "--save_dir", folder, *more)
    run("distill", world, *flags, code=code)
    return folder


def learned(folder: Path) -> tuple:
    """All that a distillation leaves, apart from where it lies."""
    tensors = {path.name: plain(torch.load(path, weights_only=True)) for path in sorted(folder.glob("*.pt"))}
    pictures = {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}
    return tensors, pictures, (folder / "log.jsonl").read_text()


def experts(folder: Path) -> tuple:
    """All that a buffer holds, apart from where it lies."""
    snapshots = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
    (leaf,) = (path.parent for path in folder.rglob("manifest.json"))
    return snapshots, json.loads((leaf / "manifest.json").read_text())["experts"], (leaf / "log.jsonl").read_text()


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(place, name, n): the n-th call of `place.name` is interrupted half-way, once; 0: none is any more."""

    def arm(place, name, number):
        monkeypatch.undo()
        left, real = [number], getattr(place, name)

        def call(*args, **options):
            left[0] -= 1
            done = real(*args, **options)
            if left[0] == 0:
                raise KeyboardInterrupt
            return done

        if number:
            monkeypatch.setattr(place, name, call)

    return arm


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_interrupted_in_a_step(world, tmp_path, interrupt, kind):
    """In steps 1 (of which no checkpoint is left), 5 and 7, and in an evaluation."""
    whole = learned(distill(world, kind, tmp_path / "whole"))
    cut = tmp_path / "cut"
    for place, name, number in (
        (mtt, "match", 2),
        (mtt, "match", 6),
        (mtt.AccuracyJudge, "sets", 1),
        (mtt, "match", 4),
    ):
        interrupt(place, name, number)
        distill(world, kind, cut, "--resume", code=130)
        assert not (cut / "distilled_8.pt").exists()
    interrupt(mtt, "match", 0)
    distill(world, kind, cut, "--resume")
    assert learned(cut) == whole
    log = [json.loads(line) for line in whole[2].splitlines()]
    assert sum("loss" in row for row in log) == 8 and {row["step"] for row in log} == set(range(9))


def test_what_the_kinds_were_to_show(world, tmp_path):
    """That steps are skipped, the window grows and labels move, or the test above shows nothing of them."""
    folder = distill(world, "grown", tmp_path / "g", "--iterations", "12")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert any("skipped" in row for row in log) and any("skipped" not in row for row in log if "loss" in row)
    starts = [row["start_epoch"] for row in log if "loss" in row]
    assert set(starts) == {0, 1} and set(starts[:6]) == {0}
    first, last = (torch.load(folder / f"distilled_{step}.pt", weights_only=True) for step in (0, 12))
    assert not torch.equal(first["labels"], last["labels"])
    assert not torch.equal(last["average"], last["images"])


def test_experts_may_move_but_not_be_others(world, tmp_path, capsys):
    """Between a run and its resumption: the same experts elsewhere, then experts of another seed in their place."""
    folder = distill(world, "hard", tmp_path / "run", "--iterations", "2")
    shutil.copytree(world / "plain", tmp_path / "moved")
    distill(world, "hard", folder, "--resume", "--buffer_path", tmp_path / "moved")
    whole = distill(world, "hard", tmp_path / "whole")
    again, once = (torch.load(place / "distilled_8.pt", weights_only=True)["images"] for place in (folder, whole))
    assert torch.equal(again, once)
    run("buffer", world, *EXPERTS, "--seed", 1, "--buffer_path", tmp_path / "others")
    capsys.readouterr()
    distill(world, "hard", folder, "--resume", "--iterations", "9", "--buffer_path", tmp_path / "others", code=2)
    assert "holds a run on another expert_set" in capsys.readouterr().err


@pytest.mark.parametrize("together", [1, 3])
def test_experts_interrupted_in_an_epoch(world, tmp_path, interrupt, together):
    """Three batches an epoch, with a score after each; four experts, in companies of one, or of three and one."""
    flags = (*EXPERTS, "--together", together, "--buffer_path")
    run("buffer", world, *flags, tmp_path / "whole")
    for number in (5, 14, 9, 20):
        interrupt(ImageSplit, "images", number)
        run("buffer", world, *flags, tmp_path / "cut", "--resume", code=130)
    interrupt(ImageSplit, "images", 0)
    run("buffer", world, *flags, tmp_path / "cut", "--resume")
    assert experts(tmp_path / "cut") == experts(tmp_path / "whole")
    assert not list((tmp_path / "cut").rglob("progress.pt"))


def test_the_whitening_is_that_of_the_experts(world, tmp_path, monkeypatch):
    """A resumed run fits none anew, nor does a distillation with another cache."""
    monkeypatch.setattr("data.images.fit_zca", lambda *args: pytest.fail("fitted anew"))
    flags = (*EXPERTS, *KINDS["whitened"], "--resume", "--num_experts", "4", "--cache_dir", tmp_path / "c")
    run("buffer", world, *flags, "--buffer_path", world / "whitened")
    distill(world, "whitened", tmp_path / "o", "--cache_dir", tmp_path / "c")


def test_resuming_what_is_finished_changes_nothing(world, tmp_path):
    folder = distill(world, "hard", tmp_path / "o")
    before = learned(folder), experts(world / "plain")
    distill(world, "hard", folder, "--resume")
    run("buffer", world, *EXPERTS, "--buffer_path", world / "plain", "--resume")
    assert (learned(folder), experts(world / "plain")) == before


def test_more_iterations_equal_a_longer_run(world, tmp_path):
    whole = learned(distill(world, "grown", tmp_path / "whole"))
    distill(world, "grown", tmp_path / "o", "--iterations", "4")
    assert learned(distill(world, "grown", tmp_path / "o", "--resume"))[0] == whole[0]


def test_more_experts_leave_the_old_ones_alone(world, tmp_path):
    run("buffer", world, *EXPERTS, "--num_experts", "2", "--buffer_path", tmp_path)
    old = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    run("buffer", world, *EXPERTS, "--buffer_path", tmp_path, "--resume")
    assert experts(tmp_path) == experts(world / "plain") and len(old) == 8
    assert {path: path.stat().st_mtime_ns for path in old} == old


@pytest.fixture(scope="module")
def begun(world, tmp_path_factory):
    return distill(world, "hard", tmp_path_factory.mktemp("begun") / "o", "--iterations", "1")


@pytest.fixture
def finished(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "o")
    return tmp_path / "o"


class TestRefused:
    @pytest.mark.parametrize(
        "flags, says",
        [
            (("--syn_steps", "3"), "syn_steps was 2, is 3"),
            (("--ipc", "1"), "ipc was 2, is 1"),
            (("--labels", "learned"), "labels was 'hard', is 'learned'"),
            (("--ema_decay", "0.9"), "ema_decay was 0.0, is 0.9"),
            (("--seed", "1"), "seed was 0, is 1"),
            (("--holdout", "0.2"), "holdout was 0.1, is 0.2"),
            (("--zca",), "zca was False, is True"),
        ],
    )
    def test_other_options(self, world, finished, capsys, flags, says):
        before = contents(finished)
        capsys.readouterr()
        distill(world, "hard", finished, "--resume", *flags, code=2)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert says in line and "choose another --save_dir" in line and contents(finished) == before

    def test_other_options_of_experts(self, world, capsys):
        before = contents(world / "plain")
        capsys.readouterr()
        flags = ("--resume", "--buffer_path", world / "plain", "--lr_teacher", "0.1", "--train_epochs", "4")
        run("buffer", world, *EXPERTS, *flags, code=2)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "lr_teacher was 0.05, is 0.1" in line and "train_epochs was 3, is 4" in line
        assert contents(world / "plain") == before

    @pytest.mark.parametrize("change", ["pixel", "label"])
    def test_other_training_data(self, world, finished, tmp_path, capsys, change):
        """The same shapes, one number changed."""
        found = dict(np.load(world / "data.npz"))
        labels, images = found["train_labels"], found["train_images"]
        if change == "pixel":
            images[:, 0, 0, 0] ^= 1
        else:
            labels[[0, 1]] = labels[[1, 0]]
        write_data(tmp_path / "other.npz", train_images=images, train_labels=labels)
        before = contents(finished), contents(world / "plain")
        capsys.readouterr()
        distill(world, "hard", finished, "--resume", "--data_path", tmp_path / "other.npz", code=2)
        assert "learned other images than those of --data_path" in capsys.readouterr().err
        flags = (*EXPERTS, "--resume", "--num_experts", "5", "--data_path", tmp_path / "other.npz")
        run("buffer", world, *flags, "--buffer_path", world / "plain", code=2)
        assert "holds a run on another training_set" in capsys.readouterr().err
        assert (contents(finished), contents(world / "plain")) == before

    def test_other_training_data_with_published_experts(self, world, tmp_path, capsys):
        """They note nothing, but the run does."""
        run("buffer", world, *EXPERTS, "--buffer_path", world / "plain", "--export", tmp_path / "published")
        flags = ("--buffer_path", tmp_path / "published", "--iterations", "4")
        distill(world, "hard", tmp_path / "o", *flags)
        before = contents(tmp_path / "o")
        write_data(tmp_path / "other.npz", train_labels=(np.arange(30) + 1) % 3)
        flags = ("--buffer_path", tmp_path / "published", "--data_path", tmp_path / "other.npz")
        distill(world, "hard", tmp_path / "o", "--resume", *flags, code=2)
        assert "holds a run on another training_set" in capsys.readouterr().err
        assert contents(tmp_path / "o") == before


def test_moved_data_may_be_resumed_with(world, tmp_path):
    distill(world, "hard", tmp_path / "o", "--iterations", "2")
    shutil.copy(world / "data.npz", tmp_path / "moved.npz")
    distill(world, "hard", tmp_path / "o", "--resume", "--data_path", tmp_path / "moved.npz")
