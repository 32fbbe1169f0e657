"""A small CLIP of drawn shapes through the three scripts, each in a process of its own: it learns what its teacher
knows from images and sentences that have nothing to do with each other. A shorter form of configs/smoke/dimefm.yaml."""

from pathlib import Path

import pytest

from tests.conftest import ROOT, contents
from tests.processes import alone
from utils.files import read_json
from utils.run import read_log

CONFIG = ("--config", ROOT / "configs/smoke/dimefm.yaml", "--device", "cpu")
SHORTER = {
    "buffer": (*CONFIG, "--teacher_images", 2400),
    "distill": (*CONFIG, "--epochs", 12),
    "eval": CONFIG,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder in which the three commands ran, and what each printed; nobody writes there."""
    root, said = tmp_path_factory.mktemp("clip"), {}
    for verb, flags in SHORTER.items():
        done = alone(verb, *flags, cwd=root)
        assert done.rc == 0, f"{verb}: {done.stderr[-2000:]}"
        said[verb] = done.stdout
    return root, said


@pytest.fixture(scope="module")
def run(demo) -> Path:
    return demo[0] / "runs/dimefm/shapes"


def scores(run: Path) -> dict[str, float]:
    rows = read_json(run / "eval/zeroshot-linear_probe-toy-seed0/result.json", "result")["rows"]
    return {row["name"]: row["metrics"]["accuracy"]["mean"] for row in rows}


def test_the_student_names_shapes_without_having_been_told_their_names(run):
    found = scores(run)  # guessing: 16.7 ± 2.2 of 300 test images
    assert found["teacher, toy, zero-shot"] > 80
    assert found["student, toy, zero-shot"] > 35
    assert found["student, toy, linear probe"] > 40


def test_its_choice_of_sentences_comes_to_be_the_teachers(run):
    agreed = [row["agreement"] for row in read_log(run) if "agreement" in row]
    assert len(agreed) == 13 and agreed[0] < 3  # by chance: one of some two hundred sentences
    assert agreed[-1] > 12 and agreed[-1] > agreed[4]


def test_losses_fall(run):
    rows = [row for row in read_log(run) if "loss" in row]
    assert {"loss", "vl", "pvl", "lr", "undecodable"} <= rows[0].keys() and "udist" not in rows[0]
    assert rows[-1]["vl"] < 0.5 * rows[0]["vl"] and rows[-1]["pvl"] < 0.5 * rows[0]["pvl"]


def test_the_files_are_there(run):
    files = contents(run)
    assert {"student.pt", "config.yaml", "log.jsonl", "report.html", "inputs.json"} <= files.keys()
    assert {"buffers/pools.yaml", "buffers/image_feats.npy", "buffers/text_feats.json"} <= files.keys()
    page = files["report.html"].decode()
    assert "Agreement with the teacher" in page and "linear probe" in page and "data:image/png" in page


def test_each_verb_says_what_it_did(demo):
    said = demo[1]
    assert "of drawn shapes by their names (chance 16.7 %)" in said["buffer"] and "pools.yaml" in said["buffer"]
    assert "of held-out images the student takes the teacher's sentence for" in said["distill"]
    assert "| toy, zero-shot" in said["eval"] and "student" in said["eval"] and "teacher" in said["eval"]


def test_a_second_run_is_refused_and_a_longer_one_goes_on(demo, run):
    again = alone("distill", *SHORTER["distill"], cwd=demo[0])
    assert again.rc == 2 and "already holds a run" in again.stderr
    before = contents(run)["student.pt"]
    done = alone("distill", *SHORTER["distill"], "--resume", cwd=demo[0])
    assert done.rc == 0 and contents(run)["student.pt"] == before
