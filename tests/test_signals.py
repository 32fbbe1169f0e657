"""SIGINT and SIGTERM through the commands: exit codes, one line, at most the step under way lost, nothing changed."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from methods import mtt, podd, vldd
from methods.clip_learning import Learner
from methods.command import command
from methods.core.stack import StackTrainer
from tests.processes import told, verb
from tests.test_processes import distill, exact, words, world
from tests.test_resume_dimefm import FLAGS, files, kept, root, whole
from tests.utils.test_stopping import listening

__all__ = ["listening", "root", "whole", "world"]  # fixtures
STEPS = {"mtt": (mtt, "match"), "lors": (vldd, "match"), "poster": (podd.PosterStep, "_one")}


@pytest.fixture
def signalled():
    """signalled(place, name, n, number) sends a signal in the n-th call of `place.name`, which goes on."""

    def arm(place, name, call, number, rank="0"):
        patch.undo()
        real, calls = getattr(place, name), []

        def step(*args, **options):
            calls.append(1)
            if len(calls) == call and os.environ.get("RANK", "0") == rank:
                os.kill(os.getpid(), number)
            return real(*args, **options)

        patch.setattr(place, name, step)

    with pytest.MonkeyPatch.context() as patch:
        yield arm


def one_line(capsys, begin: str) -> None:
    """All that was said on standard error, but for progress bars."""
    said = (line.strip() for line in re.split(r"[\r\n]+|\x1b\[A", capsys.readouterr().err))
    lines = [line for line in said if line and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith(begin), lines


@pytest.mark.parametrize("kind", STEPS)
def test_distillation(world, tmp_path, capsys, signalled, kind):
    """In steps 1 and 3; checkpoints are due every second step."""
    assert command("distill", distill(world, kind, tmp_path / "whole")) == 0
    cut, at = tmp_path / "cut", []
    for call, number in ((2, signal.SIGTERM), (3, signal.SIGINT)):
        signalled(*STEPS[kind], call, number)
        capsys.readouterr()
        assert command("distill", distill(world, kind, cut, "--resume")) == 128 + number
        one_line(capsys, "distill.py: interrupted; --resume goes on from the last checkpoint")
        at.append(torch.load(cut / "checkpoint.pt", weights_only=True)["step"])
    assert at == [1, 3]
    signalled(*STEPS[kind], 0, 0)
    assert command("distill", distill(world, kind, cut, "--resume")) == 0
    assert exact(cut) == exact(tmp_path / "whole") and not (cut / ".lock").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_two_processes(world, tmp_path, signalled, rank):
    """One of them has had the signal; both leave after the same step, and nothing hangs."""
    assert [end.rc for end in verb("distill", *distill(world, "mtt", tmp_path / "whole"))] == [0, 0]
    signalled(mtt, "match", 4, signal.SIGTERM, rank)
    done = verb("distill", *distill(world, "mtt", tmp_path / "cut"))
    assert sorted(end.rc for end in done) == [1, 143]
    assert told(done) == ["distill.py: interrupted; --resume goes on from the last checkpoint"]
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 3
    signalled(mtt, "match", 0, 0)
    assert [end.rc for end in verb("distill", *distill(world, "mtt", tmp_path / "cut", "--resume"))] == [0, 0]
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")


def test_students_of_clip(root, whole, monkeypatch, capsys, signalled):
    """Between two checkpoints and two lines of the log: terms that are yet to be logged are kept with the state."""
    found = files(whole)
    monkeypatch.chdir(root)
    for call, number, step in ((4, signal.SIGTERM, 4), (4, signal.SIGINT, 8), (6, signal.SIGTERM, 14)):
        signalled(Learner, "step", call, number)
        capsys.readouterr()
        assert command("distill", [*FLAGS, "--save_dir", "told"]) == 128 + number
        one_line(capsys, "distill.py: interrupted")
        assert kept(root / "told")[-1] == step
    signalled(Learner, "step", 0, 0)
    assert command("distill", [*FLAGS, "--save_dir", "told"]) == 0
    assert files(root / "told") == found


@pytest.mark.parametrize("kind", STEPS)
def test_old_files_are_pruned(world, tmp_path, kind, signalled):
    """--keep 1 leaves the first file, the last and the best, which are those of a run that keeps all; also where it was
    interrupted."""
    whole, few = tmp_path / "whole", tmp_path / "few"
    more = ("--eval_it", "1") if kind != "poster" else ("--max_outer_steps", "9")
    assert command("distill", distill(world, kind, whole, *more)) == 0
    signalled(*STEPS[kind], 4, signal.SIGTERM)
    assert command("distill", distill(world, kind, few, *more, "--keep", "1", "--resume")) == 143
    signalled(*STEPS[kind], 0, 0)
    assert command("distill", distill(world, kind, few, *more, "--keep", "1", "--resume")) == 0
    names = [sorted(path.name for path in folder.glob("distilled_*.pt")) for folder in (whole, few)]
    last = "distilled_5.pt" if kind != "poster" else "distilled_9.pt"
    assert len(names[0]) >= 5 and names[1] == ["distilled_0.pt", last, "distilled_best.pt"]
    found = [exact(folder)[0] for folder in (whole, few)]
    assert all(found[0][name] == state for name, state in found[1].items())


def test_experts(world, tmp_path, capsys, signalled):
    """They go on from the last whole epoch."""
    few = ("--num_experts", "2", "--train_epochs", "3", "--batch_train", "8", "--buffer_path")
    assert command("buffer", words(world, "mtt", *few, tmp_path / "whole")) == 0
    for call, number in ((6, signal.SIGTERM), (6, signal.SIGINT)):
        signalled(StackTrainer, "_step", call, number)
        capsys.readouterr()
        assert command("buffer", words(world, "mtt", *few, tmp_path / "cut", "--resume")) == 128 + number
        one_line(capsys, "buffer.py: interrupted; --resume")
    signalled(StackTrainer, "_step", 0, 0)
    assert command("buffer", words(world, "mtt", *few, tmp_path / "cut", "--resume")) == 0
    assert experts(tmp_path / "cut") == experts(tmp_path / "whole")


def experts(folder: Path) -> dict[str, bytes]:
    names = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "config.yaml")
    return {str(path.relative_to(folder)): path.read_bytes() for path in names if path.name != "manifest.json"}


def test_evaluation(world, tmp_path, capsys, signalled):
    """There is nothing to keep, so it ends at once."""
    flags = words(
        world, "mtt", "--method", "mtt", "--data", "random", "--num_eval", "2", "--save_dir", tmp_path / "out"
    )
    signalled(StackTrainer, "_step", 3, signal.SIGTERM)
    capsys.readouterr()
    assert command("eval", flags) == 143
    one_line(capsys, "eval.py: interrupted; give the command again")
    assert not (tmp_path / "out").exists()
