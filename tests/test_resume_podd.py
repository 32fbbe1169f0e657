"""A poster whose distillation was killed in the middle of a step ends with the very numbers of one that was not."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data.zca import ZCA
from methods import podd, poster_gallery, poster_window
from methods.command import command
from tests.conftest import contents, plain
from tests.test_resume_mtt import write_data
from utils.files import read_json, write_json

DATA = (
    *("--method", "podd", "--dataset", "npz", "--model", "ConvNetD1W4", "--device", "cpu", "--order", "table"),
    *("--poster_width", "18", "--poster_height", "10", "--patch_num_x", "4", "--patch_num_y", "2"),
    *("--poster_class_num_x", "3", "--poster_class_num_y", "1"),
)
LEARN = (
    *("--batch_size", "10", "--window", "2", "--totwindow", "6", "--distill_batch_size", "5", "--lr", "0.02"),
    *("--inner_lr", "0.02", "--max_outer_steps", "9", "--test_freq", "1", "--checkpoint_every", "2"),
    *("--num_eval", "2", "--eval_steps", "2,4"),
)
KINDS = {
    "fixed": ("--zca",),
    "learned": ("--train_y", "--train_lr", "--start_per", "step", "--select", "train"),
    "plateau": ("--cctype", "1", "--train_y", "--select", "last", "--syn_strategy", "color_crop_cutout_scale"),
    "longer": ("--cctype", "3", "--inner_optim", "SGD", "--decay", "--select", "test", "--label_mode", "area"),
    "unrolled": ("--cctype", "0", "--mode", "unroll", "--comp_aug", "--poster_init", "real"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Thirty images in three classes; nobody writes here."""
    root = tmp_path_factory.mktemp("world")
    write_data(root / "data.npz")
    return root


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """A plateau is an epoch long, or no test would see the window move. There is no page: nothing is resumed from it,
    and its charts take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(poster_window, "PLATEAU", 1)
        patch.setattr(poster_gallery, "refresh_page", lambda folder: None)
        yield


def distill(world: Path, kind: str, folder: Path, *more: object, code: int = 0) -> Path:
    places = ("--data_path", world / "data.npz", "--cache_dir", world / "cache", "--save_dir", folder)
    words = [*DATA, *LEARN, *KINDS[kind], *places, *more]  # a later flag wins
    assert command("distill", [str(word) for word in words]) == code
    return folder


def learned(folder: Path) -> tuple:
    """All that a distillation leaves, apart from where it lies."""
    tensors = {path.name: plain(torch.load(path, weights_only=True)) for path in sorted(folder.glob("*.pt"))}
    files = [
        path
        for pattern in ("*.png", "*.gif", "order.json", "inputs.json", "log.jsonl")
        for path in folder.glob(pattern)
    ]
    return tensors, {path.name: path.read_bytes() for path in sorted(files)}


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def interrupt():
    """interrupt(place, name, n): the n-th call of `place.name` is interrupted when it is done, once."""
    patch = pytest.MonkeyPatch()

    def arm(place, name, number):
        patch.undo()
        left, real = [number], getattr(place, name)

        def call(*args, **options):
            left[0] -= 1
            done = real(*args, **options)
            if left[0] == 0:
                raise KeyboardInterrupt
            return done

        if number:
            patch.setattr(place, name, call)

    yield arm
    patch.undo()


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_interrupted_in_a_step(world, tmp_path, interrupt, kind):
    """In steps 0 (nothing is left of it) and 1, in the first evaluation, in step 6 and in the second evaluation."""
    whole = learned(distill(world, kind, tmp_path / "whole"))
    cut = tmp_path / "cut"
    for place, name, number in (
        (podd, "hypergradient", 1),
        (podd, "hypergradient", 2),
        (podd.StepJudge, "sets", 1),
        (podd, "hypergradient", 5),
        (podd.StepJudge, "sets", 2),
    ):
        interrupt(place, name, number)
        distill(world, kind, cut, "--resume", code=130)
        assert not (cut / "distilled_9.pt").exists()
    interrupt(podd, "hypergradient", 0)
    distill(world, kind, cut, "--resume")
    found = learned(cut)
    assert found[0].keys() == whole[0].keys() and found[1].keys() == whole[1].keys()
    for ours, theirs in zip(found, whole, strict=True):
        for name in theirs:
            assert ours[name] == theirs[name], name
    log = log_of(cut)
    assert [row["step"] for row in log if "loss" in row] == list(range(9))
    assert {"poster.png", "poster_raw.png", "poster_classes.png", "progress.gif", "order.json"} <= whole[1].keys()
    assert ("best_label.pt" in whole[0]) == ("--train_y" in KINDS[kind])


def test_what_the_kinds_were_to_show(world, tmp_path):
    """That labels, rate and window move, or the test above shows nothing of them."""
    folder = distill(world, "learned", tmp_path / "l")
    first, last = (torch.load(folder / f"distilled_{step}.pt", weights_only=True) for step in (0, 9))
    assert not torch.equal(first["label_map"], last["label_map"]) and first["lr"] != last["lr"]
    assert len({row["warmup"] for row in log_of(folder) if "loss" in row}) > 2
    folder = distill(world, "plateau", tmp_path / "p", "--lr", "0", "--label_lr_scale", "1e9")
    rows = [row for row in log_of(folder) if "loss" in row]
    assert [row["warmup"] for row in rows][:3] == [0, 0, 0] and rows[-1]["warmup"] > 0  # nothing improves, so it moves
    longer = [row["window"] for row in log_of(distill(world, "longer", tmp_path / "w")) if "loss" in row]
    assert len(set(longer)) > 1 and max(longer) <= 6


def test_a_plateau_is_remembered(world, tmp_path, interrupt):
    """Kind 1: where the window is, and when the run ends, follow from the log alone."""
    still = ("--lr", "0", "--label_lr_scale", "1e9", "--max_outer_steps", "60", "--draw", "false")
    whole = distill(world, "plateau", tmp_path / "whole", *still)
    cut = tmp_path / "cut"
    for number in (5, 5, 3, 6):
        interrupt(podd, "hypergradient", number)
        distill(world, "plateau", cut, *still, "--resume", code=130)
    interrupt(podd, "hypergradient", 0)
    distill(world, "plateau", cut, *still, "--resume")
    rows = log_of(whole)
    assert log_of(cut) == rows and rows[-1]["step"] < 60  # over before its time
    assert sorted({row["warmup"] for row in rows if "loss" in row}) == [0, 2, 4]


def test_resuming_what_is_finished_changes_nothing(world, tmp_path):
    folder = distill(world, "fixed", tmp_path / "o")
    before = learned(folder)
    distill(world, "fixed", folder, "--resume")
    assert learned(folder) == before


def test_more_steps_equal_a_longer_run(world, tmp_path):
    whole = learned(distill(world, "learned", tmp_path / "whole"))
    distill(world, "learned", tmp_path / "o", "--max_outer_steps", "6")
    longer = learned(distill(world, "learned", tmp_path / "o", "--resume"))
    assert longer[0] == whole[0] and longer[1] == whole[1]


def test_a_run_that_began_from_a_file(world, tmp_path, interrupt):
    start = distill(world, "learned", tmp_path / "start", "--max_outer_steps", "3") / "distilled_3.pt"
    flags = ("--init_from", start, "--max_outer_steps", "4")
    whole = learned(distill(world, "learned", tmp_path / "whole", *flags))
    interrupt(podd, "hypergradient", 3)
    distill(world, "learned", tmp_path / "cut", *flags, code=130)
    interrupt(podd, "hypergradient", 0)
    assert learned(distill(world, "learned", tmp_path / "cut", *flags, "--resume")) == whole


def test_an_order_that_buffer_found(world, tmp_path, monkeypatch):
    """It is taken up, and a run keeps the order it began with."""
    monkeypatch.chdir(tmp_path)
    auto = ("--order", "auto", "--order_encoder", "words", "--name", "row")
    places = ("--data_path", world / "data.npz", "--cache_dir", "cache")
    assert command("buffer", [*DATA, *auto, *map(str, places)]) == 0
    path = Path("runs/podd/row/buffers/order.json")
    write_json(path, {"grid": [[2, 0, 1]], "names": [["2", "0", "1"]], "encoder": "me"})
    folder = distill(world, "fixed", Path("o"), *auto, "--max_outer_steps", "3")
    assert read_json(folder / "order.json", "order")["grid"] == [[2, 0, 1]]
    assert torch.load(folder / "distilled_3.pt", weights_only=True)["meta"]["order_encoder"] == "me"
    shutil.rmtree("runs")
    distill(world, "fixed", folder, *auto, "--resume")
    assert torch.load(folder / "distilled_9.pt", weights_only=True)["meta"]["order"] == [[2, 0, 1]]


def test_the_whitening_that_a_run_began_behind(world, tmp_path):
    """It lies in the run folder: a cache that is lost, or a machine that rounds otherwise, would make another space."""
    folder = distill(world, "fixed", tmp_path / "o", "--max_outer_steps", "3")
    own = ZCA.load(folder / podd.WHITENING)
    other = ZCA(own.mean, 1.01 * own.matrix, unit=True)
    other.save(folder / podd.WHITENING)
    distill(world, "fixed", folder, "--resume")
    best = torch.load(folder / "distilled_best.pt", weights_only=True)
    found = torch.load(folder / "distilled_9.pt", weights_only=True)
    assert found["meta"]["zca"] == other.digest != own.digest
    assert ZCA.from_state(best["zca"]).digest == best["meta"]["zca"]


@pytest.fixture(scope="module")
def begun(world, tmp_path_factory):
    return distill(world, "fixed", tmp_path_factory.mktemp("begun") / "o", "--max_outer_steps", "1")


@pytest.fixture
def finished(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "o")
    return tmp_path / "o"


class TestRefused:
    @pytest.mark.parametrize(
        "flags, says",
        [
            (("--window", "3"), "window was 2, is 3"),
            (("--cctype", "0"), "cctype was 2, is 0"),
            (("--poster_width", "20"), "poster_width was 18, is 20"),
            (("--train_y",), "train_y was False, is True"),
            (("--inner_lr", "0.1"), "inner_lr was 0.02, is 0.1"),
            (("--order", "text"), "order was 'table', is 'text'"),
            (("--zca_kind", "mtt"), "zca_kind was 'podd', is 'mtt'"),
            (("--holdout", "0.2"), "holdout was 0.1, is 0.2"),
            (("--seed", "1"), "seed was 0, is 1"),
        ],
    )
    def test_other_options(self, world, finished, capsys, flags, says):
        before = contents(finished)
        capsys.readouterr()
        distill(world, "fixed", finished, "--resume", *flags, code=2)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert says in line and "choose another --save_dir" in line and contents(finished) == before

    def test_another_order(self, world, finished, capsys):
        write_json(finished / "order.json", {"grid": [[1, 0, 2]]})
        before = contents(finished)
        capsys.readouterr()
        distill(world, "fixed", finished, "--resume", code=2)
        assert "holds a run on another class_order" in capsys.readouterr().err
        assert contents(finished) == before

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
        before = contents(finished)
        capsys.readouterr()
        distill(world, "fixed", finished, "--resume", "--data_path", tmp_path / "other.npz", code=2)
        assert "holds a run on another training_set" in capsys.readouterr().err
        assert contents(finished) == before

    def test_a_checkpoint_that_is_damaged(self, world, finished, capsys):
        path = finished / "checkpoint.pt"
        path.write_bytes(path.read_bytes()[:500])
        distill(world, "fixed", finished, "--resume", code=2)
        assert "checkpoint.pt" in capsys.readouterr().err


def test_moved_data_may_be_resumed_with(world, tmp_path):
    whole = learned(distill(world, "fixed", tmp_path / "whole"))
    distill(world, "fixed", tmp_path / "o", "--max_outer_steps", "3")
    shutil.copy(world / "data.npz", tmp_path / "moved.npz")
    distill(world, "fixed", tmp_path / "o", "--resume", "--data_path", tmp_path / "moved.npz")
    assert learned(tmp_path / "o") == whole
