"""--help of each script: complete, and about as quick as importing torch."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from methods.vldd import CONFIGS
from utils.config import options_of

ROOT = Path(__file__).resolve().parents[1]


def seconds(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


@pytest.mark.parametrize("verb", CONFIGS)
def test_help_names_every_option_with_its_default_and_exits_0(verb: str, run_verb, tmp_path: Path):
    done = run_verb(verb, "--help", cwd=tmp_path)
    assert (done.rc, done.stderr) == (0, "")
    assert f"usage: {verb}.py" in done.stdout
    text = " ".join(done.stdout.split())
    for known in options_of(CONFIGS[verb]).values():
        for spelling in known.spellings:
            assert f"--{spelling} " in text, spelling
        assert known.help.split()[0] in text
    assert text.count("(default: ") >= len(options_of(CONFIGS[verb]))
    assert "--config FILE" in text
    assert list(tmp_path.iterdir()) == []


def test_help_costs_little_more_than_torch():
    """Best of three, in turns, so that a busy machine slows both alike; half as much again, and half a second."""
    turns = [(seconds("-c", "import torch, numpy, yaml"), seconds("distill.py", "--help")) for _ in range(3)]
    alone, helped = (min(column) for column in zip(*turns, strict=True))
    assert helped < 1.5 * alone + 0.5, f"--help took {helped:.2f} s, importing torch {alone:.2f} s"
