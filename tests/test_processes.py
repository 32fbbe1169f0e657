"""distill.py and eval.py in several processes: they learn and report what one process does that averages as much."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from data import cache
from methods import mtt, vldd
from methods.command import command
from networks import text_cache
from tests.conftest import ROOT, plain
from tests.data.conftest import Library
from tests.methods.test_prototype_judging import DATA as STUDENTS
from tests.methods.test_prototype_judging import HARD, SOFT, painted
from tests.processes import told, torchrun, verb
from tests.test_resume_mtt import write_data
from utils.files import atomic
from utils.run import read_log

CPU = ("--device", "cpu")
IMAGES = (*CPU, "--dataset", "npz", "--model", "ConvNetD1W8")
PAIRS = (*CPU, "--dataset", "toy", "--toy_images", "80", "--image_size", "8", "--image_encoder", "ConvNetD1W8")
PAIRS = (*PAIRS, "--text_encoder", "tfidf", "--text_dim", "16", "--workers", "1")
POSTER = (
    *("--order", "table", "--poster_width", "18", "--poster_height", "10", "--patch_num_x", "4", "--patch_num_y", "2"),
    *("--poster_class_num_x", "3", "--poster_class_num_y", "1", "--distill_batch_size", "5"),
)
LOOP = ("--iterations", "5", "--eval_it", "4", "--checkpoint_every", "2", "--num_eval", "3", "--epoch_eval_train", "2")
LOOP = (*LOOP, "--syn_steps", "2", "--expert_epochs", "1", "--max_start_epoch", "2")
DATM = (
    *("--Sequential_Generation", "--current_max_start_epoch", "1", "--expansion_end_epoch", "3", "--threshold", "0.8"),
    *("--labels", "learned", "--ema_decay", "0.8", "--lr_y", "2", "--lr_img", "3000", "--select", "test"),
)
LORS = (
    *("--sim_type", "lowrank", "--sim_rank", "2", "--lr_sim", "0.1", "--loss_type", "WBCE", "--merge_loss_branches"),
    *("--num_pairs", "6", "4", "--max_start_epoch", "1", "2", "--mini_batches", "consecutive", "--ema_decay", "0.9"),
)
HEADS = ("--image_trainable", "false", "--image_projection", "--joint_width", "8", "--blend", "1")
RATES = ("--lr_img", "10", "--lr_txt", "10", "--lr_lr", "1e-6")
WINDOW = (
    *("--window", "2", "--totwindow", "5", "--start_per", "step", "--batch_size", "10", "--max_outer_steps", "5"),
    *("--lr", "0.02", "--train_y", "--train_lr", "--test_freq", "1", "--eval_steps", "2", "4", "--num_eval", "3"),
    *("--checkpoint_every", "2"),
)
__all__ = ["painted"]  # a fixture
KINDS = {  # system, whose experts, flags
    "mtt": ("mtt", "mtt", ("--ipc", "2", "--batch_syn", "4", "--lr_img", "10", "--lr_teacher", "0.02")),
    "datm": ("mtt", "mtt", DATM),
    "lors": ("vldd", "vldd", (*RATES, *LORS)),
    "heads": ("vldd", "heads", (*RATES, *HEADS, "--num_pairs", "8", "--independent_starts")),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, and experts in `world / <kind>`; nobody writes here but caches."""
    root = tmp_path_factory.mktemp("world")
    write_data(root / "data.npz")
    few = ("--num_experts", "2", "--train_epochs", "2", "--buffer_path")
    for kind, flags in (("mtt", ("--batch_train", "8", "--lr_teacher", "0.05")), ("vldd", ()), ("heads", HEADS[:-2])):
        assert command("buffer", words(root, kind, *few, root / kind, *flags)) == 0
    return root


def words(world: Path, kind: str, *flags: object) -> list[str]:
    images = kind == "mtt"
    data = (*IMAGES, "--data_path", world / "data.npz") if images else (*PAIRS, "--batch_size_train", "40")
    data = data if images or "--num_experts" in flags else PAIRS
    return [str(word) for word in (*data, "--cache_dir", world / "cache", *flags)]


def distill(world: Path, kind: str, folder: Path, *more: object) -> list[str]:
    """The flags of a distillation."""
    if kind == "poster":
        flags = ("--method", "podd", *POSTER, *WINDOW, "--save_dir", folder, *more)
        return words(world, "mtt", *flags)
    system, experts, flags = KINDS[kind]
    places = ("--method", system, "--buffer_path", world / experts, "--save_dir", folder)
    return words(world, "mtt" if system == "mtt" else experts, *LOOP, *flags, *places, *more)


def close(one: object, other: object) -> None:
    """Equal to float tolerance, all the way down."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for parts in zip(one, other, strict=True):
            close(*parts)
    elif torch.is_tensor(one):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
    else:
        assert one == other


def learned(folder: Path) -> tuple:
    """The last state, and all that was logged but validation, where a single image more or less may be right."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    rows = [{name: value for name, value in row.items() if "val_" not in name} for row in read_log(folder)]
    return [state["step"], state["learned"], state["optimizer"], state["rng"]], rows


def exact(folder: Path) -> tuple:
    files = {path.name: plain(torch.load(path, weights_only=True)) for path in sorted(folder.glob("*.pt"))}
    return files, (folder / "log.jsonl").read_text()


@pytest.mark.parametrize("kind", [*KINDS, "poster"])
def test_two_processes_learn_what_one_does(world, tmp_path, kind):
    """The mean of two segments: tensors, momenta, averages, generators and losses."""
    assert command("distill", distill(world, kind, tmp_path / "one", "--segments", "2")) == 0
    done = verb("distill", *distill(world, kind, tmp_path / "two"))
    assert [end.rc for end in done] == [0, 0], told(done)
    one, two = learned(tmp_path / "one"), learned(tmp_path / "two")
    assert len(one[1]) == len(two[1]) >= 5
    for parts in zip(one, two, strict=True):
        close(*map(list, parts))
    assert command("distill", distill(world, kind, tmp_path / "single")) == 0
    both, single = ([row["loss"] for row in read_log(tmp_path / name) if "loss" in row] for name in ("one", "single"))
    assert both != pytest.approx(single, rel=1e-2)


def test_going_on_with_other_processes(world, tmp_path):
    """With as many segments the run ends as it would have; with more or fewer it does not go on."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command("distill", distill(world, "lors", whole, "--segments", "2")) == 0
    assert [end.rc for end in verb("distill", *distill(world, "lors", cut, "--iterations", "3"))] == [0, 0]
    assert command("distill", distill(world, "lors", cut, "--resume", "--segments", "2")) == 0
    for parts in zip(learned(whole), learned(cut), strict=True):
        close(*map(list, parts))
    for processes, found in ((1, "this command (1 process) 1"), (3, "this command (3 processes) 3")):
        done = verb("distill", *distill(world, "lors", cut, "--resume"), world=processes)
        (line,) = told(done)
        assert line.endswith(f"averages 2 segments a step, {found}; go on with --segments 2")


def test_a_process_that_is_killed(world, tmp_path, monkeypatch):
    """One clear line, and the run goes on to end as one that was left alone, to the bit."""
    assert [end.rc for end in verb("distill", *distill(world, "mtt", tmp_path / "whole"))] == [0, 0]
    match, calls = mtt.match, []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) == 4 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return match(*args, **options)

    monkeypatch.setattr(mtt, "match", dying)
    done = verb("distill", *distill(world, "mtt", tmp_path / "cut"))
    monkeypatch.undo()
    assert [end.rc for end in done] == [1, -signal.SIGKILL]
    (line,) = told(done)
    assert line.startswith("distill.py: error: a process of this run ended before its time (killed, or out of memory?)")
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 2
    done = verb("distill", *distill(world, "mtt", tmp_path / "cut", "--resume"))
    assert [end.rc for end in done] == [0, 0], told(done)
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")


def test_one_that_is_killed_while_others_wait_for_its_network(world, tmp_path, monkeypatch):
    """What an evaluation loses is told as it is, not as a state that is not sound."""

    train = mtt.AccuracyJudge._train

    def dying(*args):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return train(*args)

    monkeypatch.setattr(mtt.AccuracyJudge, "_train", dying)
    done = verb("distill", *distill(world, "mtt", tmp_path / "cut"))
    (line,) = told(done)
    assert line.endswith("--resume goes on from the last checkpoint") and [end.rc for end in done] == [1, -9]


def test_processes_that_come_apart(world, tmp_path, monkeypatch):
    """The step at which that is found, and no checkpoint of it."""
    project = vldd.SyntheticPairs.project

    def astray(pairs):
        project(pairs)
        if os.environ["RANK"] == "1":
            with torch.no_grad():
                pairs.phases[0].images.view(-1)[0] += 1e-6

    monkeypatch.setattr(vldd.SyntheticPairs, "project", astray)
    done = verb("distill", *distill(world, "lors", tmp_path / "a"))
    (line,) = told(done)
    assert "step 2: the processes no longer hold the same learned set, the last that they shared is that of" in line
    assert sorted(end.rc for end in done) == [1, 1]


def test_labels_of_one_segment(world, tmp_path):
    flags = distill(world, "mtt", tmp_path / "a", "--labels", "teacher")
    (line,) = told(verb("distill", *flags))
    assert "--labels teacher takes the labels of each step from its one segment, and there are 2; give" in line
    done = verb("distill", *flags, "--segments", "1", "--eval_it", "0")
    assert [end.rc for end in done] == [0, 0], told(done)
    assert "note: --segments 1 keeps as many of 2 processes busy; the others only judge" in done[0].stdout


@pytest.fixture(scope="module")
def judged(world, tmp_path_factory):
    """A distilled set of each system, in `judged / <kind>`."""
    root = tmp_path_factory.mktemp("judged")
    for kind in ("mtt", "lors"):
        assert command("distill", distill(world, kind, root / kind, "--eval_it", "0", "--iterations", "1")) == 0
    return root


EVALS = {  # system, flags
    "mtt": (
        "mtt",
        "--data",
        "random",
        "distilled",
        "full",
        "--full_epochs",
        "1",
        "--random_lrs",
        "0.01",
        "0.05",
        "0.1",
    ),
    "lors": ("vldd", "--data", "distilled", "random", "full", "--full_epochs", "1"),
    "poster": ("podd", "--data", "random", "crops", "full", "--full_epochs", "1", "--eval_steps", "2", "4"),
}


@pytest.mark.parametrize("kind", EVALS)
def test_judging(world, judged, tmp_path, kind):
    """The same result.json from one, two and more processes than networks; one table."""
    system, *asked = EVALS[kind]
    flags = [*words(world, "vldd" if kind == "lors" else "mtt", "--method", system, *asked), "--num_eval", "3"]
    if kind == "poster":
        flags += POSTER
    else:
        flags += ["--epoch_eval_train", "3", "--distilled", judged / kind / "distilled_best.pt"]
    results = []
    for processes in (1, 2, 4):
        done = verb("eval", *flags, "--save_dir", tmp_path / str(processes), world=processes)
        assert [end.rc for end in done] == [0] * processes, told(done)
        assert [bool(end.stdout) for end in done] == [True] + [False] * (processes - 1)
        results.append(rows(tmp_path / str(processes)))
    assert results[0] == results[1] == results[2] and len(results[0]) == 3
    scores = [row["metrics"]["r_mean" if kind == "lors" else "acc"]["values"] for row in results[0]]
    assert all(len(values) == 3 for values in scores) and any(len({*values}) > 1 for values in scores)


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "result.json").read_text())["rows"]


def test_files_are_prepared_once(tmp_path, monkeypatch):
    """Decoded images, as for testing and for training, and embeddings: by the first process, and nothing anew later."""
    library = Library(tmp_path)

    def noted(path):
        with open(tmp_path / "written", "a") as file:
            file.write(f"{os.environ['RANK']} {Path(path).name}\n")
        return atomic(path)

    monkeypatch.setattr(cache, "atomic", noted)
    monkeypatch.setattr(text_cache, "atomic", noted)
    places = ("--image_root", library.images, "--ann_root", library.notes, "--cache_dir", tmp_path / "cache")
    flags = (*CPU, "--method", "vldd", "--dataset", "flickr", *places, "--image_size", "16", "--workers", "1")
    flags += ("--image_encoder", "ConvNetD1W8", "--text_encoder", "tfidf", "--text_dim", "8", "--num_eval", "3")
    flags += ("--data", "random", "full", "--num_pairs", "4", "--full_batch", "4", "--full_epochs", "1")
    done = verb("eval", *flags, "--epoch_eval_train", "1", "--save_dir", tmp_path / "out", world=3)
    assert [end.rc for end in done] == [0, 0, 0], told(done)
    written = [line.split() for line in (tmp_path / "written").read_text().splitlines()]
    assert {rank for rank, _ in written} == {"0"} and len({name for _, name in written}) == len(written)
    kinds = [name.split("_")[0] for _, name in written if name.endswith(".images")]
    assert sorted(kinds) == ["ragged", "squashed", "squashed", "squashed"]
    assert sum(name.endswith(".npy") for _, name in written) == 3


@pytest.mark.parametrize("line", [HARD, SOFT])
def test_students(painted, tmp_path, monkeypatch, line):
    """The same of students on photographs; what each of them scored is found again, whichever process trained it."""
    monkeypatch.chdir(painted)
    flags = f"--method vlcp {STUDENTS} {line} --data random distilled --distilled made --ipc 2 --repeat 3".split()
    places = [("--save_dir", tmp_path / name / "out", "--cache_dir", tmp_path / name / "cache") for name in "ab"]
    done = verb("eval", *flags, *places[0], world=3)
    assert [end.rc for end in done] == [0, 0, 0], told(done)
    assert command("eval", [str(word) for word in (*flags, *places[1])]) == 0
    assert rows(tmp_path / "a" / "out") == rows(tmp_path / "b" / "out")
    kept = [sorted(path.name for path in (tmp_path / name / "out" / "progress").iterdir()) for name in "ab"]
    assert len(kept[0]) == 6 and kept[0] == kept[1]


def test_torchrun(world, tmp_path):
    """The launcher itself, with the script: pairs are learned as by forked processes."""
    folder = tmp_path / "run"
    done = torchrun(ROOT / "distill.py", *distill(world, "lors", folder), cwd=tmp_path)
    assert done.rc == 0, done.stderr
    assert done.stdout.count("pairs in") == 1
    assert [end.rc for end in verb("distill", *distill(world, "lors", tmp_path / "same"))] == [0, 0]
    assert exact(folder) == exact(tmp_path / "same")


@pytest.mark.slow  # no more than the launcher (above) and judging by two processes (test_judging) together
def test_judging_by_torchrun(world, judged, tmp_path):
    flags = words(world, "mtt", "--method", "mtt", "--distilled", judged / "mtt" / "distilled_best.pt")
    flags += ["--data", "random", "distilled", "--num_eval", "3", "--epoch_eval_train", "3", "--random_lrs", "0.01"]
    done = torchrun(ROOT / "eval.py", *flags, "--save_dir", tmp_path / "two", cwd=tmp_path)
    assert done.rc == 0, done.stderr
    assert command("eval", [str(word) for word in (*flags, "--save_dir", tmp_path / "one")]) == 0
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
