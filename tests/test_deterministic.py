"""--deterministic: two runs, and one that was interrupted and resumed, leave the same files; their hashes are printed
(pytest -s tests/test_deterministic.py)."""

import signal
from pathlib import Path

import pytest
import torch

from methods.command import command
from tests.conftest import plain
from tests.test_processes import distill as distill_words
from tests.test_processes import world
from tests.test_signals import STEPS, signalled
from tests.utils.test_stopping import listening
from utils.files import digest, file_digest

__all__ = ["listening", "signalled", "world"]  # fixtures


def hashes(folder: Path) -> dict[str, str]:
    """Of every file: a tensor file's by its values, for torch notes in it the random name of a temporary file."""
    return {
        str(path.relative_to(folder)): digest(plain(torch.load(path, weights_only=True)))
        if path.suffix == ".pt"
        else file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kind", STEPS)
def test_two_runs_and_a_resumed_one(world, tmp_path, monkeypatch, signalled, kind):
    found = {}
    for name in ("first", "second", "resumed", "without"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)  # a config notes its folder, which is called alike in all
        more = ["--resume"] if name == "without" else ["--resume", "--deterministic"]
        if name == "resumed":
            signalled(*STEPS[kind], 4, signal.SIGTERM)
            assert command("distill", distill_words(world, kind, "run", *more)) == 143
            signalled(*STEPS[kind], 0, 0)
        assert command("distill", distill_words(world, kind, "run", *more)) == 0
        found[name] = hashes(tmp_path / name / "run")
    first = found["first"]
    print(f"\n{kind}: {len(first)} files, together {digest(first)[:16]}")
    print("\n".join(f"  {value[:16]}  {name}" for name, value in first.items()))
    assert first == found["second"] == found["resumed"] and len(first) > 10
    assert first["log.jsonl"] == found["without"]["log.jsonl"]  # on a CPU the flag changes no number


@pytest.mark.parametrize("flags", [(), ("--deterministic",)])
def test_the_flag_is_on_while_steps_are_taken(world, tmp_path, monkeypatch, flags):
    """On a CPU no number would tell."""
    place, name = STEPS["mtt"]
    real, seen = getattr(place, name), []

    def step(*args, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return real(*args, **options)

    monkeypatch.setattr(place, name, step)
    assert command("distill", distill_words(world, "mtt", tmp_path / "run", *flags)) == 0
    assert seen and set(seen) == {bool(flags)}
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_flag_may_not_change_on_the_way(world, tmp_path, refused):
    flags = distill_words(world, "mtt", tmp_path / "run")
    assert command("distill", flags) == 0
    line = refused("distill", *flags, "--resume", "--deterministic")
    assert "deterministic was False, is True" in line
