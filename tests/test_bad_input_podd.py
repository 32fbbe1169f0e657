"""What users get wrong with posters: one clear line, the right exit code, and nothing written or lost."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from methods import podd, poster_gallery
from methods.command import command
from tests.conftest import contents, works
from tests.test_seed_commands_podd import birds, tiny
from utils.files import load_tensors, read_json, write_json

pytestmark = pytest.mark.usefixtures("own_folder")

DIGITS = (
    *("--method", "podd", "--dataset", "digits", "--train_limit", "10", "--device", "cpu", "--model", "ConvNetD1W4"),
    *("--poster_width", "20", "--poster_height", "12", "--patch_num_x", "4", "--patch_num_y", "3", "--order", "table"),
)
JUDGED = ("--num_eval", "1", "--eval_steps", "2")
LEARN = (
    *(*DIGITS, *JUDGED, "--batch_size", "50", "--window", "2", "--totwindow", "4", "--max_outer_steps", "4"),
    *("--test_freq", "0", "--checkpoint_every", "1", "--draw", "false"),
)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """There is no page, whose charts take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(poster_gallery, "refresh_page", lambda folder: None)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Ten digits on a poster of 20 x 12: `made / run` with fixed labels, `made / learned` with learned ones."""
    root = tmp_path_factory.mktemp("made")
    for name, more in (("run", ()), ("learned", ("--train_y",)), ("white", ("--zca",))):
        works("distill", *LEARN, *more, "--cache_dir", root / "cache", "--save_dir", root / name)
    return root


def only_config(folder: str = "o") -> bool:
    return not Path(folder).exists() or [path.name for path in Path(folder).rglob("*")] == ["config.yaml"]


# --- words


@pytest.mark.parametrize(
    "verb, flags, parts",
    [
        ("distill", "--poster_class_num_x 4", ["--poster_class_num_x 4", "is 8", "10 classes"]),
        ("buffer", "--poster_class_num_y 3", ["--poster_class_num_y 3 is 15", "10 classes"]),
        ("distill", "--patch_num_x 2", ["48 of the poster's 240 pixels are in no patch", "at least --patch_num_x 3"]),
        ("distill", "--poster_height 30", ["in no patch", "--patch_num_y 4"]),
        ("distill", "--poster_width 7", ["a patch of 8 x 8 pixels does not fit", "7 x 12", "--poster_width"]),
        ("distill", "--class_area_width 21", ["a class area of 21 x 8", "lower --class_area_width"]),
        ("distill", "--class_area_width 1 --class_area_height 1 --poster_width 30", ["outside all class areas"]),
        ("distill", "--distill_batch_size 13", ["--distill_batch_size 13 is more than the 12 patches"]),
        ("distill", "--minwindow 3", ["--minwindow 3 is beyond", "--totwindow 4 - --window 2 = 2"]),
        ("distill", "--window 5", ["--window 5 is more than --totwindow 4"]),
        ("distill", "--cctype 4", ["--cctype is 4; it is 0, 1, 2 or 3"]),
        ("distill", "--ddtype curiculum", ["--ddtype", "'curiculum'", "'curriculum'"]),
        ("distill", "--syn_strategy flip_rotat", ["'rotat'", "'rotate'"]),
        ("distill", "--real_strategy colour", ["'colour'", "'color'"]),
        ("eval", "--syn_strategy flip_rotat", ["'rotat'", "'rotate'"]),
        ("distill", "--select val --holdout 0", ["--select val needs held-out", "--holdout 0.1", "--select train"]),
        ("distill", "--outer_optim SGD", ["--outer_optim", "'SGD'", "Adam"]),
        ("distill", "--inner_optim Adm", ["--inner_optim", "'Adm'", "'Adam'"]),
        ("distill", "--update_steps 6", ["--update_steps 6", "take 1 to 5"]),
        ("distill", "--clip_coef 1", ["--clip_coef 1", "such as 0.9"]),
        ("distill", "--inner_lr 0", ["--inner_lr is 0.0", "greater than 0"]),
        ("distill", "--comp_ipc 0", ["--comp_ipc is 0"]),
        ("distill", "--label_mode soft", ["--label_mode", "'soft'", "area"]),
        ("distill", "--mode detached", ["--mode", "'detached'", "exact"]),
        ("distill", "--eval_steps 0", ["--eval_steps is 0"]),
        ("distill", "--arch convnt", ["unknown --model 'convnt'", "'convnet'"]),
        ("distill", "--arch ConvNetD5", ["ConvNetD5", "8"]),
        ("distill", "--init_from nowhere.pt", ["no poster at nowhere.pt"]),
        ("distill", "--order tabel", ["there is no file tabel", "'table'"]),
        ("distill", "--order text --order_encoder nowhere/such", ["nowhere/such", "--order_encoder words"]),
        ("distill", "--start_epoch 3", ["unknown flag --start_epoch"]),
        ("eval", "--source randm", ["--source", "'randm'", "'random'"]),
        ("eval", "--networks convnet VGG12", ["VGG12"]),
        ("eval", "--random_lrs 0", ["--random_lrs", "greater than 0"]),
    ],
)
def test_words(refused, tmp_path, verb, flags, parts):
    base = {"distill": (*LEARN, "--save_dir", "o"), "eval": (*DIGITS, *JUDGED), "buffer": (*DIGITS,)}[verb]
    line = refused(verb, *base, *flags.split())
    assert all(part in line for part in parts), line
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "config.yaml"]


def test_the_released_defaults_leave_pixels_out(refused):
    """475 x 210 in 16 x 6 patches of 32: nobody was told."""
    found = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(20) % 10
    np.savez("d.npz", train_images=found, train_labels=labels, test_images=found, test_labels=labels)
    flags = ("--method", "podd", "--dataset", "npz", "--data_path", "d.npz", "--order", "table", "--holdout", "0")
    sides = ("--poster_width", "475", "--poster_height", "210")
    areas = ("--class_area_width", "120", "--class_area_height", "120")
    line = refused("distill", *flags, *sides, *areas, "--select", "last", "--save_dir", "o", "--device", "cpu")
    assert "8550 of the poster's 99750 pixels are in no patch" in line and "--patch_num_y 7" in line and only_config()


def test_a_corrected_command_needs_no_resume(refused):
    refused("distill", *LEARN, "--save_dir", "o", "--distill_batch_size", "99")
    assert only_config()
    works("distill", *LEARN, "--save_dir", "o", "--distill_batch_size", "9")


# --- data


SMALL = (
    *("--method", "podd", "--device", "cpu", "--model", "ConvNetD1W4", "--res", "8", "--order", "table"),
    *(*JUDGED, "--batch_size", "50", "--window", "1", "--totwindow", "2", "--max_outer_steps", "1", "--draw", "false"),
    *("--poster_width", "60", "--poster_height", "30", "--patch_num_x", "20", "--patch_num_y", "10"),
    *("--poster_class_num_x", "20", "--poster_class_num_y", "10", "--save_dir", "o", "--workers", "1"),
)
CUB = ("--dataset", "cub-200", *SMALL)
TINY = ("--dataset", "tiny-imagenet-200", *SMALL)


@pytest.fixture(scope="module")
def library(
    tmp_path_factory,
) -> Path:
    """Birds and Tiny ImageNet, as their archives unpack; tests change copies."""
    root = tmp_path_factory.mktemp("library")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        birds()
        tiny(formatted=False)
    return root


@pytest.fixture
def shelf(library) -> Path:
    """Links to all of it, in the folder of this test, to break."""
    shutil.copytree(library, ".", dirs_exist_ok=True, copy_function=lambda a, b: Path(b).hardlink_to(a))
    return Path()


def rewrite(path: Path, text: str) -> None:
    path.unlink()  # what is linked stays
    path.write_text(text)


CUB_ROOT, TINY_ROOT = Path("datasets/CUB200/CUB_200_2011"), Path("tiny-imagenet-200/tiny-imagenet-200")


@pytest.mark.parametrize(
    "damage, parts",
    [
        ("images.txt", ["no CUB200 in datasets/CUB200/CUB_200_2011", "images.txt"]),
        ("image_class_labels.txt", ["no datasets/CUB200/CUB_200_2011/image_class_labels.txt"]),
        ("train_test_split.txt", ["no datasets/CUB200/CUB_200_2011/train_test_split.txt"]),
        ("short", ["has image 600", "train_test_split.txt lacks"]),
        ("label", ["line 1 of ", "has class 7 for image 1"]),
        ("picture", ["Bird_1_0.jpg", "cannot be decoded"]),
        ("gone", ["Bird_1_0.jpg"]),
    ],
)
def test_damaged_birds(refused, shelf, damage, parts):
    """One line, and the mended set needs no --resume."""
    root = CUB_ROOT
    if damage.endswith(".txt"):
        (root / damage).unlink()
    elif damage == "short":
        path = root / "train_test_split.txt"
        rewrite(path, path.read_text().rsplit("\n", 2)[0] + "\n")
    elif damage == "label":
        path = root / "image_class_labels.txt"
        rewrite(path, path.read_text().replace("1 1\n", "1 7\n", 1))
    else:
        picture = root / "images/001.Bird_1/Bird_1_0.jpg"
        picture.unlink()
        if damage == "picture":
            picture.write_bytes(b"no picture")
    line = refused("distill", *CUB)
    assert all(part in line for part in parts), line
    assert only_config()


@pytest.mark.parametrize(
    "damage, parts",
    [
        ("train", ["no folder tiny-imagenet-200/tiny-imagenet-200/train"]),
        ("class", ["classes of", "n01443537"]),
        ("note", ["line 3 of", "val_annotations.txt"]),
        ("notes", ["val", "n01443537"]),
        ("image", ["val_0.JPEG"]),
        ("picture", ["n01443537_1.JPEG cannot be decoded"]),
    ],
)
def test_damaged_tiny_imagenet(refused, shelf, damage, parts):
    notes = TINY_ROOT / "val/val_annotations.txt"
    if damage == "train":
        shutil.rmtree(TINY_ROOT / "train")
    elif damage == "class":
        for line in notes.read_text().splitlines():  # sorted into classes, of which one was forgotten
            name, wnid = line.split("\t")[:2]
            if name != "val_0.JPEG":
                (TINY_ROOT / "val" / wnid).mkdir()
                (TINY_ROOT / "val/images" / name).rename(TINY_ROOT / "val" / wnid / name)
        shutil.rmtree(TINY_ROOT / "val/images")
    elif damage == "note":
        lines = notes.read_text().splitlines()
        rewrite(notes, "\n".join([*lines[:2], "val_2.JPEG nothing", *lines[3:]]))
    elif damage == "notes":
        notes.unlink()
    elif damage == "image":
        (TINY_ROOT / "val/images/val_0.JPEG").unlink()
    else:
        rewrite(TINY_ROOT / "train/n01443537/images/n01443537_1.JPEG", "no picture")
    line = refused("distill", *TINY, "--select", "test")
    assert all(part in line for part in parts), line
    assert only_config()


def test_whole_sets_do(library, monkeypatch):
    monkeypatch.chdir(library)
    works("distill", *CUB, "--save_dir", "birds")
    works("distill", *TINY, "--save_dir", "tiny")


def test_no_data(refused):
    for dataset, where in (("cifar10", "cifar-10-batches-py"), ("cub-200", "CUB_200_2011"), ("tiny", "train/<wnid>")):
        line = refused("distill", "--method", "podd", "--dataset", dataset, "--save_dir", "o", "--device", "cpu")
        assert "give --data_path" in line and where in line and only_config()


# --- computations that fail


@contextmanager
def failing(*steps: int) -> Iterator[None]:
    """The meta-gradient of these outer steps, counted as they are computed, is not finite."""
    real, count = podd.PosterStep.__call__, [0]

    def call(self, window, images, labels, run):
        numbers = real(self, window, images, labels, run)
        if count[0] in steps:
            self.poster.poster.grad[0, 0, 0] = float("nan")
        count[0] += 1
        return numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(podd.PosterStep, "__call__", call)
        yield


def test_a_gradient_that_is_not_finite_changes_nothing(capsys):
    with failing(1, 3):
        works("distill", *LEARN, "--save_dir", "o", "--test_freq", "1")
    assert "2 outer steps had a gradient that was not finite and changed nothing" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("o/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "skipped" in row] == [1, 3]
    assert load_tensors("o/distilled_best.pt", "")["poster"].isfinite().all()


def test_a_step_that_is_skipped_leaves_no_trace():
    """Neither in the poster nor in its Adam, nor in the running mean that cuts gradients."""
    works("distill", *LEARN, "--save_dir", "o", "--max_outer_steps", "2")
    with failing(2):
        works("distill", *LEARN, "--save_dir", "p", "--max_outer_steps", "3")
    before, after = (load_tensors(f"{name}/checkpoint.pt", "") for name in "op")
    assert after["step"] == 3
    for name, value in before["learned"].items():
        assert torch.equal(value, after["learned"][name]), name
    assert float(before["learned"]["norm"]) > 0
    (first,), (second,) = (state["optimizer"]["state"].values() for state in (before, after))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_too_many_of_them_in_a_row_end_the_run(refused):
    flags = (*LEARN, "--save_dir", "o", "--max_outer_steps", "8", "--patience", "3")
    with failing(0, 2, 3, 4):
        line = refused("distill", *flags, code=1)
    assert line.startswith("step 4: 3 steps in a row changed nothing, the last because a gradient is not finite")
    assert "o/checkpoint.pt" in line and "--resume" in line and "--lr" in line and "expert" not in line
    state = load_tensors("o/checkpoint.pt", "")
    assert state["step"] == 1 and state["learned"]["poster"].isfinite().all()
    works("distill", *flags, "--resume")


@pytest.mark.parametrize(
    "flags, hint", [(("--lr", "1e30"), "lower --lr"), (("--inner_lr", "1e30"), "lower --inner_lr")]
)
def test_what_diverges(refused, flags, hint):
    line = refused("distill", *LEARN, "--save_dir", "o", *flags, code=1)
    assert "not finite" in line and hint in line and "--lr_teacher" not in line and "--clamp_lr" not in line


# --- orders


def test_orders_that_do_not_fit(refused, made):
    order = read_json(made / "run/order.json", "order")
    del order["digest"]
    assert order["grid"] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] and order["encoder"] == "table"
    found = {
        "names": (order | {"names": [["a"] * 5] * 2}, "other names than the data set"),
        "few": ({"grid": [[0, 1], [2, 3]]}, "no 'grid'"),
        "twice": ({"grid": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 8]]}, "no 'grid'"),
        "turned": ({"grid": np.arange(10).reshape(5, 2).tolist()}, "is 2 x 5 (width x height)"),
    }
    for name, (content, says) in found.items():
        write_json(f"{name}.json", content)
        line = refused("distill", *LEARN, "--save_dir", "o", "--order", f"{name}.json")
        assert f"{name}.json" in line and says in line and only_config()
    Path("cut.json").write_text((made / "run/order.json").read_text()[:40])
    assert "cut.json" in refused("distill", *LEARN, "--save_dir", "o", "--order", "cut.json")
    works("distill", *LEARN, "--save_dir", "o", "--order", made / "run/order.json")


def test_the_order_of_another_buffer(refused):
    """buffer.py's order is taken up, so it has to be of these classes."""
    works("buffer", *DIGITS)
    path = Path("runs/podd/digits/buffers/order.json")
    write_json(path, {"grid": read_json(path, "order")["grid"], "names": [["a"] * 5] * 2})
    flags = [flag for flag in LEARN if flag not in ("--order", "table")]
    line = refused("distill", *flags)
    assert str(path) in line and "other names" in line


# --- run folders and files to start from


def test_finished_runs_are_not_run_over(refused, made):
    shutil.copytree(made / "run", "o")
    works("buffer", *DIGITS, "--buffer_path", "b")
    before = contents(Path("o")), contents(Path("b"))
    line = refused("distill", *LEARN, "--save_dir", "o")
    assert "o already holds a run" in line and "--resume" in line and "--save_dir" in line
    line = refused("buffer", *DIGITS, "--buffer_path", "b")
    assert "b already holds a run" in line and "--resume" in line and "--buffer_path" in line
    assert "of another verb" in refused("distill", *LEARN, "--save_dir", "b", "--resume")
    assert (contents(Path("o")), contents(Path("b"))) == before


@pytest.mark.parametrize(
    "start, flags, says",
    [
        ("run/distilled_best.pt", "--poster_width 24", "is of 20 x 12 pixels (width x height), the plan of 24 x 12"),
        ("run/best_poster.pt", "--poster_height 16", "the plan of 20 x 16"),
        ("run/log.jsonl", "", "log.jsonl"),
        (
            "learned/distilled_best.pt",
            "",
            "has learned labels, without which its patches make no sense; give --train_y",
        ),
        ("run/distilled_best.pt", "--zca", "run/distilled_best.pt"),
        ("white/distilled_4.pt", "", "white/distilled_4.pt was made with a whitening"),
        ("run/distilled_best.pt", "--dataset toy --res 8 --poster_class_num_x 3", "run/distilled_best.pt"),
    ],
)
def test_posters_that_one_cannot_start_from(refused, made, start, flags, says):
    line = refused("distill", *LEARN, "--save_dir", "o", "--init_from", made / start, *flags.split())
    assert says in line, line
    assert only_config()


# --- eval


@pytest.fixture
def copy(made) -> Path:
    shutil.copytree(made / "learned", "run")
    return Path("run/distilled_best.pt")


@pytest.mark.parametrize(
    "parts, flags, wanted",
    [
        ({}, "--poster_width 24", "is of 20 x 12 pixels"),
        ({}, "--dataset toy --res 8", "run/distilled_best.pt"),
        ({}, "--res 10", "was made with --res 0, not 10"),
        ({}, "--zca", "whiten"),
        ({"poster": torch.zeros(3, 12, 20)}, "", "has 3 channels, images of digits have 1"),
        ({"poster": torch.full((1, 12, 20), float("nan"))}, "", "not finite"),
        ({"label_map": torch.ones(9, 2, 5)}, "", "has labels of 9 classes, digits has 10"),
        ({"lr": torch.tensor(0.0)}, "", "its inner rate is 0"),
        ({"meta": 3}, "", "is no file of a distilled poster"),
        ({"zca": {"mean": torch.zeros(3), "matrix": torch.eye(3)}}, "", "whitening"),
    ],
    ids=range(10),
)
def test_eval_of_what_does_not_fit(refused, copy, parts, flags, wanted):
    torch.save(load_tensors(copy, "") | parts, copy)
    assert wanted in refused("eval", "--method", "podd", "--distilled", copy, *JUDGED, *flags.split())
    assert not Path("run/eval").exists()


def test_eval_without_a_file(refused):
    assert "nowhere.pt" in refused("eval", *DIGITS, *JUDGED, "--distilled", "nowhere.pt")
    assert "runs/podd/mine/distilled_best.pt" in refused("eval", *DIGITS, *JUDGED, "--name", "mine")
    assert not Path("runs").exists()


def test_eval_never_replaces_a_result(copy):
    flags = ("--distilled", copy, *JUDGED, "--random_lrs", "0.001", "--source")
    works("eval", *flags, "distilled")
    first = contents(Path("run/eval"))
    works("eval", *flags, "random")
    after = contents(Path("run/eval"))
    assert first.items() <= after.items() and len(after) == 2 * len(first)


def test_interrupted(made, capsys, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("methods.core.stepping.StepJudge.sets", stop)
        assert command("eval", ["--distilled", str(made / "run/distilled_best.pt")]) == 130
        assert "eval.py: interrupted; give the command again" in capsys.readouterr().err
        assert command("distill", [*LEARN, "--save_dir", "o"]) == 130
        assert "distill.py: interrupted; --resume" in capsys.readouterr().err
    works("distill", *LEARN, "--save_dir", "o", "--resume")
