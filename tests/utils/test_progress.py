"""Bars: also those that a signal came into the making of."""

import gc
import signal
import sys

import pytest
from tqdm import tqdm

from utils.errors import Interrupted, run_main
from utils.progress import progress


@pytest.mark.parametrize("place", ["__init__", "_get_free_pos", "refresh"])
def test_a_signal_while_a_bar_is_made(monkeypatch, capsys, place):
    """It ends the command with its line; of the half bar nothing is heard, then or when it is taken away."""

    def ended(*_, **__):
        raise Interrupted(signal.SIGTERM)

    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    monkeypatch.setattr(tqdm, place, ended)
    assert run_main(lambda words: progress(total=3, what="steps"), [], "x.py") == 143
    gc.collect()
    *_, last = capsys.readouterr().err.splitlines()
    assert not lost and last == "x.py: interrupted; --resume goes on from the last checkpoint"
