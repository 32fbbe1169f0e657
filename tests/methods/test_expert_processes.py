"""Experts trained by several processes: the files of one process, whoever is killed and whoever goes on."""

import os
import signal
import time

import pytest

from tests.conftest import contents
from tests.methods.conftest import Command
from tests.methods.test_experts import Classes, World
from tests.processes import together, told
from utils.run import Run, RunConfig, read_log

KINDS = {
    "alone": (World, {"num_experts": 5, "train_epochs": 3}),
    "side by side": (Classes, {"num_experts": 5, "train_epochs": 3, "together": 2, "mom": 0.5}),
    "few epochs kept": (World, {"num_experts": 4, "train_epochs": 3, "save_epochs": (0, 2), "store_dtype": "bfloat16"}),
}


def train(folder, kind, ranks=None, watch=None):
    """One process's part of a run, which goes on where there is one; `watch(expert, epoch)` before each epoch."""
    world, options = KINDS[kind]
    made = world()
    if watch is not None:
        batches = made.batches
        made.batches = lambda expert, epoch: (watch(expert, epoch), batches(expert, epoch))[1]
    cfg = Command(run=RunConfig(device="cpu", resume=folder.exists()))
    run = Run(folder, cfg, "buffer", "--buffer_path", ranks)
    return made.train(run, resume=run.resumed, **options)


def files(folder):
    """Every file; how the run was begun is no part of it."""
    return {name: text for name, text in contents(folder).items() if name != "config.yaml"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process makes of each kind."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("whole") / "run"
        train(folder, kind)
        found[kind] = files(folder)
        assert "manifest.json" in found[kind] and not any(name.endswith("progress.pt") for name in found[kind])
    return found


def all_begin(folder, ranks):
    """watch(expert, epoch) that lets every process begin before any goes on."""

    def watch(expert, epoch):
        (folder / f"begun {ranks.rank}").touch()
        until = time.monotonic() + 20
        while len(list(folder.glob("begun *"))) < ranks.world and time.monotonic() < until:
            time.sleep(0.002)

    return watch


@pytest.mark.parametrize(("kind", "world"), [*((kind, 2) for kind in KINDS), ("side by side", 3)])
def test_several_leave_the_files_of_one(whole, tmp_path, kind, world):
    def work(ranks):
        train(tmp_path / "run", kind, ranks, all_begin(tmp_path, ranks))

    done = together(work, world)
    assert [end.rc for end in done] == [0] * world, told(done)
    assert files(tmp_path / "run") == whole[kind] and len(list(tmp_path.glob("begun *"))) == world


def test_more_processes_than_experts(whole, tmp_path):
    done = together(lambda ranks: train(tmp_path / "run", "side by side", ranks), 5)
    assert [end.rc for end in done] == [0] * 5, told(done)
    assert files(tmp_path / "run") == whole["side by side"]


def test_a_slow_one_holds_up_nobody(tmp_path):
    """While expert 0 takes its time, all the others are trained; log and manifest come in order all the same."""
    waited = []

    def work(ranks):
        def watch(expert, epoch):
            if expert == 0 and not waited:
                waited.append(epoch)
                until = time.monotonic() + 20
                while not (tmp_path / "run" / "expert_004" / "finished.json").exists() and time.monotonic() < until:
                    time.sleep(0.002)
                assert not (tmp_path / "run" / "log.jsonl").exists() or not read_log(tmp_path / "run")

        train(tmp_path / "run", "alone", ranks, watch)

    done = together(work)
    assert [end.rc for end in done] == [0, 0], told(done)
    assert [row["expert"] for row in read_log(tmp_path / "run")] == [expert for expert in range(5) for _ in range(3)]


@pytest.mark.parametrize("kind", ["alone", "side by side"])
@pytest.mark.parametrize(("victim", "later"), [(0, 1), (1, 2), (1, 3)])
def test_one_is_killed(whole, tmp_path, kind, victim, later):
    """The run ends with one line; one, two or three processes make what it would have been of what there is."""

    def work(ranks):
        begin = all_begin(tmp_path, ranks)

        def watch(expert, epoch):
            begin(expert, epoch)
            if ranks.rank == victim and epoch == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        train(tmp_path / "run", kind, ranks, watch)

    done = together(work)
    (line,) = told(done)
    assert sorted(end.rc for end in done) == [-9, 1] and "a process of this run ended before its time" in line
    met = []
    if later == 1:
        train(tmp_path / "run", kind, watch=lambda *place: met.append(place))
        size = KINDS[kind][1].get("together", 1)
        assert {epoch for expert, epoch in met if expert < size * 2} <= {0, 1, 2} and len(met) < 15, "nothing was kept"
    else:
        again = together(lambda ranks: train(tmp_path / "run", kind, ranks), later)
        assert [end.rc for end in again] == [0] * later, told(again)
    assert files(tmp_path / "run") == whole[kind]


@pytest.mark.parametrize("kind", ["alone", "side by side"])
def test_killed_at_any_file(whole, tmp_path, kind):
    """Each time all of one, two or three processes die, each as it moves a file into place, or just after."""
    folder, real = tmp_path / "run", os.replace

    def dying(halves):
        left = [halves]

        def replace(old, new):
            if left[0] > 0:
                real(old, new)
            left[0] -= 2
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return replace

    ended = []
    for number, halves in enumerate((1, 5, 8, 3, 6, 9, 4, 7, 2, 6, 5, 8, 3)):

        def work(ranks, halves=halves):
            os.replace = dying(halves + ranks.rank)
            train(folder, kind, ranks)

        ended.append([end.rc for end in together(work, (2, 3, 1)[number % 3])])
    assert sum(-9 in codes for codes in ended) >= 8, ended
    done = together(lambda ranks: train(folder, kind, ranks))
    assert [end.rc for end in done] == [0, 0], told(done)
    assert files(folder) == whole[kind]


def test_what_one_process_began_several_finish(whole, tmp_path):
    """Also a state of the time when one process kept it in the folder itself."""

    def stop(expert, epoch):
        if (expert, epoch) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", "alone", watch=stop)
    (state,) = (tmp_path / "run").rglob("progress.pt")
    state.rename(tmp_path / "run" / "progress.pt")
    done = together(lambda ranks: train(tmp_path / "run", "alone", ranks))
    assert [end.rc for end in done] == [0, 0], told(done)
    assert files(tmp_path / "run") == whole["alone"]


def test_a_failure_is_told_once(tmp_path):
    def work(ranks):
        def watch(expert, epoch):
            if expert == 3:
                raise OSError(28, "No space left on device", "snapshot")

        train(tmp_path / "run", "alone", ranks, watch)

    done = together(work)
    (line,) = told(done)
    assert line == "x.py: error: snapshot: the disk is full; free some room or choose another folder"
    assert sorted(end.rc for end in done) == [1, 2]
