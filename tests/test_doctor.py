"""--doctor: what it says, that nothing is begun, and that what is in a command's way ends with exit code 2."""

import re

import pytest

from methods import doctor
from methods.command import command
from tests.conftest import ROOT
from utils import machine

TINY = ("--dataset", "toy", "--toy_images", "40", "--image_size", "8", "--image_encoder", "ConvNetD1W8")
TINY = (*TINY, "--text_encoder", "tfidf", "--text_dim", "16", "--device", "cpu")


@pytest.mark.parametrize("method", ["vldd", "mtt", "podd", "vlcp", "dimefm"])
@pytest.mark.parametrize("verb", ["buffer", "eval"])
def test_a_row_is_looked_over_and_nothing_is_begun(verb, method, own_folder, tmp_path, capsys):
    assert command(verb, ["--config", f"{ROOT}/configs/smoke/{method}.yaml", "--doctor"]) == 0
    said = capsys.readouterr().out
    for line in ("torch 2.", "cpu: ", "compiler", "results: runs", "device: ", f"nothing is in the way of {verb}.py"):
        assert line in said
    if method in ("vldd", "mtt", "podd"):
        assert re.search(r"data: train [\d,]+", said) and "weights" in said
    assert not (tmp_path / "runs").exists()


def test_what_experts_take_is_told_and_compared_with_the_disk(own_folder, capsys, monkeypatch):
    words = [*TINY, "--num_experts", "1000", "--train_epochs", "9", "--doctor"]
    assert command("buffer", words) == 0
    said = capsys.readouterr().out
    (image, text), (gib,) = (
        re.search(r"learn: ([\d,]+) of img and ([\d,]+) of txt", said).groups(),
        re.search(r"experts: 1000 of 10 snapshots each, ([\d.]+) GiB", said).groups(),
    )
    weights = int(image.replace(",", "")) + int(text.replace(",", ""))
    assert float(gib) == pytest.approx(1000 * 10 * weights * 4 / machine.GIB, abs=0.01)
    monkeypatch.setattr(doctor, "free_bytes", lambda path: 1 << 20)
    assert command("buffer", words) == 2
    assert "give --buffer_path on a larger disk" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, told",
    [
        (("--dataset", "flickr"), "--ann_root"),
        (("--dataset", "npz", "--method", "mtt", "--data_path", "nowhere.npz"), "nowhere.npz"),
        ((*TINY, "--device", "cuda:7"), "cuda:7"),
    ],
)
def test_what_is_missing_ends_it(words, told, own_folder, capsys):
    assert command("buffer", [*words, "--doctor"]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.count("\n") == 1 and "nothing is in the way" not in captured.out


def test_experts_that_are_not_there_end_it(own_folder, capsys):
    assert command("distill", [*TINY, "--buffer_path", "elsewhere", "--doctor"]) == 2
    assert "no experts in elsewhere" in capsys.readouterr().err


def test_versions_are_compared_with_what_is_asked_for(monkeypatch):
    assert machine.versions()[1] == []
    monkeypatch.setattr(machine.metadata, "version", lambda name: {"torch": "2.7.1+cpu", "timm": "2.0"}.get(name, "99"))
    wrong = machine.versions()[1]
    assert any(line.startswith("torch 2.7.1+cpu is not >=2.8,<3") for line in wrong)
    assert any(line.startswith("timm 2.0 is not") for line in wrong)
    assert not any(line.startswith("pillow") for line in wrong)
