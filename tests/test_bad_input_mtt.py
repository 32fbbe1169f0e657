"""What users get wrong with labelled images: one clear line, the right exit code, and nothing written or lost."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from methods.command import command
from tests.conftest import contents, works
from utils.files import load_tensors

DIGITS = ("--dataset", "digits", "--train_limit", "10", "--device", "cpu")
TINY = (*DIGITS, "--model", "ConvNetD1W8")
EXPERTS = ("--num_experts", "1", "--train_epochs", "2", "--batch_train", "32")
IMAGES = (
    "--syn_steps",
    "2",
    "--expert_epochs",
    "1",
    "--max_start_epoch",
    "2",
    "--lr_img",
    "10",
    "--lr_teacher",
    "0.02",
)
JUDGED = ("--num_eval", "1", "--epoch_eval_train", "1")
LEARN = (*TINY, *IMAGES, *JUDGED, "--iterations", "2", "--eval_it", "2", "--draw", "false")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """One expert in `made / buffers`, a whitened one in `made / whitened`, ten digits in `made / run`."""
    root = tmp_path_factory.mktemp("made")
    cache = ("--cache_dir", root / "cache")
    works("buffer", *TINY, *EXPERTS, *cache, "--buffer_path", root / "buffers")
    works("buffer", *TINY, *EXPERTS, *cache, "--buffer_path", root / "whitened", "--zca")
    works("distill", *LEARN, *cache, "--buffer_path", root / "buffers", "--save_dir", root / "run")
    return root


LEAF = Path("digits") / "ConvNetD1W8"


def distilling(place: Path, *more: object) -> list[object]:
    return [*LEARN, "--buffer_path", place, "--save_dir", "o", *more]


# --- words


@pytest.mark.parametrize(
    "verb, flags, parts",
    [
        ("buffer", ["--dataset", "CIFAR11"], ["unknown dataset 'CIFAR11'", "'cifar10'"]),
        ("buffer", ["--dataset", "digts"], ["unknown dataset 'digts'", "'digits'"]),
        ("buffer", [*DIGITS, "--model", "ConvNett"], ["cannot read the network name 'ConvNett'", "write ConvNet"]),
        ("distill", [*DIGITS, "--model", "ResNet19"], ["unknown --model 'ResNet19'", "'ResNet18'"]),
        ("eval", [*DIGITS, "--networks", "ConvNetD1W8", "VGG12"], ["unknown network 'VGG12'", "'VGG1"]),
        ("buffer", [*DIGITS, "--dsa_strategy", "color_crp"], ["crp", "crop"]),
        ("buffer", ["--dataset", "CIFAR10", "--model", "ConvNet"], ["give --data_path"]),
        ("buffer", ["--dataset", "CIFAR10", "--data_path", "nowhere"], ["no folder nowhere", "--data_path"]),
        ("buffer", ["--dataset", "ImageNet", "--subset", "imagewof", "--data_path", "."], ["imagewof", "imagewoof"]),
        ("buffer", [*TINY, "--holdout", "1"], ["--holdout is 1.0", "such as 0.1"]),
        ("buffer", [*TINY, "--rho_max", "0.1", "--rho_min", "0.2"], ["--rho_min 0.2 is not --rho_max 0.1"]),
        ("buffer", [*TINY, "--save_epochs", "0,99"], ["save_epochs", "99"]),
        ("buffer", [*TINY, "--together", "0"], ["--together is 0"]),
        ("distill", [*TINY, "--texture", "--zca"], ["--zca mixes all pixels", "leave one out"]),
        ("distill", [*TINY, "--teacher_label", "--labels", "learned"], ["--teacher_label and --labels learned"]),
        ("distill", [*TINY, "--texture", "--teacher_label"], ["--texture goes with --labels hard"]),
        ("distill", [*TINY, "--texture", "--labels", "learned"], ["--texture goes with --labels hard"]),
        ("distill", [*TINY, "--ema_decay", "1"], ["--ema_decay 1.0", "0.999"]),
        (
            "distill",
            [*TINY, "--holdout", "0"],
            ["--select val needs held-out images", "--holdout 0.1", "--select test"],
        ),
        ("distill", [*TINY, "--min_start_epoch", "3", "--max_start_epoch", "3"], ["start epochs from 3 to below 3"]),
        ("distill", [*TINY, "--Sequential_Generation"], ["start epochs from 0 to below 0 (in the end 25)"]),
        (
            "distill",
            [*TINY, "--Sequential_Generation", "--current_max_start_epoch", "30"],
            ["start epochs from 0 to below 30 (in the end 25)"],
        ),
        (
            "distill",
            [*TINY, "--Sequential_Generation", "--current_max_start_epoch", "10"],
            ["--expansion_end_epoch 0", "start epochs reach 25"],
        ),
        ("distill", [*TINY, "--ipc", "0"], ["--ipc is 0", "at least 1"]),
        ("distill", [*TINY, "--batch_syn", "0"], ["--batch_syn is 0"]),
        ("distill", [*TINY, "--lr_teacher", "0"], ["--lr_teacher is 0.0", "greater than 0"]),
        ("distill", [*TINY, "--mode", "tesla"], ["--mode", "'tesla'", "detached"]),
        ("distill", [*TINY, "--pix_init", "reel"], ["--pix_init", "'reel'", "'real'"]),
        ("eval", [*TINY, "--random_lrs", "0.1", "0"], ["--random_lrs", "greater than 0"]),
        ("eval", [*TINY, "--data", ""], ["--data names nothing"]),
        ("eval", [*TINY, "--protocol", "mmt"], ["--protocol", "'mtt'"]),
        ("eval", [*TINY, "--syn_lr", "nan"], ["--syn_lr", "nan"]),
        ("eval", [*TINY, "--syn_lr", "0.1", "--protocol", "dc_bench"], ["at 0.01, never at --syn_lr 0.1"]),
    ],
)
def test_words(refused, tmp_path, verb, flags, parts):
    line = refused(verb, *flags)
    assert all(part in line for part in parts), line
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "config.yaml"]


@pytest.mark.parametrize("verb, flags", [("buffer", EXPERTS), ("distill", LEARN[len(TINY) :])])
def test_networks_too_deep_for_the_images(refused, made, tmp_path, verb, flags):
    places = {"buffer": ("--buffer_path", "b"), "distill": ("--buffer_path", made / "buffers" / LEAF)}[verb]
    line = refused(verb, *DIGITS, "--model", "ConvNetD5", *flags, *places, "--cache_dir", "cache")
    assert "ConvNetD5" in line and "8" in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "config.yaml"]


def test_a_judge_too_deep_for_the_images(refused, made, tmp_path):
    """Told before the first of a pool's networks is trained, not when its turn comes."""
    places = ("--buffer_path", made / "buffers", "--save_dir", "o", "--cache_dir", "cache")
    line = refused("distill", *LEARN, *places, "--eval_mode", "D")
    assert "ConvNetD4" in line and "8" in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "config.yaml"]


# --- data


def write_npz(**changes: object) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8), np.arange(30) % 3
    arrays = {"train_images": images, "train_labels": labels, "test_images": images[:6], "test_labels": labels[:6]}
    np.savez("d.npz", **{name: value for name, value in (arrays | changes).items() if value is not None})


NPZ = ("--dataset", "npz", "--data_path", "d.npz", "--model", "ConvNetD1W8", "--device", "cpu", *EXPERTS)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ("cut", ["d.npz"]),
        ("text", ["d.npz"]),
        ("gone", ["d.npz"]),
        ({"test_labels": None}, ["test_labels"]),
        ({"train_labels": np.arange(29)}, ["d.npz", "train_labels"]),
        (
            {"train_labels": np.arange(30) % 3 * 2, "test_labels": np.zeros(6, int)},
            ["class '1' has no training images"],
        ),
        ({"test_labels": np.full(6, 5)}, ["d.npz", "test label 5"]),
        ({"train_images": np.zeros((30, 8, 9, 3), np.uint8)}, ["not square", "--res 8"]),
    ],
    ids=str,
)
def test_damaged_data_can_be_mended(refused, changes, parts):
    """The corrected command needs no --resume: nothing had begun."""
    write_npz(**changes if isinstance(changes, dict) else {})
    path = Path("d.npz")
    if changes == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif changes == "text":
        path.write_text("no arrays")
    elif changes == "gone":
        path.unlink()
    line = refused("buffer", *NPZ, "--buffer_path", "b")
    assert all(part in line for part in parts), line
    assert [path.name for path in Path("b").rglob("*") if path.is_file()] == ["config.yaml"]
    write_npz()
    works("buffer", *NPZ, "--buffer_path", "b")


def test_an_empty_class_folder(refused):
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            for number in range(4):
                place = Path("photos", split, name)
                place.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    flags = ("--method", "mtt", "--dataset", "folder", "--res", "8", "--data_path", "photos", "--workers", "1")
    flags = (*flags, "--model", "ConvNetD1W8", "--device", "cpu", *EXPERTS, "--batch_train", "4", "--buffer_path", "b")
    shutil.move("photos/train/bee", "aside")
    Path("photos/train/bee").mkdir()
    line = refused("buffer", *flags)
    assert "class folder photos/train/bee holds no images" in line
    shutil.rmtree("photos/train/bee")
    assert "has an unknown 'bee'" in refused("buffer", *flags)
    shutil.move("aside", "photos/train/bee")
    Path("photos/train/bee/2.png").write_bytes(b"no picture")
    line = refused("buffer", *flags)
    assert "2.png" in line and "cannot be decoded" in line
    assert [path.name for path in Path("b").rglob("*") if path.is_file()] == ["config.yaml"]
    Path("photos/train/bee/2.png").unlink()
    works("buffer", *flags)


@pytest.mark.parametrize("start", ["real", "samples_predicted_correctly"])
def test_more_images_than_a_class_has(refused, made, start):
    line = refused("distill", *distilling(made / "buffers", "--ipc", "11", "--pix_init", start))
    assert "class 0 has 10 training images, 11 are needed to start from; lower --ipc" in line
    assert list(Path("o").iterdir()) == [Path("o/config.yaml")]
    works("distill", *distilling(made / "buffers", "--ipc", "2"))


# --- trajectories


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--model", "ConvNetD1W4"], ["had --model ConvNetD1W8, not ConvNetD1W4"]),
        (["--res", "16"], ["had --res 0, not 16"]),
        (["--zca"], ["had --zca False, not True"]),
        (["--holdout", "0.3"], ["had --holdout 0.1, not 0.3"]),
        (["--train_limit", "9"], ["had --train_limit 10, not 9"]),
        (["--method", "mtt", "--dataset", "toy"], ["had --dataset digits, not toy"]),
        (["--max_start_epoch", "3"], ["max_start_epoch 3 + expert_epochs 1", "epochs up to 3", "keep [0, 1, 2]"]),
        (["--expert_epochs", "9"], ["expert_epochs 9", "keep [0, 1, 2]"]),
        (["--max_files", "1"], ["max_files 1", "max_experts"]),
    ],
)
def test_trajectories_that_do_not_fit(refused, made, flags, parts):
    before = contents(made / "buffers")
    line = refused("distill", *distilling(made / "buffers" / LEAF, *flags))
    assert all(part in line for part in parts), line
    assert str(made / "buffers" / LEAF) in line or flags[0] == "--max_files"
    assert list(Path("o").iterdir()) == [Path("o/config.yaml")] and contents(made / "buffers") == before
    assert not Path("cache").exists()  # told before a whitening was fitted


def test_whitened_trajectories(refused, made):
    leaf = made / "whitened" / "digits_ZCA" / "ConvNetD1W8"
    assert "had --zca True, not False" in refused("distill", *distilling(leaf))
    assert "no trajectories in" in refused("distill", *distilling(made / "whitened"))
    line = refused("distill", *distilling(leaf, "--zca", "--zca_kind", "podd"))
    assert "had --zca_kind mtt, not podd; give what they had" in line
    shutil.copytree(leaf, "damaged")
    path = Path("damaged/zca.safetensors")
    path.write_bytes(path.read_bytes()[:500])
    line = refused("distill", *distilling(Path("damaged"), "--zca"))
    assert "whitening damaged/zca.safetensors cannot be read" in line


def test_other_spellings_of_a_name_are_the_same_data(made):
    works("distill", *distilling(made / "buffers" / LEAF, "--dataset", "Digits"))


def test_experts_whose_whitening_is_gone(refused, made):
    """Fitted anew, it would be another space, if only by a little."""
    shutil.copytree(made / "whitened", "w")
    Path("w", "digits_ZCA", "ConvNetD1W8", "zca.safetensors").unlink()
    line = refused("distill", *distilling(Path("w"), "--zca"))
    assert "zca.safetensors, is gone" in line


def test_experts_that_saw_images_otherwise(made, capsys):
    works("distill", *distilling(made / "buffers", "--iterations", "0", "--eval_it", "0", "--dsa_strategy", "flip"))
    said = capsys.readouterr().out
    assert "note: the experts had --dsa_strategy color_crop_cutout_flip_scale_rotate, not flip" in said


def test_no_trajectories(refused):
    line = refused("distill", *distilling(Path("nowhere")))
    assert "no trajectories in nowhere" in line and "run buffer.py first" in line


@pytest.mark.parametrize("damage", ["snapshot gone", "snapshot cut", "manifest", "inputs gone"])
def test_damaged_trajectories(refused, made, damage):
    shutil.copytree(made / "buffers", "b")
    leaf = Path("b") / LEAF
    path = leaf / {"m": "manifest.json", "i": "inputs.json"}.get(damage[0], "expert_000/epoch_002.safetensors")
    if damage.endswith("gone"):
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:200])
    assert str(path) in refused("distill", *distilling(Path("b")))


@pytest.fixture
def published(made) -> Path:
    """The plain expert in the published layout."""
    works("buffer", *TINY, *EXPERTS, "--buffer_path", made / "buffers", "--export", "published")
    return Path("published")


def test_published_trajectories_do_as_well(made, published):
    works("distill", *distilling(published))
    assert Path("o/log.jsonl").read_text() == (made / "run" / "log.jsonl").read_text()


def test_published_trajectories_of_another_network(refused, published):
    line = refused("distill", *distilling(published, "--model", "ConvNetD1W4"))
    assert "published is of another network" in line
    path = published / "replay_buffer_0.pt"
    path.write_bytes(path.read_bytes()[:3000])
    assert "replay_buffer_0.pt" in refused("distill", *distilling(published))


@pytest.fixture
def cifar(monkeypatch):
    """CIFAR-10 as torchvision would read it: thirty noisy pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    found = SimpleNamespace(data=pixels, targets=[k % 10 for k in range(30)], classes=[f"c{k}" for k in range(10)])
    monkeypatch.setattr("data.sources._fetch", lambda *args: found)


@pytest.mark.parametrize(
    "place, zca, seen",
    [
        ("CIFAR10_NO_ZCA/ConvNetD1W8", True, "plain"),
        ("CIFAR10/ConvNetD1W8", False, "whitened"),
        ("CIFAR10_NO_ZCA", True, "plain"),
        ("CIFAR10_NO_ZCA/ConvNetD1W8", False, None),
        ("mine", False, None),  # says nothing
        ("CIFAR10/mine/ConvNetD1W8", False, None),  # where the data is, perhaps
    ],
)
def test_folders_of_published_trajectories_that_say_what_they_are(refused, cifar, monkeypatch, place, zca, seen):
    from networks import build_network

    weights = [
        [weight.detach() + epoch for weight in build_network("ConvNetD1W8", 32, 10).parameters()] for epoch in (0, 1)
    ]
    Path(place).mkdir(parents=True)
    torch.save([weights], Path(place, "replay_buffer_0.pt"))
    monkeypatch.setattr("data.images.fit_zca", lambda images: pytest.fail("fitted a whitening first"))
    flags = ("--dataset", "CIFAR10", "--model", "ConvNetD1W8", "--device", "cpu", *IMAGES, "--max_start_epoch", "1")
    flags = (*flags, *JUDGED, "--buffer_path", place, "--save_dir", "o", "--iterations", "0", "--zca", zca)
    if seen is None:
        works("distill", *flags, "--eval_it", "0")
    else:
        line = refused("distill", *flags)
        assert f"{place} says by its name that its experts saw {seen} images; correct --zca" in line


# --- computations that fail


def test_experts_that_diverge(refused):
    line = refused("buffer", *TINY, *EXPERTS, "--buffer_path", "b", "--lr_teacher", "1e30", code=1)
    assert "expert 0" in line and "not finite" in line and "lower the rate" in line


def test_experts_that_nobody_knows_enough_of(refused, made):
    line = refused("distill", *distilling(made / "buffers", "--ipc", "9", "--pix_init", "samples_predicted_correctly"))
    assert re.search(r"the experts know only \d images of class \d, 9 are needed", line)


@pytest.mark.parametrize("more", [(), ("--labels", "learned"), ("--texture",)], ids=str)
def test_pixels_that_diverge(refused, made, more):
    flags = distilling(made / "buffers", "--iterations", "4", "--checkpoint_every", "1", *more)
    line = refused("distill", *flags, "--lr_img", "1e38", code=1)
    assert re.match(r"step \d: .*(not finite|is nan|is inf)", line)
    assert "the last good state is that of step" in line and "o/checkpoint.pt" in line and "--resume" in line
    assert load_tensors("o/checkpoint.pt", "")["learned"]["images"].isfinite().all()
    works("distill", *flags, "--resume", "--lr_img", "1")
    assert Path("o/distilled_4.pt").exists()


def test_a_rate_that_turns_negative(refused, made):
    flags = distilling(made / "buffers", "--lr_lr", "1e3", "--iterations", "4")
    line = refused("distill", *flags, "--clamp_lr", "0", code=1)
    assert re.match(r"step \d: the learned rate became -", line) and "--clamp_lr" in line
    assert float(load_tensors("o/checkpoint.pt", "")["learned"]["lr"]) > 0
    works("distill", *flags, "--resume", "--clamp_lr", "1e-3", "--lr_lr", "1e-3")


def test_a_rate_that_is_not_finite(refused, made):
    line = refused("distill", *distilling(made / "buffers", "--lr_lr", "1e38"), code=1)
    assert re.match(r"step \d: .*(the learned rate became|is nan|is inf|not finite)", line)


def test_nothing_learned_yet(refused, made):
    """The flag that the message names is one of this method."""
    line = refused("distill", *distilling(made / "buffers", "--lr_teacher", "1e30", "--eval_it", "0"), code=1)
    assert line.startswith("step 0: ") and "before anything was learned" in line
    assert "--lr_teacher" in line and "_img" not in line and "_txt" not in line


# --- run folders


def test_finished_runs_are_not_run_over(refused, made):
    shutil.copytree(made / "buffers", "b")
    shutil.copytree(made / "run", "o")
    before = contents(Path("b")), contents(Path("o"))
    line = refused("buffer", *TINY, *EXPERTS, "--buffer_path", "b")
    assert "already holds a run" in line and "--resume" in line and "--buffer_path" in line
    line = refused("distill", *distilling(made / "buffers"))
    assert "o already holds a run" in line and "--resume" in line and "--save_dir" in line
    flags = (*LEARN, "--buffer_path", made / "buffers", "--save_dir", Path("b") / LEAF)
    assert "of another verb" in refused("distill", *flags)
    assert "of another verb" in refused("distill", *flags, "--resume")
    assert (contents(Path("b")), contents(Path("o"))) == before


def test_exports_are_not_overwritten(refused, made, published):
    before = contents(published)
    flags = (*TINY, *EXPERTS, "--buffer_path", made / "buffers", "--export", published)
    assert "replay_buffer_0.pt exists already; choose another folder" in refused("buffer", *flags)
    assert contents(published) == before


# --- eval


@pytest.fixture
def distilled(made) -> Path:
    shutil.copytree(made / "run", "run")
    return Path("run/distilled_best.pt")


def test_eval_without_a_file(refused):
    assert "no distilled file at nowhere.pt" in refused("eval", *TINY, "--distilled", "nowhere.pt")
    assert "no distilled file at runs/mtt/mine/distilled_best.pt" in refused("eval", *TINY, "--name", "mine")
    assert "no distilled file at runs/mtt/digits/distilled_best.pt" in refused("eval", *TINY)
    assert not Path("runs").exists()


@pytest.mark.parametrize("rate", [0.0, -0.5, float("nan")])
def test_rates_that_nobody_can_train_at(refused, distilled, rate):
    """Told before hours of random images are judged."""
    torch.save(load_tensors(distilled, "") | {"lr": torch.tensor(rate)}, distilled)
    assert f"{distilled}: its learned rate is {rate:g}" in refused("eval", "--distilled", distilled, *JUDGED)
    torch.save(torch.tensor(rate), "run/lr_best.pt")
    line = refused("eval", *TINY, "--distilled", "run/images_best.pt", *JUDGED)
    assert f"run/lr_best.pt: its learned rate is {rate:g}" in line
    assert not Path("run/eval").exists()


@pytest.mark.parametrize(
    "parts, wanted",
    [
        ({"images": torch.zeros(10, 3, 8, 8)}, "holds images of 3 x 8 x 8, digits is 1 x 8 x 8"),
        ({"images": torch.zeros(10, 1, 8, 9)}, "holds images of 1 x 8 x 9"),
        ({"images": torch.full((10, 1, 8, 8), float("nan"))}, "not finite"),
        ({"labels": torch.arange(9)}, "is no file of distilled images"),
        ({"labels": torch.arange(10) + 5}, "has labels for 15 classes, digits has 10"),
        ({"meta": 3}, "is no file of distilled images"),
        (
            {"zca": {"mean": torch.zeros(3), "matrix": torch.eye(3)}},
            "a whitening of 3 values does not fit images of 64",
        ),
    ],
    ids=range(7),
)
def test_eval_of_what_does_not_fit(refused, distilled, parts, wanted):
    torch.save(load_tensors(distilled, "") | parts, distilled)
    assert wanted in refused("eval", *TINY, "--distilled", distilled, *JUDGED)
    assert not Path("run/eval").exists()


def test_eval_never_replaces_a_result(distilled):
    flags = ("--distilled", distilled, *JUDGED, "--random_lrs", "0.01")
    works("eval", *flags)
    first = contents(Path("run/eval"))
    works("eval", *flags, "--data", "random")
    after = contents(Path("run/eval"))
    assert first.items() <= after.items() and len(after) == 2 * len(first)


def test_interrupted(made, capsys, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("methods.core.stack.StackTrainer.fit", stop)
        assert command("eval", ["--distilled", str(made / "run/distilled_best.pt")]) == 130
        assert "eval.py: interrupted; give the command again" in capsys.readouterr().err
        assert command("buffer", [*TINY, *EXPERTS, "--buffer_path", "b"]) == 130
        assert "buffer.py: interrupted; --resume" in capsys.readouterr().err
    works("buffer", *TINY, *EXPERTS, "--buffer_path", "b", "--resume")
