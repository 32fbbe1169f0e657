"""The commands that MTT's authors published, word for word."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.subsets import subset_classes, wordnet_names
from methods.command import command, method_name
from methods.core.store import TrajectoryStore
from methods.mtt import CONFIGS
from tests.data.conftest import Library
from utils.config import idle_options, options_of, parse
from utils.errors import UserError
from utils.files import load_tensors

ROOT = Path(__file__).resolve().parents[1]
BUFFER = (
    "python buffer.py --dataset=CIFAR100 --model=ConvNet --train_epochs=50 --num_experts=100 --zca "
    "--buffer_path={path_to_buffer_storage} --data_path={path_to_dataset}"
)
DISTILL = (
    "python distill.py --dataset=CIFAR100 --ipc=1 --syn_steps=20 --expert_epochs=3 --max_start_epoch=20 --zca "
    "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --buffer_path={path_to_buffer_storage} --data_path={path_to_dataset}"
)
IMAGENET = (
    "python distill.py --dataset=ImageNet --subset=imagefruit --model=ConvNetD5 --ipc=1 --res=128 --syn_steps=20 "
    "--expert_epochs=2 --max_start_epoch=10 --lr_img=1000 --lr_lr=1e-06 --lr_teacher=0.01 "
    "--buffer_path={path_to_buffer_storage} --data_path={path_to_dataset}"
)
TEXTURE = (
    "python distill.py --texture --dataset=ImageNet --subset=imagesquawk --model=ConvNetD5 --ipc=1 --res=256 "
    "--syn_steps=20 --expert_epochs=2 --max_start_epoch=10 --lr_img=1000 --lr_lr=1e-06 --lr_teacher=0.01 "
    "--buffer_path={path_to_buffer_storage} --data_path={path_to_dataset}"
)
# Each flag of the released scripts that means something, with another value than its default, and where it acts.
DATA = """
--dataset CIFAR100           data.dataset          CIFAR100
--subset imagewoof           data.subset           imagewoof
--res 64                     data.res              64
--data_path images           data.data_path        images
--zca                        data.zca              True
--model ConvNetD4            net.model             ConvNetD4
--dsa False                  net.dsa               False
--dsa=True                   net.dsa               True
--dsa_strategy color_crop    net.dsa_strategy      color_crop
"""
FLAGS = {
    "buffer": f"""{DATA}
--buffer_path buffers        real.buffer_path         buffers
--num_experts 7              expert.num_experts       7
--lr_teacher 0.02            real.lr_teacher          0.02
--batch_train 128            expert.batch_size_train  128
--train_epochs 3             expert.train_epochs      3
--decay                      expert.decay             True
--mom 0.9                    expert.mom               0.9
--l2 5e-4                    expert.l2                0.0005
--save_interval 2            real.save_interval       2
--rho_max 0.01               expert.rho               0.01
--alpha 1 --rho_max 0.01     expert.gsam_alpha        1.0
--adaptive False --rho 0.01  expert.adaptive          False
""",
    "distill": f"""{DATA}
--buffer_path buffers        match.buffer_path        buffers
--ipc 10                     images.ipc               10
--eval_mode M                judge.eval_mode          M
--num_eval 3                 judge.num_eval           3
--eval_it 50                 outer.eval_it            50
--epoch_eval_train 300       judge.epoch_eval_train   300
--Iteration 10               outer.iterations         10
--lr_img 1e4                 images.lr_img            10000.0
--lr_lr 1e-07                images.lr_lr             1e-07
--lr_teacher 0.001           images.lr_teacher        0.001
--batch_syn 125              images.batch_syn         125
--batch_train 128            judge.batch_train        128
--pix_init noise             images.start             noise
--expert_epochs 2            match.expert_epochs      2
--syn_steps 80               match.syn_steps          80
--max_start_epoch 40         match.max_start_epoch    40
--load_all                   match.load_all           True
--no_aug True                images.no_aug            True
--no_aug False               images.no_aug            False
--texture                    images.texture           True
--canvas_size 3              images.canvas_size       3
--canvas_samples 2           images.canvas_samples    2
--max_files 1                match.max_files          1
--max_experts 4              match.max_experts        4
--force_save                 show.force_save          True
--ema_decay 0.999            images.ema_decay         0.999
--teacher_label              images.label_kind        teacher
--min_start_epoch 5          match.min_start_epoch    5
--lr_y 2                     images.lr_y              2.0
--Momentum_y 0.8             images.momentum_y        0.8
--threshold 1.1              outer.threshold          1.1
""",
}
ROWS = [(verb, line) for verb, lines in FLAGS.items() for line in lines.splitlines() if line]
DEAD = [("buffer", "--batch_real=256"), ("distill", "--batch_real=256"), ("distill", "--lr_init=0.01")]
# What makes the commands small; they stand at the end, where a later flag wins over an earlier one.
FEW = "--device cpu --Iteration 2 --eval_it 2 --num_eval 1 --epoch_eval_train 1"
EXPERTS = "--device cpu --num_experts 2 --train_epochs 2 --batch_train 16 --eval_freq 0"
SEGMENT = "--syn_steps 3 --expert_epochs 1 --max_start_epoch 2"


def words(text: str, buffers: str = "buffers", images: str = "images") -> list[str]:
    """The published flags, with folders in their placeholders."""
    return shlex.split(text.format(path_to_buffer_storage=buffers, path_to_dataset=images))[2:]


def parsed(verb: str, *flags: str) -> object:
    peers = tuple(config for name, config in CONFIGS.items() if name != verb)
    return parse(CONFIGS[verb], verb, flags, peers)[0]


def test_the_data_set_names_the_method():
    """None of the commands has --method."""
    for text in (BUFFER, DISTILL, IMAGENET, TEXTURE):
        assert "--method" not in text and method_name(words(text)) == "mtt"


def test_every_published_flag_acts():
    cfg = parsed("buffer", *words(BUFFER))
    assert (cfg.data.dataset, cfg.data.zca, cfg.data.data_path, cfg.net.model) == (
        "CIFAR100",
        True,
        "images",
        "ConvNet",
    )
    assert (cfg.expert.train_epochs, cfg.expert.num_experts, cfg.real.buffer_path) == (50, 100, "buffers")
    cfg = parsed("distill", *words(DISTILL))
    assert (cfg.data.dataset, cfg.data.zca, cfg.data.data_path, cfg.net.model) == (
        "CIFAR100",
        True,
        "images",
        "ConvNet",
    )
    assert (cfg.match.syn_steps, cfg.match.expert_epochs, cfg.match.max_start_epoch) == (20, 3, 20)
    assert (cfg.images.lr_img, cfg.images.lr_lr, cfg.images.lr_teacher) == (1000.0, 1e-5, 0.01)
    assert (cfg.images.ipc, cfg.match.buffer_path, cfg.images.texture) == (1, "buffers", False)


@pytest.mark.parametrize(
    "text, subset, res, texture, start",
    [(IMAGENET, "imagefruit", 128, False, "real"), (TEXTURE, "imagesquawk", 256, True, "noise")],
    ids=["images", "textures"],
)
def test_every_published_flag_of_imagenet_acts(text, subset, res, texture, start):
    cfg = parsed("distill", *words(text))
    assert (cfg.data.dataset, cfg.data.subset, cfg.data.res, cfg.data.zca) == ("ImageNet", subset, res, False)
    assert (cfg.net.model, cfg.images.ipc, cfg.match.syn_steps) == ("ConvNetD5", 1, 20)
    assert (cfg.match.expert_epochs, cfg.match.max_start_epoch) == (2, 10)
    assert (cfg.images.lr_img, cfg.images.lr_lr, cfg.images.lr_teacher) == (1000.0, 1e-6, 0.01)
    assert (cfg.images.texture, cfg.images.start, cfg.images.canvas_size) == (texture, start, 2)
    assert (cfg.match.buffer_path, cfg.data.data_path) == ("buffers", "images")


@pytest.mark.parametrize("verb, line", ROWS, ids=[f"{verb} {line.split('  ')[0]}" for verb, line in ROWS])
def test_every_flag_of_the_released_scripts(verb, line):
    *flag, path, value = line.split()
    found = parsed(verb, *flag)
    for name in path.split("."):
        found = getattr(found, name)
    assert str(found) == value


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_option_is_read_somewhere(verb):
    """A flag that parses and does nothing is worse than one that is refused."""
    folders = ("methods", "data", "networks", "utils")
    source = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert not [name for name in options_of(CONFIGS[verb]) if not re.search(rf"\.{name}\b", source)]


@pytest.mark.parametrize(
    "verb, flags, others",
    [
        ("buffer", "--alpha 1 --adaptive false", "--rho 0.01"),
        ("distill", "--canvas_size 3 --canvas_samples 2", "--texture"),
        ("distill", "--lr_y 2 --Momentum_y 0.8", "--labels learned"),
        ("distill", "--current_max_start_epoch 4 --expansion_end_epoch 9", "--Sequential_Generation"),
        ("distill", "--norm mtt", "--dataset CIFAR100"),
        ("distill", "--subset imagewoof", "--dataset ImageNet"),
        ("eval", "--robust --data full", "--data random distilled"),
        ("eval", "--data random --syn_lr 0.1", "--data distilled"),
        ("eval", "--data distilled --ipc 2", "--data random"),
    ],
)
def test_flags_that_take_another_say_so(verb, flags, others):
    alone = idle_options(parsed(verb, *flags.split()))
    assert len(alone) == len(re.findall("--(?!data)", flags))
    assert all(f"without {others.split()[0]}" in line for line in alone)
    assert idle_options(parsed(verb, *flags.split(), *others.split())) == []


@pytest.mark.parametrize("verb, flag", DEAD)
def test_flags_that_did_nothing_are_refused(verb, flag):
    with pytest.raises(UserError, match=f"unknown flag {flag.split('=')[0]}"):
        parsed(verb, flag)


def test_the_defaults_are_the_released_ones():
    """Where a command leaves a flag out, what it leaves out is the same; the number of epochs is the protocol's."""
    buffer, distill = ({name: known.default for name, known in options_of(CONFIGS[verb]).items()} for verb in FLAGS)
    shared = {"dataset": "CIFAR10", "subset": "imagenette", "model": "ConvNet", "dsa": True, "zca": False}
    shared |= {"lr_teacher": 0.01, "dsa_strategy": "color_crop_cutout_flip_scale_rotate"}
    theirs = {"num_experts": 100, "batch_size_train": 256, "train_epochs": 50, "mom": 0, "l2": 0, "decay": False}
    assert shared.items() | theirs.items() | {("save_interval", 10)} <= buffer.items()
    theirs = {"ipc": 1, "eval_mode": "S", "num_eval": 5, "eval_it": 100, "iterations": 5000, "lr_img": 1000}
    theirs |= {"lr_lr": 1e-5, "batch_syn": None, "expert_epochs": 3, "syn_steps": 20, "max_start_epoch": 25}
    theirs |= {"load_all": False, "no_aug": False, "texture": False, "canvas_size": 2, "canvas_samples": 1}
    theirs |= {"max_files": None, "max_experts": None, "force_save": False}
    assert shared.items() | theirs.items() <= distill.items()


# --- the commands run ---


def run(verb: str, flags: list[str], more: str) -> None:
    assert command(verb, [*flags, *more.split()]) == 0


def ends(folder: str) -> tuple[dict, dict]:
    """What a distillation of two steps began with and what it learned; its best file judges on its own."""
    first, last = (load_tensors(Path(folder, f"distilled_{step}.pt"), "distilled file") for step in (0, 2))
    assert 0 < float(last["lr"]) < 1 and float(last["lr"]) != float(first["lr"])
    assert torch.isfinite(last["images"]).all() and not torch.equal(first["images"], last["images"])
    assert torch.equal(first["labels"], last["labels"])
    assert {path.name for path in Path(folder).iterdir()} >= {
        *("distilled_best.pt", "images_best.pt", "labels_best.pt", "lr_best.pt", "log.jsonl", "config.yaml"),
        *("report.html", "synthetic_images_0.png", "clipped_synthetic_images_2_std_2.5.png"),
    }
    return first, last


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """torchvision's CIFAR-100 with three training images of each class and one to test on."""
    from torchvision import datasets

    def stand_in(root: str, train: bool, download: bool) -> SimpleNamespace:
        labels = np.arange(100).repeat(3 if train else 1)
        pixels = np.random.default_rng(int(train)).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
        return SimpleNamespace(data=pixels, targets=labels.tolist(), classes=[f"class {label}" for label in range(100)])

    monkeypatch.setattr(datasets, "CIFAR100", stand_in)
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()


def test_cifar100(cifar100):
    """Experts, one image a class and their evaluation, whitened; at 8 px, since a whitening of 32 px takes long."""
    run("buffer", words(BUFFER), f"{EXPERTS} --res 8")
    store = TrajectoryStore.open(Path("buffers/CIFAR100/ConvNet"))
    assert (store.count, store.epochs(0)) == (2, [0, 1, 2])
    assert [shape for _, shape in store.shapes["net"]][-2:] == [[100, 128], [100]]
    run("distill", words(DISTILL), f"{SEGMENT} {FEW} --res 8")
    _, last = ends("runs/mtt/CIFAR100")
    assert last["images"].shape == (100, 3, 8, 8) and last["labels"].tolist() == list(range(100))
    meta, zca = last["meta"], load_tensors("runs/mtt/CIFAR100/distilled_best.pt", "best")["zca"]
    assert meta["zca"] and zca and meta["config"]["zca"] and meta["classes"][7] == "class 7"
    assert Path("runs/mtt/CIFAR100/dewhitened_images_2.png").exists()
    judged = "--data distilled random --random_lrs 0.01 --num_eval 1 --epoch_eval_train 1 --device cpu"
    run("eval", ["--distilled", "runs/mtt/CIFAR100/distilled_best.pt", "--data_path", "images"], judged)
    # As published: tensors alone, from which nothing of their making can be read.
    run(
        "eval",
        shlex.split("--dataset CIFAR100 --zca --data_path images --res 8 --save_dir e"),
        f"{judged} --distilled runs/mtt/CIFAR100/images_best.pt",
    )
    (result,) = Path("runs/mtt/CIFAR100").rglob("result.json")
    found = [json.loads(path.read_text())["rows"] for path in (result, Path("e/result.json"))]
    for rows in found:
        assert [(row["name"], row["size"]) for row in rows] == [("distilled", 100), ("random", 100)]
        assert all(0 <= row["metrics"]["acc"]["mean"] <= 100 for row in rows)
    # The same images at the same rate: the same judgement.
    assert found[0][0]["metrics"]["acc"] == found[1][0]["metrics"]["acc"]


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """The classes of two subsets of ImageNet: three training photographs of each and one to test on."""
    rng, wnids = np.random.default_rng(0), wordnet_names()[0]
    for number in (*subset_classes("imagefruit")[0], *subset_classes("imagesquawk")[0]):
        for name in ("train/{}/0", "train/{}/1", "train/{}/2", "val/{}/0"):
            path = tmp_path / "images" / f"{name.format(wnids[number])}.JPEG"
            Library.picture(path, rng.integers(30, 60, 2), rng)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "text, subset, side, classes",
    [(IMAGENET, "imagefruit", 32, ("pineapple", "green apple")), (TEXTURE, "imagesquawk", 64, ("peacock", "cockatoo"))],
    ids=["images", "textures"],
)
def test_imagenet(imagenet, text, subset, side, classes):
    """The published network at 32 px, which is the least that its five halvings take; canvases are twice as wide."""
    common = f"--dataset=ImageNet --subset={subset} --model=ConvNetD5 --buffer_path=buffers --data_path=images --res 32"
    run("buffer", common.split(), EXPERTS)
    assert TrajectoryStore.open(Path(f"buffers/ImageNet/{subset}/32/ConvNetD5")).count == 2
    run("distill", words(text), f"{SEGMENT} {FEW} --res 32")
    first, last = ends(f"runs/mtt/ImageNet_{subset}")
    assert last["images"].shape == (10, 3, side, side) and last["labels"].tolist() == list(range(10))
    assert (last["meta"]["classes"][0], last["meta"]["classes"][-1]) == classes
    if side == 64:
        assert abs(float(first["images"].mean())) < 0.05 and abs(float(first["images"].std()) - 1) < 0.05  # noise
        assert Path(f"runs/mtt/ImageNet_{subset}/textures_2.png").exists()
    judged = "--data distilled random --random_lrs 0.01 --num_eval 1 --epoch_eval_train 1 --device cpu"
    run("eval", ["--subset", subset, "--dataset", "ImageNet", "--data_path", "images"], judged)
