"""eval.py --method dimefm: scores from the disk equal those in memory, rows, means, caches, the page, and mistakes."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.benchmark_files import ArrayPictures, Listing
from data.benchmarks import BenchmarkConfig, open_benchmark
from data.toy import SHAPES
from data.views import normalised, plain_view
from methods import clip_judging, clip_towers
from methods.clip_judging import Eval, evaluate, means
from methods.clip_towers import open_towers
from methods.core.zero_shot import class_vectors, zero_shot_scores
from networks.clip import load_clip
from networks.clip_students import StudentConfig, build_student, student_spec, student_state
from utils.config import idle_options, parse
from utils.errors import UserError
from utils.files import save_tensors
from utils.rng import seeded
from utils.scores import accuracy

CPU = torch.device("cpu")
QUICK = "--mode linear_probe --probe_lrs 1e-2 1e-1 --search_epochs 1 --probe_epochs 2"
COLOURS = {"n01440764": (200, 40, 40), "n01443537": (40, 200, 40)}  # tench and goldfish


def make_student(clip, seed=0, dim=0):
    with seeded(seed):
        net = build_student(student_spec(StudentConfig(student="vit_tiny")), dim or clip.dim).eval()
    return net


def save_student(path, net, **note):
    save_tensors(path, student_state(net, student_spec(StudentConfig(student="vit_tiny")), note))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A cache with the tiny CLIP and its features, and the run folder of a student that has not learned anything."""
    root = tmp_path_factory.mktemp("world")
    clip = load_clip("tiny", root / "cache")
    net = make_student(clip)
    save_student(root / "run" / "student.pt", net, teacher="tiny", teacher_fingerprint=clip.fingerprint)
    return root, clip, net


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A working folder with that cache and a run folder of its own."""
    root, _, _ = world
    (tmp_path / "cache").symlink_to(root / "cache")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "student.pt").symlink_to(root / "run" / "student.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def judge(line):
    """The records of the last result.json by name, after running this command."""
    words = shlex.split(f"--device cpu --workers 1 --toy_images 60 --ckpt run {line}")
    evaluate(parse(Eval, "eval", words)[0])
    path = max(Path().rglob("result.json"), key=lambda path: path.stat().st_mtime_ns)
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


def score(record):
    return record["metrics"][record["protocol"]["metric"]]["mean"]


def paint(place, count, size=(20, 14)):
    for wnid, colour in COLOURS.items():
        (place / wnid).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, tuple(min(255, part + 3 * i) for part in colour)).save(place / wnid / f"{i}.png")


# --- zero-shot -------------------------------------------------------------------------------------------------------


def in_memory(net, clip, found, template="a photo of a {}."):
    """Accuracy of a student that was never saved, one image at a time."""
    listing = found.split("test")
    views = torch.stack([plain_view(listing.pictures.image(row), 32) for row in range(len(listing.pictures))])
    with torch.no_grad():
        features = torch.cat([net(part) for part in normalised(views).split(64)])
    return accuracy(zero_shot_scores(features, class_vectors(clip.texts, found.words, [template])), listing.labels)


def test_a_reloaded_student_scores_as_in_memory(world, here):
    _, clip, net = world
    toy = open_benchmark(BenchmarkConfig(dataset=("toy",)), "toy")
    rows = judge("--dataset toy --batch_size 64")
    assert score(rows["student, toy, zero-shot"]) == in_memory(net, clip, toy)
    assert rows["student, toy, zero-shot"]["size"] == 300
    assert rows["teacher, toy, zero-shot"]["protocol"]["source"] == "tiny"
    # Another student scores otherwise, so that equality says something.
    other = make_student(clip, seed=1)
    save_student(here / "run" / "other.pt", other, teacher="tiny", teacher_fingerprint=clip.fingerprint)
    again = judge("--dataset toy --batch_size 64 --ckpt run/other.pt")
    assert (
        score(again["student, toy, zero-shot"]) == in_memory(other, clip, toy) != score(rows["student, toy, zero-shot"])
    )


def test_features_are_made_once(here, monkeypatch):
    first = judge("--dataset toy")
    monkeypatch.setattr(clip_towers.FeatureCache, "_extract", lambda *_: pytest.fail("features were made again"))
    monkeypatch.setattr(clip_towers, "class_vectors", lambda *_: pytest.fail("sentences were encoded again"))
    assert judge("--dataset toy")["student, toy, zero-shot"]["metrics"] == first["student, toy, zero-shot"]["metrics"]


def test_features_in_parts_go_on_where_they_were(world, here, monkeypatch):
    monkeypatch.setattr(clip_towers, "PART", 100)
    expected = judge("--dataset toy --rows student")
    (folder,) = (path.parent for path in (here / "cache" / "clip_features").rglob("000000100.pt"))
    (folder / "000000100.pt").unlink()
    asked = []
    extract = clip_towers.FeatureCache._extract
    monkeypatch.setattr(clip_towers.FeatureCache, "_extract", lambda *args: asked.append(args[3]) or extract(*args))
    assert judge("--dataset toy --rows student").keys() == expected.keys()
    assert asked == [range(100, 200)]


def test_what_is_kept_is_what_was_asked_for(world, here):
    """The same images cropped and squeezed, the same names in other sentences: none is taken for the other."""
    root, clip, _ = world
    (tower,) = open_towers(("teacher",), Path(), "tiny", str(root / "cache"), CPU)
    cache = clip_towers.FeatureCache(here / "kept", 1, 2, CPU)
    pictures = ArrayPictures(np.random.default_rng(0).integers(0, 256, (3, 20, 44, 3), dtype=np.uint8))
    listing = Listing(pictures, torch.zeros(3).long(), ("a",))
    for crop in (True, False, True, False):
        views = torch.stack([plain_view(pictures.image(row), 32, crop) for row in range(3)])
        assert torch.allclose(cache.images(tower, listing, "c", crop, ""), clip.images(normalised(views)), atol=1e-5)
    for names in (("circle", "square"), ("square", "circle")):
        for template in ("a {}", "no {} at all", "a {}"):
            expected = class_vectors(clip.texts, names, [template])
            assert torch.equal(cache.classes(tower, names, [template]), expected)


def test_templates_and_names_are_the_users(here):
    photo = judge("--dataset toy --rows teacher")
    imagenet = judge("--dataset toy --rows teacher --templates imagenet")
    assert imagenet["teacher, toy, zero-shot"]["protocol"]["templates"] == "imagenet"
    assert photo["teacher, toy, zero-shot"]["protocol"]["about"] == "mean of 1 sentence a class"
    assert imagenet["teacher, toy, zero-shot"]["protocol"]["about"] == "mean of 80 sentences a class"
    names = here / "names.txt"
    # By name, in any order.
    names.write_text("".join(f"{name}\tdrawn {name}\n" for name in reversed(SHAPES)))
    judge(f"--dataset toy --rows teacher --class_names {names}")
    names.write_text("circle\tdisc\n")
    with pytest.raises(UserError, match=r"--class_names .*names.txt has no name for square of toy"):
        judge(f"--dataset toy --class_names {names}")
    names.write_text("circle\nsquare\n")
    with pytest.raises(UserError, match="has 2 names for the 6 classes of toy"):
        judge(f"--dataset toy --class_names {names}")


# --- linear probe ----------------------------------------------------------------------------------------------------


def test_a_probe_beats_chance_and_trains_nothing_else(world, here):
    _, clip, net = world
    paint(here / "set" / "train", 12)
    paint(here / "set" / "test", 6)
    before = (here / "run" / "student.pt").read_bytes()
    weights = [part.clone() for part in (*net.state_dict().values(), *clip.net.state_dict().values())]
    rows = judge(f"--dataset folder --data_path set {QUICK}")
    found = rows["student, folder, linear probe"]
    assert score(found) > 80 and found["protocol"]["trained"] == clip.dim * 2 + 2
    assert found["protocol"]["about"] == "last of 2 epochs on 24 images" and found["protocol"]["epochs"] == [2]
    assert (here / "run" / "student.pt").read_bytes() == before
    after = (*net.state_dict().values(), *clip.net.state_dict().values())
    assert all(torch.equal(one, other) for one, other in zip(weights, after, strict=True))


def test_what_is_probed_has_no_gradient(world):
    root, _, _ = world
    for tower in open_towers(("student", "teacher"), root / "run" / "student.pt", "", str(root / "cache"), CPU):
        assert not tower.encode(torch.zeros(1, 3, 32, 32)).requires_grad


def test_few_shots_have_a_probe_for_each_draw(here):
    rows = judge(f"--dataset toy --rows student --num_shots 5 {QUICK}")
    found = rows["student, toy, linear probe"]
    assert len(found["metrics"]["accuracy"]["values"]) == 3 and found["protocol"]["seeds"] == [0, 1, 2]
    assert found["protocol"]["about"] == "last of 2 epochs on 30 images"


def test_probes_that_are_done_are_not_done_again(here, monkeypatch):
    line = f"--dataset toy --rows student --elevater_compat --save_predictions {QUICK}"
    first = judge(line)
    monkeypatch.setattr(clip_judging, "probe", lambda *_: pytest.fail("trained again"))
    assert judge(line) == first


def test_probes_of_anything_else_are_trained_anew(here, monkeypatch):
    """In one folder: the mode of ELEVATER, other sentences to begin with, another seed."""
    asked, real = [], clip_judging.probe
    monkeypatch.setattr(clip_judging, "probe", lambda *args: asked.append(1) or real(*args))
    line = "--dataset toy --rows student --mode linear_probe --no_tuning --probe_epochs 1 --save_dir here"
    for count, more in enumerate(("", "--elevater_compat", "--templates simple", "--seed 1", "--lr 0.2"), 1):
        for _ in range(2):
            judge(f"{line} {more}")
            assert len(asked) == count


# --- results ---------------------------------------------------------------------------------------------------------


def test_any_clip_is_a_row(here, capsys):
    rows = judge("--dataset toy --rows student tiny")
    assert list(rows) == ["student, toy, zero-shot", "tiny, toy, zero-shot"]
    text = capsys.readouterr().out
    assert "| data           | images |   metric | chance | student | tiny |" in text
    assert "| toy, zero-shot |    300 | accuracy |   16.7 |" in text


def test_a_teacher_alone_needs_no_student(here):
    rows = judge("--dataset toy --rows teacher --teacher tiny --ckpt '' --name mine")
    assert list(rows) == ["teacher, toy, zero-shot"] and list(Path("runs/dimefm/mine/eval").iterdir())


def test_robustness_is_the_mean_over_imagenets_relatives(here):
    for name in ("imagenet-a", "imagenet-r"):
        paint(here / "sets" / name, 4)
    rows = judge("--mode robustness --dataset imagenet-a imagenet-r --data_path sets --rows teacher")
    names = ["teacher, imagenet-a, robustness", "teacher, imagenet-r, robustness"]
    mean = rows["teacher, mean of 2 of the 5, robustness, robustness"]
    assert score(mean) == sum(score(rows[name]) for name in names) / 2 and mean["size"] == 16
    assert "imagenet-a has 2 classes here; published are 200" in rows[names[0]]["protocol"]["notes"]
    assert rows[names[0]]["protocol"]["templates"] == rows[names[0]]["protocol"]["class_names"] == "imagenet"


def test_the_mean_over_elevater_is_unweighted():
    def record(data, metric, value, size):
        protocol = {"protocol": "zero-shot", "network": "student", "data": data, "metric": metric}
        return {"name": data, "size": size, "metrics": {metric: {"mean": value}}, "protocol": protocol}

    some = [record("dtd", "accuracy", 40.0, 10), record("caltech101", "mean-per-class", 80.0, 1000)]
    (found,) = means([*some, record("toy", "accuracy", 0.0, 1)])
    assert (
        found["metrics"]["mean"]["mean"] == 60.0
        and found["name"] == "student, mean of 2 of the 20, ELEVATER, zero-shot"
    )
    assert means(some[:1]) == []
    probed = [one | {"protocol": one["protocol"] | {"lr": [0.1], "seeds": [0]}} for one in some]
    (found,) = means(probed)
    assert found["protocol"]["seeds"] == [0] and "lr" not in found["protocol"]


def test_predictions_are_in_elevaters_format(here):
    judge("--dataset toy --rows student --save_predictions")
    (path,) = Path("run").rglob("predictions/*.json")
    found = json.loads(path.read_text())
    assert path.name == "student-toy-zeroshot.json" and found["dataset_name"] == "toy" and found["n_shot"] == 0
    ((first, *rest),) = found["predictions"]
    assert len(rest) == 299 and len(first) == 6 and sum(first) == pytest.approx(1, abs=1e-5)
    assert found["num_visual_params"] < found["num_params"] and found["num_trainable_params"] == 0


def test_the_page_of_a_run_shows_scores_and_examples(here):
    (here / "run" / "config.yaml").write_text("method: dimefm\ndistill: {student: vit_tiny, epochs: 3}\n")
    (here / "run" / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "agreement": 5.0}\n{"step": 2, "loss": 1.0}\n')
    judge("--dataset toy")
    judge("--dataset toy --templates simple")
    page = (here / "run" / "report.html").read_text()
    for text in ("toy, zero-shot, simple", "Agreement with the teacher", "is circle · student: ", "Test images"):
        assert text in page
    assert page.count("<img") == 8


def test_options_that_do_nothing_are_told():
    cfg = parse(Eval, "eval", ["--num_shots", "5", "--dataset", "dtd", "--toy_size", "64"])[0]
    assert idle_options(cfg) == [
        "--toy_size 64 does nothing without --dataset toy",
        "--num_shots 5 does nothing without --mode linear_probe",
    ]
    for line, told in (
        ("--dataset toy --toy_images 60", "--toy_images 60 does nothing without --mode linear_probe"),
        ("--elevater_compat", "--elevater_compat True does nothing without --mode linear_probe or images of several"),
        ("--rows tiny --teacher tiny", "--teacher tiny does nothing without student or teacher among --rows"),
        (
            "--mode linear_probe --init_head_with_text_encoder false --templates simple",
            "--templates simple does nothing without --init_head_with_text_encoder",
        ),
    ):
        (said,) = idle_options(parse(Eval, "eval", line.split())[0])
        assert said.startswith(told)
    for line in ("--dataset csv --elevater_compat", "--mode linear_probe zeroshot --templates simple --no_tuning"):
        assert idle_options(parse(Eval, "eval", line.split())[0]) == []


def test_the_page_tells_evaluations_apart(here):
    (here / "run" / "config.yaml").write_text("method: dimefm\ndistill: {student: vit_tiny}\n")
    names = here / "names.txt"
    names.write_text("".join(f"{name}\tdrawn {name}\n" for name in SHAPES))
    judge("--dataset toy --mode linear_probe --no_tuning --probe_epochs 1")
    judge(f"--dataset toy --class_names {names}")
    page = (here / "run" / "report.html").read_text()
    assert "linear probe, no search" in page and f"zero-shot, names {names}" in page


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_student_of_another_teacher_is_refused(world, here):
    _, clip, net = world
    save_student(here / "run" / "odd.pt", net, teacher="tiny", teacher_fingerprint="f" * 64)
    with pytest.raises(UserError, match=r"odd.pt learned from another CLIP than tiny \(ffffffffffff, not"):
        judge("--dataset toy --ckpt run/odd.pt")
    save_student(here / "run" / "wide.pt", make_student(clip, dim=48), teacher="tiny")
    with pytest.raises(UserError, match=f"wide.pt has 48 features and the sentences of tiny have {clip.dim}"):
        judge("--dataset toy --ckpt run/wide.pt")


def test_a_student_that_is_not_there_is_told(here):
    with pytest.raises(UserError, match=r"no student at run/gone.pt"):
        judge("--dataset toy --ckpt run/gone.pt")
    cfg = parse(Eval, "eval", ["--dataset", "toy"])[0]
    with pytest.raises(UserError, match=r"no student at runs/dimefm/pools/student.pt; run distill.py first"):
        evaluate(cfg)
    with pytest.raises(UserError, match="--rows and --mode need at least one value"):
        replace(cfg.judge, rows=()).check()


def test_a_probe_without_training_images_is_told_before_a_network_is_loaded(here, monkeypatch):
    paint(here / "set" / "test", 2)
    monkeypatch.setattr(clip_judging, "open_towers", lambda *_: pytest.fail("loaded first"))
    with pytest.raises(UserError, match="folder has no train images here"):
        judge("--dataset folder --data_path set --mode linear_probe")
