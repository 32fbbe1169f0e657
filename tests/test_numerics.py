"""A loss that is not finite, at a chosen step of each system's loop: the step is named, the last good state stays, and
once the cause is gone the run ends as one in which it never was."""

import pytest
import torch

from methods.command import command
from methods.core.photo_students import ScheduledLoop
from methods.core.stack import StackTrainer
from methods.core.training import Trainer
from tests.test_processes import HARD, SOFT, STUDENTS, distill, exact, painted, rows, words, world
from tests.test_signals import STEPS, experts
from utils.run import read_log

__all__ = ["painted", "world"]  # fixtures


@pytest.fixture
def spoilt():
    """spoilt(place, name, n) makes the loss of the n-th call of `place.name` NaN; 0: of none any more."""

    def arm(place, name, call):
        patch.undo()
        real, calls = getattr(place, name), []

        def step(*args, **options):
            calls.append(1)
            found = real(*args, **options)
            if len(calls) != call:
                return found
            return found * float("nan") if torch.is_tensor(found) else found | {"loss": float("nan")}

        patch.setattr(place, name, step)

    with pytest.MonkeyPatch.context() as patch:
        yield arm


@pytest.mark.parametrize("kind", ["mtt", "lors"])
def test_distillation(world, tmp_path, refused, spoilt, kind):
    assert command("distill", distill(world, kind, tmp_path / "whole")) == 0
    spoilt(*STEPS[kind], 4)
    line = refused("distill", *distill(world, kind, tmp_path / "cut"), code=1)
    assert line.startswith("step 3: loss is nan; the last good state is that of step 2 in ")
    spoilt(*STEPS[kind], 0)
    assert command("distill", distill(world, kind, tmp_path / "cut", "--resume")) == 0
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")


def test_posters_and_thresholds_pass_over_such_steps(world, tmp_path, capsys, spoilt):
    """They are counted; that there may not be too many in a row, tests/methods/test_outer.py shows."""
    for kind, more, told in (
        ("poster", (), "1 outer steps had a gradient that was not finite and changed nothing"),
        ("lors", ("--threshold", "1e9"), "1 of 5 steps ended above --threshold and changed nothing"),
        ("mtt", ("--threshold", "1e9"), "1 of 5 steps ended above --threshold and changed nothing"),
    ):
        spoilt(*STEPS[kind], 2)
        assert command("distill", distill(world, kind, tmp_path / kind, *more)) == 0
        skipped = [row["step"] for row in read_log(tmp_path / kind) if "skipped" in row]
        assert skipped == [1] and told in capsys.readouterr().out


def test_experts(world, tmp_path, refused, spoilt):
    """The sixth step is one of the second epoch; the first one's state stays, and so do the snapshots."""
    few = ("--num_experts", "2", "--train_epochs", "3", "--batch_train", "8", "--buffer_path")
    assert command("buffer", words(world, "mtt", *few, tmp_path / "whole")) == 0
    spoilt(StackTrainer, "_step", 6)
    line = refused("buffer", *words(world, "mtt", *few, tmp_path / "cut"), code=1)
    assert line.startswith("expert 0, epoch 2, by step ") and line.endswith("the loss is not finite; lower the rate")
    assert list((tmp_path / "cut").rglob("epoch_001.safetensors")) and list((tmp_path / "cut").rglob("progress.pt"))
    spoilt(StackTrainer, "_step", 0)
    assert command("buffer", words(world, "mtt", *few, tmp_path / "cut", "--resume")) == 0
    assert experts(tmp_path / "cut") == experts(tmp_path / "whole")


@pytest.mark.parametrize("loop, line", [(Trainer, HARD), (ScheduledLoop, SOFT)])
def test_students(painted, tmp_path, monkeypatch, refused, spoilt, loop, line):
    """What students before it scored is kept, and the rest goes on from there."""
    monkeypatch.chdir(painted)
    flags = f"--method vlcp {STUDENTS} {line} --data distilled --distilled made --ipc 2 --repeat 2".split()
    flags = [*flags, "--cache_dir", str(tmp_path / "cache"), "--save_dir"]
    assert command("eval", [*flags, str(tmp_path / "whole")]) == 0
    whole, calls, real = rows(tmp_path / "whole"), [], loop._step
    monkeypatch.setattr(loop, "_step", lambda self, batch: (calls.append(1), real(self, batch))[1])
    assert command("eval", [*flags, str(tmp_path / "count")]) == 0
    monkeypatch.setattr(loop, "_step", real)
    spoilt(loop, "_step", len(calls))
    told = refused("eval", *flags, tmp_path / "cut", code=1)
    assert "student 2, epoch " in told and "the loss is not finite" in told
    assert not (tmp_path / "cut" / "result.json").exists()
    spoilt(loop, "_step", 0)
    assert command("eval", [*flags, str(tmp_path / "cut")]) == 0
    assert rows(tmp_path / "cut") == whole
