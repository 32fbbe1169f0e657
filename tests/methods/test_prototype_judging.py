"""eval.py on class images: its rows, budgets and columns, both protocols, folders of all kinds, resuming, mistakes."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from methods import prototype_inputs, prototype_judging
from methods.core.hard_labels import HardLabels
from methods.core.photo_students import PhotoStudents
from methods.core.teachers import Teacher
from methods.prototype_files import Manifest
from methods.prototype_judging import Eval, evaluate, recorded
from networks.pretrained import build_architecture
from utils.config import idle_options, parse
from utils.errors import UserError
from utils.files import save_vectors

COLOURS = {"cherry": (200, 40, 40), "apple": (40, 200, 40), "berry": (40, 40, 200)}
SIDE = 16
DATA = "--dataset folder --data_path real --device cpu --workers 1"
MANY = "--protocol minimax --width 0.0625 --size 16 --epochs 6 --batch_size 8 --repeat 2"
HARD = f"{MANY} -n convnet --depth 1"
SOFT = (
    "--protocol rded --arch-name conv1 --stud-name conv1 --size 16 --epochs 6 --batch_size 8 --repeat 1 "
    "--teacher_epochs 6 --lr 0.01"
)


def paint(folder, ident, count, seed, colour):
    """Noisy patches of a class's colour; hard to tell for a few, easy on average."""
    rng = np.random.default_rng(seed)
    (folder / ident).mkdir(parents=True)
    for i in range(count):
        pixels = np.clip(rng.normal(colour, 60, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / ident / f"{ident}-{i:02d}.png")


@pytest.fixture(scope="session")
def painted(tmp_path_factory):
    """`real` with 12 training and 6 test images a class, and two distilled sets of 4, the second of them swapped."""
    root = tmp_path_factory.mktemp("painted")
    for number, (ident, colour) in enumerate(COLOURS.items()):
        paint(root / "real" / "train", ident, 12, number, colour)
        paint(root / "real" / "val", ident, 6, 10 + number, colour)
        paint(root / "made", ident, 4, 20 + number, colour)
        paint(root / "poor", ident, 4, 30 + number, (90, 90, 90))
    return root


@pytest.fixture
def here(painted, tmp_path, monkeypatch):
    """A working folder that sees the painted ones."""
    for name in ("real", "made", "poor"):
        (tmp_path / name).symlink_to(painted / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(line):
    words = shlex.split(line)
    return parse(Eval, "eval", words, base=recorded(words))[0]


def judge(line):
    """The rows of result.json by name, after running this command."""
    evaluate(config(line))
    return rows()


def results():
    return sorted(Path("runs").rglob("result.json"))


def rows():
    (path,) = results()
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


@pytest.fixture
def trained(monkeypatch):
    """What students trained on: a list of (files by class, number), one a student; they learn nothing meanwhile."""
    seen = []

    def train(self, number, watch):
        names = {}
        for file, label in zip(self.photos.files, self.photos.labels.tolist(), strict=True):
            names.setdefault(label, []).append(file.name)
        seen.append((names, number))
        state = self.fresh().state_dict()
        for epoch in range(1, self.epochs + 1):
            watch(epoch, state)
        return state

    monkeypatch.setattr(PhotoStudents, "train", train)
    return seen


def test_rows_columns_and_what_the_report_says(here, capsys):
    found = judge(
        f"{DATA} {HARD} --data random herding medoid distilled full --distilled made --full_epochs 5 --lr 0.05"
    )
    assert list(found) == ["random", "herding", "medoid", "distilled", "full"]
    assert [row["size"] for row in found.values()] == [12, 12, 12, 12, 36]
    for name, row in found.items():
        epochs = 5 if name == "full" else 6
        assert set(row["metrics"]) == {"last", "best on test"}
        last, best = (row["metrics"][name]["values"] for name in ("last", "best on test"))
        assert len(last) == 2 and all(b >= a for a, b in zip(last, best, strict=True))
        told = row["protocol"]
        assert (
            told["protocol"] == "minimax" and told["n"] == 2 and told["best_on"] == "test" and told["looks"] == epochs
        )
        assert (told["epochs"], told["factor"], told["batch"], told["lr"], told["size"]) == (epochs, 1, 8, 0.05, 16)
    assert found["distilled"]["metrics"]["best on test"]["mean"] > 60  # chance is a third
    text = capsys.readouterr().out
    assert "best on test" in text and "hard labels" in text and "best epoch chosen on test" in text
    assert results()[0].parent.name == "minimax-folder-convnet-ipc4-e6-seed0"


def test_what_each_row_trains_on(here, trained):
    judge(f"{DATA} {HARD} --data random herding medoid distilled --distilled made --ipc 3")
    random, herding, medoid, distilled = (trained[i : i + 2] for i in (0, 2, 4, 6))
    assert [number for _, number in trained] == [0, 1] * 4
    assert all(len(set(some)) == 3 for files, _ in trained for some in files.values())
    assert random[0][0] != random[1][0]  # another draw for each repeat
    for fixed in (herding, medoid, distilled):
        assert fixed[0][0] == fixed[1][0]
    assert herding[0][0] != medoid[0][0]
    # Class 0 is the first in sorted order, whose first files are taken.
    assert distilled[0][0][0] == [f"apple-{i:02d}.png" for i in range(3)]


def test_several_sets_and_networks(here, trained):
    found = judge(f"{DATA} {MANY} -n convnet resnet_ap --data distilled --distilled made poor")
    assert list(found) == ["convnet, distilled", "resnet_ap, distilled"]
    for row in found.values():
        assert row["protocol"]["n"] == 4 and row["protocol"]["sets"] == ["made", "poor"]
        values = row["metrics"]["best on test"]["values"]
        assert len(values) == 4
        assert row["protocol"]["best_of_each_set"] == [sum(values[:2]) / 2, sum(values[2:]) / 2]


def test_the_best_epoch_by_held_out_images(here, trained):
    found = judge(f"{DATA} {HARD} --data random full --ipc 3 --best_on val --holdout 0.25 --repeat 1")
    assert set(found["full"]["metrics"]) == {"last", "best on val"} and found["full"]["protocol"]["holdout"] == 0.25
    assert found["full"]["size"] == 27  # 9 of 12 images of three classes
    kept = {label: set(some) for label, some in trained[1][0].items()}
    assert all(set(some) <= kept[label] for label, some in trained[0][0].items())


@pytest.mark.parametrize(("best_on", "best", "epoch"), [("test", 70.0, 2), ("val", 30.0, 3)])
def test_last_and_best_are_what_they_are_called(here, monkeypatch, best_on, best, epoch):
    """Both of the test images; the best epoch by these, or by held-out training images, which no student sees."""
    accuracies = {"test": [10.0, 70.0, 30.0, 20.0], "val": [10.0, 20.0, 80.0, 40.0]}

    def train(self, number, watch):
        held = {*map(str, self.tests["val"].files)} if "val" in self.tests else set()
        assert "real/val" not in str(held) and len(held) == (9 if best_on == "val" else 0)
        assert not held & {*map(str, self.photos.files)}
        assert {file.parent.parent.name for file in self.tests["test"].files} == {"val"}
        state = {}
        for done in range(1, 5):
            state = {"epoch": torch.tensor(done)}
            watch(done, state)
        return state

    monkeypatch.setattr(PhotoStudents, "train", train)
    monkeypatch.setattr(
        PhotoStudents, "score", lambda self, state, split: {"acc": accuracies[split][int(state["epoch"]) - 1]}
    )
    row = judge(f"{DATA} {HARD} --data full --full_epochs 4 --repeat 1 --best_on {best_on} --holdout 0.25")["full"]
    assert row["metrics"]["last"]["values"] == [20] and row["metrics"][f"best on {best_on}"]["values"] == [best]
    assert row["protocol"]["chosen_epochs"] == [epoch] and row["protocol"]["looks"] == 4


@pytest.fixture
def asked(monkeypatch):
    """What teachers were asked for: a list of (training files, test files, our places in ImageNet); the weights of each
    are those of its seed, which is the list's attribute."""
    calls = Asked()

    def opened(cfg, size, resize, idents, train, test, folder, seed, device, rows):
        calls.append((train().files, test.files, rows))
        torch.manual_seed(calls.seed)
        return Teacher(build_architecture("conv1", size, len(idents)), "conv1", "nowhere", 50.0)

    monkeypatch.setattr(prototype_judging, "open_teacher", opened)
    return calls


class Asked(list):
    seed = 0


def test_teachers_know_no_image_that_students_are_judged_by(here, trained, asked):
    judge(f"{DATA} {SOFT} --data full --best_on val --holdout 0.25")
    ((train, test, rows),) = asked
    assert sorted(file.name for file in train) == sorted(name for some in trained[0][0].values() for name in some)
    assert len(train) == 27 and {file.parent.parent.name for file in train} == {"train"}
    assert {file.parent.parent.name for file in test} == {"val"} and rows is None


def test_imagenets_teacher_is_asked_for_our_classes(here, trained, asked):
    for number, ident in enumerate(("n01443537", "n01440764", "n01494475")):
        paint(here / "fish" / "train", ident, 3, number, (90, 90, 90))
        paint(here / "fish" / "val", ident, 1, number, (90, 90, 90))
    judge(f"{DATA.replace('real', 'fish')} {SOFT} --data full")
    assert asked[0][2] == [0, 1, 4]  # tench, goldfish, hammerhead


def test_results_of_other_data_or_teachers_are_not_taken(here, trained, asked, tmp_path):
    line = f"{DATA} {SOFT} --data distilled --distilled made"
    for done in (1, 1):  # the second time everything is there
        evaluate(config(line))
        assert len(trained) == done
    asked.seed = 1
    evaluate(config(line))
    assert len(trained) == 2
    for number, flags in enumerate(("--re_accum_steps 2", "--seed 1", "--best_on val"), 3):
        evaluate(config(f"{line} {flags}"))
        assert len(trained) == number
    # The same classes and training images, but a test image of another class, and then another test image.
    (here / "real").unlink()
    shutil.copytree(painted_root(here), here / "real")
    evaluate(config(line))
    assert len(trained) == 5
    (here / "real/val/apple/apple-05.png").rename(here / "real/val/berry/apple-05.png")
    evaluate(config(line))
    assert len(trained) == 6
    shutil.copy(here / "real/val/cherry/cherry-00.png", here / "real/val/cherry/cherry-01.png")
    evaluate(config(line))
    assert len(trained) == 7


def painted_root(here):
    return (here / "made").resolve().parent / "real"


def test_seeds_of_students(here, monkeypatch):
    """Rows are judged by the same students; other sets, and other seeds of the command, by others."""
    seen = []
    real = HardLabels.__init__
    monkeypatch.setattr(HardLabels, "__init__", lambda self, *given: seen.append(given[6]) or real(self, *given))
    monkeypatch.setattr(PhotoStudents, "train", lambda self, number, watch: self.fresh().state_dict())
    for seed in (0, 1):
        evaluate(config(f"{DATA} {HARD} --data random distilled --distilled made poor --repeat 1 --seed {seed}"))
    tried, random, first, second = zip(seen[:4], seen[4:], strict=True)
    assert tried == random == first and not {*first} & {*second} and len({*first, *second}) == 4


def test_a_killed_command_goes_on(here, monkeypatch):
    line = f"{DATA} {HARD} --data random distilled --distilled made"
    judge(line)
    whole = results()[0].read_bytes()
    train, count = HardLabels.train, 0

    def killed(self, number, watch):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return train(self, number, watch)

    results()[0].rename("kept.json")
    for path in Path("runs").rglob("progress/*.json"):
        path.unlink()
    monkeypatch.setattr(HardLabels, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(line))
    assert not results() and len(list(Path("runs").rglob("progress/*.json"))) == 3
    judge(line)
    assert count == 5  # one student was left
    assert results()[0].read_bytes() == whole


def test_a_finished_command_is_not_done_again_and_another_takes_nothing(here, trained):
    line = f"{DATA} {HARD} --data distilled --distilled made --repeat 1"
    judge(line)
    judge(line)
    assert len(trained) == 1 and len(results()) == 1
    evaluate(config(f"{line} --lr 0.02"))
    assert len(trained) == 2 and len(results()) == 2
    assert sorted(path.parent.name[-2:] for path in results()) == ["-2", "d0"]
    evaluate(config(f"{line} --repeat 2"))  # one more of the same
    assert len(trained) == 3 and trained[2][1] == 1
    evaluate(config(line.replace("--distilled made", "--distilled poor")))
    assert len(trained) == 4


def test_soft_labels_with_a_teacher_trained_here(here, capsys):
    found = judge(f"{DATA} {SOFT} --data random distilled --distilled made")
    for row in found.values():
        told = row["protocol"]
        assert told["protocol"] == "rded" and told["teacher"] == "conv1 (trained here)"
        assert told["teacher_accuracy"] > 60
    kept = list(Path("runs").rglob("teachers/*.pth"))
    assert len(kept) == 1 and "trained once" in capsys.readouterr().out
    before = kept[0].stat().st_mtime_ns
    evaluate(config(f"{DATA} {SOFT} --data distilled --distilled made --tag again"))
    assert kept[0].stat().st_mtime_ns == before
    folders = {path.parent.name for path in results()}
    assert folders == {f"rded-folder-conv1-ipc4{tag}-e6-seed0" for tag in ("", "-again")}


def test_teachers_that_do_not_fit(here):
    torch.save({"model": {}}, "empty.pth")
    with pytest.raises(UserError, match=r"empty\.pth"):
        judge(f"{DATA} {SOFT} --distilled made --teacher empty.pth")
    with pytest.raises(UserError, match=r"no teacher at nowhere\.pth"):
        judge(f"{DATA} {SOFT} --distilled made --teacher nowhere.pth")


def test_a_published_teacher_is_found_where_its_commands_expect_it(here):
    cfg = config("--dataset folder --arch-name conv1 --teacher_epochs 3").teacher
    assert prototype_inputs.published_teacher(cfg, "folder", 3) == cfg
    path = Path("data/pretrain_models/cifar10_conv1.pth")
    path.parent.mkdir(parents=True)
    path.touch()
    assert prototype_inputs.published_teacher(cfg, "cifar10", 3).teacher == str(path)


def test_rded_folders(here, trained):
    """The data set by RDED's name, numbered class folders, below ./exp, as its commands name them."""
    joined = here / "exp" / "folder_conv1_f1_mipc7_ipc2_cr3" / "sub"
    joined.mkdir(parents=True)
    for number, ident in enumerate(sorted(COLOURS)):
        (joined / f"{number:05d}").symlink_to(here / "made" / ident)
    line = f"{DATA} {HARD} --arch-name conv1 --syn-data-path sub --num-crop 3 --ipc 2 --data distilled"
    found = judge(f"{line} --mipc 7")
    assert found["distilled"]["size"] == 6 and trained[0][0][1] == ["berry-00.png", "berry-01.png"]
    with pytest.raises(UserError, match="no folder of distilled images at sub, nor at exp/folder_conv1_f1_mipc300"):
        evaluate(config(line))


def test_a_run_folder_tells_its_data(here, trained):
    """Without flags: the images of runs/vlcp/<name>, of the data, classes and ipc that its manifest notes."""
    run = here / "runs" / "vlcp" / "mine"
    run.mkdir(parents=True)
    (run / "images").symlink_to(here / "made")
    manifest = Manifest(run)
    manifest.record("data", dataset="folder", data_path="real", workers=1)
    manifest.record("prototypes", ipc=2)
    found = judge(f"--name mine --device cpu {HARD}")
    assert found["distilled"]["size"] == 6
    assert results()[0].parent == Path("runs/vlcp/mine/eval/minimax-folder-convnet-ipc2-e6-seed0")
    assert recorded(["--distilled", "runs/vlcp/mine/images"])["ipc"] == 2
    assert recorded(["--name", "other"]) == {}


def test_coresets_by_latents(here, trained):
    """The image of each class whose latent lies in the middle is the one that herding takes first."""
    run = here / "runs" / "vlcp" / "folder"
    Manifest(run).record("images", ipc=1)
    for ident in COLOURS:
        names = [f"{ident}/{ident}-{i:02d}.png" for i in range(12)]
        latents = torch.ones(12, 4, 2, 2) * torch.tensor([*range(11), 5.0])[:, None, None, None]
        save_vectors(run / "latents" / f"{ident}.safetensors", {"latents": latents, "inputs": torch.zeros(1)})
        prototypes(run, ident, names)
    line = f"{DATA} {HARD} --data herding --ipc 1 --coreset_features latent --repeat 1"
    judge(line)
    assert trained[0][0] == {label: [f"{ident}-05.png"] for label, ident in enumerate(sorted(COLOURS))}
    (run / "latents" / "apple.safetensors").unlink()
    with pytest.raises(UserError, match=r"no latents at .*apple"):
        evaluate(config(f"{line} --tag other"))


def prototypes(run, ident, names):
    from methods.prototype_files import Prototypes, save_prototypes

    save_prototypes(
        run / "prototypes",
        Prototypes(ident, ident, torch.zeros(1, 4, 2, 2), ["a"], [""], [[]], names, [0] * len(names), [names[0]]),
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--distilled nowhere", "no folder of distilled images at nowhere"),
        ("", "no folder of distilled images at runs/vlcp/folder/images; run distill.py first"),
        ("--distilled made --ipc 5", "has 4 images of class apple, fewer than --ipc 5"),
        ("--data random --ipc 13", "class apple has 12 real training images, fewer than --ipc 13"),
        ("--data random", "--ipc is not given, and there are no distilled images"),
        ("--distilled made --syn-data-path poor", "--distilled and --syn_data_path both name distilled images"),
        ("--imagenet_dir made real poor", "--imagenet_dir names 3 folders"),
        ("--imagenet_dir made elsewhere", "--data_path real and --imagenet_dir elsewhere differ"),
        ("--distilled made -n resnet-ap", r"did you mean 'resnet_ap'\?"),
        ("--distilled made --subset cifar10", "--subset cifar10 is not --dataset folder"),
        ("--distilled made --holdout 1", "--holdout is 1.0; it must be below 1"),
        ("--distilled made --tag a/b", "--tag a/b is part of a folder's name"),
        ("--distilled real/val made/apple", "made/apple holds no class folders"),
        ("--distilled made --depth 9", "halves the image 9 times"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(here, trained, flags, message):
    with pytest.raises(UserError, match=message):
        judge(f"{DATA} {HARD} {flags}")
    assert not trained and not results()


def test_options_that_do_nothing_are_told():
    idle = {
        **{"slct_type drawn": "--data distilled", "mipc 3": "--syn-data-path", "holdout 0.2": "--best_on val"},
        **{"coreset_features latent": "--data herding or medoid", "full_epochs 4": "--data full"},
        **{"temperature 3.0": "--protocol rded", "arch_name conv3": "--protocol rded"},
    }
    flags = " ".join(f"--{name}" for name in idle)
    lines = idle_options(config(f"--dataset folder --data random {flags}"))
    assert sorted(lines) == sorted(f"--{name} does nothing without {need}" for name, need in idle.items())
    (line,) = idle_options(config("--dataset folder --protocol rded --depth 3"))
    assert line == "--depth 3 does nothing without --protocol minimax"
    (line,) = idle_options(config("--dataset folder --protocol rded --momentum 0.5"))
    assert line == "--momentum 0.5 does nothing without --protocol minimax, or --sgd"
    assert not idle_options(config("--dataset folder --protocol rded --sgd --momentum 0.5"))
    (line,) = idle_options(config("--dataset folder --mixup vanilla --mix_p 0.5"))
    assert line == "--mix_p 0.5 does nothing without images that are mixed (--mix_type)"


def test_classes_beyond_nclass_are_passed_over(here, trained):
    found = judge(f"{DATA} {HARD} --nclass 2 --data distilled --distilled made --repeat 1")
    assert found["distilled"]["size"] == 8 and found["distilled"]["protocol"]["classes"] == 2


@pytest.mark.parametrize(
    ("flags", "protocol"),
    [
        ("--dataset imagenet --spec nette", "minimax"),
        ("--dataset imagenet --spec imagenet1k", "rded"),
        ("--dataset cifar10", "rded"),
        ("--dataset cifar100 --protocol minimax", "minimax"),
        ("--subset tinyimagenet", "rded"),
        ("--subset imagenet-woof", "minimax"),
        ("--spec woof --stud-name resnet18", "rded"),
        ("--spec woof --syn-data-path x", "rded"),
    ],
)
def test_the_protocol_that_vlcp_uses(flags, protocol):
    assert config(flags).protocol == protocol


def test_published_commands_parse():
    hard = config(
        "-d imagenet --imagenet_dir SYN REAL -n resnet_ap --nclass 10 --norm_type instance --ipc 10 --tag test "
        "--slct_type random --repeat 3 --spec nette --seed 0"
    )
    assert (hard.protocol, hard.networks, hard.judge.repeat, hard.judge.ipc) == ("minimax", ("resnet_ap",), 3, 10)
    soft = config(
        '--subset "cifar10" --arch-name "resnet18_modified" --factor 1 --num-crop 5 --mipc 300 --ipc 10 '
        '--stud-name "resnet18_modified" --re-epochs 500 --syn-data-path P'
    )
    assert (soft.protocol, soft.networks, soft.student.epochs) == ("rded", ("resnet18_modified",), 500)
    assert soft.experiment == "cifar10_resnet18_modified_f1_mipc300_ipc10_cr5"
