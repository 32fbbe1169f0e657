"""--help of each script: complete, and about as quick as importing torch."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from methods import METHODS, get_method
from methods.command import command
from utils.config import flag, options_of

ROOT = Path(__file__).resolve().parents[1]
# How a command names its method; the first is the default.
NAMED = {name: ("--method", name) if number else () for number, name in enumerate(METHODS)}


@pytest.mark.parametrize("verb", ["buffer", "distill", "eval"])
@pytest.mark.parametrize("method", METHODS)
def test_help_names_every_option_with_its_default_and_exits_0(method: str, verb: str, capsys, own_folder):
    with pytest.raises(SystemExit) as ended:
        command(verb, [*NAMED[method], "--help"])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.err) == (0, "")
    assert f"usage: {verb}.py" in shown.out
    text, options = " ".join(shown.out.split()), options_of(get_method(method).CONFIGS[verb])
    for known in options.values():
        for spelling in known.spellings:
            assert f"{flag(spelling)} " in text, spelling
        assert known.help.split()[0] in text
    assert text.count("(default: ") >= len(options)
    assert "--config FILE" in text
    assert list(Path.cwd().iterdir()) == []


def test_help_costs_little_more_than_torch():
    """At most half as much again, and half a second; the least of up to three, in turns."""
    words = [("-c", "import torch, numpy, yaml"), *(("distill.py", *named, "--help") for named in NAMED.values())]
    least = [float("inf")] * len(words)
    for _ in range(3):
        least = [min(best, seconds(*some)) for best, some in zip(least, words, strict=True)]
        alone, *helped = least
        if max(helped) < 1.5 * alone + 0.5:
            return
    raise AssertionError(f"--help took {helped} s, importing torch {alone:.2f} s")


def seconds(*words: str) -> float:
    """Processor time of a process, which other work on the machine changes little; it must end well and say nothing
    amiss."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, b"")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
