"""--help of each script: complete, and about as quick as importing torch."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from methods import METHODS, get_method
from utils.config import options_of

ROOT = Path(__file__).resolve().parents[1]
# How a command names its method; the first is the default.
NAMED = {name: ("--method", name) if number else () for number, name in enumerate(METHODS)}


def seconds(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


@pytest.mark.parametrize("verb", ["buffer", "distill", "eval"])
@pytest.mark.parametrize("method", METHODS)
def test_help_names_every_option_with_its_default_and_exits_0(method: str, verb: str, run_verb, tmp_path: Path):
    done = run_verb(verb, *NAMED[method], "--help", cwd=tmp_path)
    assert (done.rc, done.stderr) == (0, "")
    assert f"usage: {verb}.py" in done.stdout
    text, options = " ".join(done.stdout.split()), options_of(get_method(method).CONFIGS[verb])
    for known in options.values():
        for spelling in known.spellings:
            assert f"--{spelling} " in text, spelling
        assert known.help.split()[0] in text
    assert text.count("(default: ") >= len(options)
    assert "--config FILE" in text
    assert list(tmp_path.iterdir()) == []


def test_help_costs_little_more_than_torch():
    """Best of three, in turns, so that a busy machine slows all alike; half as much again, and half a second."""
    helps = [("distill.py", *named, "--help") for named in NAMED.values()]
    turns = [(seconds("-c", "import torch, numpy, yaml"), *(seconds(*words) for words in helps)) for _ in range(3)]
    alone, *helped = (min(column) for column in zip(*turns, strict=True))
    assert max(helped) < 1.5 * alone + 0.5, f"--help took {helped} s, importing torch {alone:.2f} s"
