"""What users get wrong with DIME-FM's eval.py, and what the released code got wrong: one clear line, and no scores."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from methods import clip_judging
from methods.clip_gallery import refresh_page
from networks.clip_students import StudentConfig, build_student, student_spec, student_state
from tests.conftest import limited, works
from tests.dimefm_world import JUDGE, change, make_world, no_networks, own_world, told
from tests.processes import held
from utils.files import save_tensors

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


@pytest.fixture
def here(world, own_folder, monkeypatch) -> None:
    own_world(world, monkeypatch)


@pytest.fixture
def no_network(monkeypatch) -> None:
    no_networks(monkeypatch)


@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--ckpt gone", ["no student at gone; run distill.py first"]),
        ("--ckpt pics", ["no student at pics/student.pt"]),
        ("--ckpt made/checkpoint_00000004.pt", ["is a checkpoint of a run, not a student", "student.pt"]),
        ("--ckpt made/config.yaml", ["student made/config.yaml cannot be read"]),
        ("--teacher nobody/x", ["the weights of nobody/x", "--teacher"]),
        ("--teacher a/b/c", ["no CLIP at a/b/c", "--teacher"]),
        ("--rows student a/b/c", ["no CLIP at a/b/c", "--rows"]),
        ("--teacher pics", ["CLIP folder pics cannot be loaded"]),
        ("--dataset folderr", ["unknown dataset 'folderr'", "'folder'"]),
        ("--data_path gone", ["no folder gone; correct --data_path"]),
        ("--dataset dtd food101", ["no dtd in set", "dtd/test/<class>/..."]),
        ("--mode robustness --dataset imagenet-1k", ["no imagenetv2 in set"]),
        ("--mode robustness", ["--mode robustness judges on imagenetv2", "not on folder", "--mode zeroshot"]),
        ("--mode probe", ["--mode does not know 'probe'", "'linear_probe'"]),
        ("--metric roc", ["--metric does not know 'roc'", "'roc_auc'"]),
        ("--metric 11point_mAP", ["cannot be scored by 11point_mAP", "several labels"]),
        ("--templates nothing", ["no templates called 'nothing'"]),
        ("--templates texts.txt", ["'a picture of 0' has no {}"]),
        ("--class_names texts.txt", ["has 30 names for the 2 classes of folder"]),
        ("--class_names gone.txt", ["no class names called 'gone.txt'"]),
        ("--mode linear_probe --num_shots 1", ["leaves no image to train on", "--no_tuning"]),
        ("--mode linear_probe --no_tuning --lr 10 --l2 10", ["--lr 10 times --l2 10", "diverges"]),
    ],
)
def test_words(refused, monkeypatch, flags, parts):
    monkeypatch.setattr("networks.prompts.find_spec", lambda name: None)  # without clip-benchmark
    told(refused, "eval", flags, parts)


def test_a_probe_needs_images_to_train_on(refused, no_network):
    Path("set/train").rename("else")
    told(refused, "eval", "--mode linear_probe", ["folder has no train images here; a probe needs train"])
    Path("set/test").rename("set/train")
    told(refused, "eval", "", ["set has training images only; it needs test"])


def test_a_search_that_fails(refused):
    flags = "--mode linear_probe --probe_lrs 1e30 --search_epochs 1"
    told(refused, "eval", flags, ["all 11 trials of the probe diverged", "--probe_lrs"], code=1)


# --- students


def test_damaged_students(refused):
    for content in (b"", b"damaged", Path("made/student.pt").read_bytes()[:900]):
        Path("made/student.pt").write_bytes(content)
        told(refused, "eval", "", ["student made/student.pt cannot be read"])


def saved(**changed) -> dict:
    return torch.load("made/student.pt", weights_only=True) | changed


def of_spec(**changed) -> dict:
    return saved(spec=saved()["spec"] | changed)


@pytest.mark.parametrize(
    "make, parts",
    [
        (lambda: [1], ["holds list, not a student"]),
        (lambda: {"net": {"weight": torch.zeros(2)}}, ["it is no ViT or Swin of this kind"]),
        (lambda: {"image_state_dict": [1]}, ["it is no ViT or Swin of this kind"]),
        (lambda: {"image_state_dict": {"visual.conv1.weight": torch.zeros(64, 3, 8, 8)}}, ["lacks its projection"]),
        (lambda: saved(format="2"), ["is of the format '2'"]),
        (lambda: saved(spec={}), ["is damaged", "restore"]),
        (lambda: saved(note=None), ["is damaged", "restore"]),
        (lambda: saved(student=[1]), ["is damaged", "restore"]),
        (lambda: of_spec(options={}), ["is damaged", "restore"]),
        (lambda: of_spec(kind="other"), ["is damaged", "restore"]),
        (
            lambda: of_spec(options=saved()["spec"]["options"] | {"layers": 3}),
            ["odd.pt lacks 'visual.transformer.resb"],
        ),
        (lambda: of_spec(image_size=64), ["odd.pt has 'visual.positional_embedding' of shape (5, 64), not (17, 64)"]),
        (lambda: saved(note={"teacher": "tiny", "teacher_fingerprint": "f" * 64}), ["learned from another CLIP"]),
        (lambda: saved(note={"teacher": "gone/a/b"}), ["no CLIP at gone/a/b"]),
    ],
)
def test_checkpoints_that_are_no_such_student(refused, make, parts):
    save_tensors("odd.pt", make())
    told(refused, "eval", "--ckpt odd.pt", parts)


def test_a_student_of_another_width(refused):
    spec = student_spec(StudentConfig(student="vit_tiny"))
    save_tensors("odd.pt", student_state(build_student(spec, 48), spec, {"teacher": "tiny"}))
    told(refused, "eval", "--ckpt odd.pt", ["has 48 features and the sentences of tiny have 64", "--teacher"])


# --- data sets and what is kept of them


def test_sets_that_are_not_whole(refused):
    change("set/test/ant/3.png", lambda data: data[:60])
    told(refused, "eval", "", ["set/test/ant/3.png cannot be decoded"])
    Path("set/test/ant/3.png").unlink()
    Path("set/test.csv").write_text("file,label\ntest/ant/3.png,ant\n")
    told(refused, "eval", "--dataset csv", ["1 of 1 images named in", "set/test/ant/3.png"])
    Path("set/test.csv").write_text("file,label\ntest/ant/1.png,\n")
    told(refused, "eval", "--dataset csv", ["csv has no test images of any class"])
    Path("set/dev.jsonl").write_text("")
    told(refused, "eval", "--dataset hateful-memes", ["hateful-memes has no test images"])
    Path("set/dev.jsonl").write_text('{"img": "test/ant/1.png", "label": 2}\n')
    told(refused, "eval", "--dataset hateful-memes", ["has a test image of class 2; its 2 count from 0"])


@pytest.mark.parametrize(
    "text, parts",
    [
        (b"ant\tan ant\n", ["has no name for bee of folder"]),
        (b"bee\nant\n", ["has ant of folder in another place", "in the order"]),
        (b"\xff\t\xfe\n", ["is not UTF-8"]),
        (b"", ["class names names.txt is empty"]),
    ],
)
def test_class_names_that_do_not_fit(refused, text, parts):
    Path("names.txt").write_bytes(text)
    told(refused, "eval", "--class_names names.txt", parts)


def test_damaged_caches_are_told_and_made_again(refused):
    for damage in (lambda path: path.write_bytes(b"damaged"), lambda path: torch.save({}, path)):
        for path in Path("cache/clip_features").rglob("*.pt"):
            damage(path)
        told(refused, "eval", "", ["cached features cache/clip_features/", "remove it, and it is made again"])
    shutil.rmtree("cache/clip_features")
    works("eval", *JUDGE)


def test_a_disk_that_is_full(refused):
    shutil.rmtree("cache/clip_features")
    with limited(1_000):
        assert "larger than this disk or limit allows" in refused("eval", *JUDGE)
    assert not list(Path("e").rglob("result.json"))
    works("eval", *JUDGE)
    works("eval", *JUDGE)  # an earlier result is never replaced
    assert {path.parent.name for path in Path().glob("e*/result.json")} == {"e", "e-2"}


def test_a_folder_where_another_evaluation_goes_on(refused):
    with held("e") as other:
        line = refused("eval", *JUDGE)
        assert f"e is being filled by process {other.pid} on" in line and "choose another --save_dir" in line
    assert [path.name for path in Path("e").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "told, parts",
    [
        ([{"file": "../../../config.yaml", "text": "x"}], ["has the picture '../../../config.yaml'", "not beside it"]),
        ([{"file": "/etc/passwd", "text": "x"}], ["has the picture '/etc/passwd'", "not beside it"]),
        ([{"file": "secret.txt", "text": "x"}], ["secret.txt is no PNG picture"]),
        ([{"text": "x"}], ["is no list of examples", "'file'"]),
        ({"a": 1}, ["is no list of examples", "'examples'"]),
        ({"format": 1, "examples": {"a": 1}}, ["is no list of examples"]),
        ({"format": 1, "examples": [{"file": "../result.json", "text": "x"}]}, ["which is not beside it"]),
        ({"format": 2, "examples": []}, ["of format 2, newer than this 1; update the toolkit"]),
        ([{"file": 3, "text": "x"}], ["is no list of examples"]),
    ],
)
def test_examples_that_are_other_files(refused, monkeypatch, told, parts):
    """The page of a run shows what the last evaluation left, and is passed on: no other file may get into it."""
    monkeypatch.setattr(clip_judging, "refresh_page", refresh_page)
    folder = Path("made/eval/theirs")
    folder.mkdir(parents=True)
    (folder / "secret.txt").write_text("secret")
    (folder / "examples.json").write_text(json.dumps(told))
    os.utime(folder / "examples.json", (2**31, 2**31))  # that of the last evaluation, says the archive it is from
    Path("made/report.html").unlink(missing_ok=True)
    line = refused("eval", *JUDGE, "--save_dir", "made/eval/aaa")
    assert "examples.json" in line or "secret.txt" in line
    assert all(part in line for part in parts), line
    assert not Path("made/report.html").exists()
