"""buffer.py under torchrun: every file as one process writes it; one of two is killed, and one or two go on."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, contents, works
from tests.processes import told, torchrun, verb
from tests.test_resume_mtt import write_data
from utils.run import read_log

PAIRS = ("--dataset", "toy", "--toy_images", "60", "--image_size", "8", "--image_encoder", "ConvNetD1W8")
PAIRS = (*PAIRS, "--text_encoder", "tfidf", "--text_dim", "16", "--device", "cpu", "--workers", "1")
PAIRS = (*PAIRS, "--num_experts", "3", "--train_epochs", "3", "--batch_size_train", "64", "--buffer_path", "b")
IMAGES = ("--method", "mtt", "--dataset", "npz", "--data_path", "../data.npz", "--model", "ConvNetD1W8", "--zca")
IMAGES = (*IMAGES, "--num_experts", "5", "--together", "2", "--train_epochs", "2", "--batch_train", "8")
IMAGES = (*IMAGES, "--device", "cpu", "--buffer_path", "b")
LEAF = Path("b", "toy", "ConvNetD1W8", "tfidf")

KILLED = f"""
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from methods.command import command
from methods.core.training import EpochLoop
real = EpochLoop._one_epoch
def one_epoch(self, batches, bar, what):
    if self.epoch == 2 and os.environ["RANK"] == "1":
        kept = f"expert_{{int(what.split()[-1]):03d}}/epoch_002.safetensors"  # written while training goes on
        while not list(Path("b").rglob(kept)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, batches, bar, what)
EpochLoop._one_epoch = one_epoch
sys.exit(command("buffer", {list(PAIRS)}))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """place(name) makes a folder, in which commands run from then on."""

    def make(name):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        return tmp_path / name

    return make


def finished(folder):
    """All files but the one that says how the run was begun."""
    return {name: text for name, text in contents(folder / "b").items() if not name.endswith("config.yaml")}


def test_by_torchrun(place, tmp_path):
    one, two = place("one"), place("two")
    done = torchrun(ROOT / "buffer.py", *PAIRS, cwd=two)
    assert done.rc == 0, done.stderr[-3000:]
    said = [
        line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")
    ]  # PyTorch 2.8 tells of its peers
    assert said == [f"3 experts in {LEAF}"]
    place("one")
    works("buffer", *PAIRS)
    assert contents(two) == contents(one), "caches, too"

    cut = place("cut")
    (tmp_path / "killed.py").write_text(KILLED)
    done = torchrun("../killed.py", cwd=cut)
    assert done.rc != 0
    lines = [line for line in done.stderr.splitlines() if "buffer.py: error:" in line]
    assert len(lines) == 1 and "a process of this run ended before its time" in lines[0], done.stderr[-3000:]
    assert [path.parent.parent for path in cut.rglob("epoch_002*")], "what the killed one had done is there"
    assert list(cut.rglob("progress.pt"))
    shutil.copytree(cut, tmp_path / "cut2")
    works("buffer", *PAIRS, "--resume")
    assert finished(cut) == finished(one)
    place("cut2")
    again = verb("buffer", *PAIRS, "--resume")
    assert [end.rc for end in again] == [0, 0], told(again)
    assert finished(tmp_path / "cut2") == finished(one)


def test_companies_of_whitened_images(place, tmp_path):
    write_data(tmp_path / "data.npz")
    one, two = place("one"), place("two")
    done = verb("buffer", *IMAGES)
    assert [end.rc for end in done] == [0, 0], told(done)
    place("one")
    works("buffer", *IMAGES)
    assert contents(two) == contents(one) and list(two.rglob("zca.safetensors"))
    (leaf,) = (path.parent for path in two.rglob("log.jsonl"))
    assert [row["step"] for row in read_log(leaf)] == [2, 3, 4, 5, 8, 9, 10, 11, 13, 14]
    before = contents(two)
    place("two")
    done = verb("buffer", *IMAGES, "--resume", world=3)
    assert [end.rc for end in done] == [0, 0, 0] and contents(two) == before
    done = verb("buffer", *IMAGES, "--num_experts", "6", "--resume")
    assert [end.rc for end in done] == [0, 0], told(done)
    assert [row["expert"] for row in read_log(leaf)][-2:] == [5, 5]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--mom", "much"), "--mom takes a number, not 'much'"),
        (("--text_dropout",), "--text_encoder tfidf has no dropout; leave out --text_dropout"),
        (("--export", "out"), "buffer.py --export is the work of one process"),
        (("--seed", "1"), "already holds a run; --resume goes on with it"),
        (("--resume", "--seed", "1"), "holds a run with other options (seed was 0, is 1)"),
    ],
)
def test_mistakes_are_told_once(place, flags, says):
    place("run")
    works("buffer", *PAIRS, "--num_experts", "1", "--train_epochs", "1")
    done = verb("buffer", *PAIRS, "--train_epochs", "1", *flags)
    (line,) = told(done)
    assert line.startswith("buffer.py: error: ") and says in line and sorted(end.rc for end in done) == [1, 2]
