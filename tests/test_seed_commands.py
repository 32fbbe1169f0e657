"""The commands that VLDD's authors published, word for word."""

import re
import shlex
import time
from pathlib import Path

import pytest
import torch

from methods.command import command
from methods.core.store import TrajectoryStore
from methods.vldd import CONFIGS
from tests.data.conftest import Library
from utils.config import options_of, parse

ROOT = Path(__file__).resolve().parents[1]
BUFFER = (
    "python buffer.py --dataset=flickr --train_epochs=10 --num_experts=20 --buffer_path={path_to_buffer} "
    "--image_encoder=nfnet --text_encoder=bert --image_size=224 --image_root={path_to_image_directory} "
    "--ann_root={path_to_annotation_directory}"
)
DISTILL = (
    "python distill.py --dataset=flickr --syn_steps=8 --expert_epochs=1 --max_start_epoch=2 "
    "--lr_img=1000 --lr_txt=1000 --lr_lr=1e-02 --buffer_path={path_do_buffer} --num_queries 100 "
    "--image_encoder=nfnet --text_encoder=bert --draw True --image_root={path_to_image_directory} "
    "--ann_root={path_to_annotation_directory} --save_dir={path_to_saved_distilled_data}"
)
COMMANDS = {"buffer": BUFFER, "distill": DISTILL}
# What of the published setting a small machine without a network cannot have.
OFFLINE = ["--image_pretrained", "false", "--text_pretrained", "false", "--image_size", "32", "--device", "cpu"]


@pytest.fixture
def library(tmp_path, monkeypatch) -> Library:
    """Twelve photographs' worth of Flickr30K, a folder of its own, and no model hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return Library(tmp_path / "library")


def words(verb: str, library: Library | None = None, trajectories: str = "buffers", out: str = "out") -> list[str]:
    """The published flags, with folders in their placeholders."""
    images, notes = (library.images, library.notes) if library else ("images", "notes")
    places = {"path_to_buffer": "buffers", "path_do_buffer": trajectories, "path_to_saved_distilled_data": out}
    text = COMMANDS[verb].format(path_to_image_directory=images, path_to_annotation_directory=notes, **places)
    return shlex.split(text)[2:]


def parsed(verb: str, *flags: str) -> object:
    peers = tuple(config for name, config in CONFIGS.items() if name != verb)
    return parse(CONFIGS[verb], verb, flags, peers)[0]


def test_every_published_flag_acts():
    cfg = parsed("buffer", *words("buffer"))
    assert (cfg.data.dataset, cfg.data.image_size) == ("flickr", 224)
    assert (cfg.data.image_root, cfg.data.ann_root, cfg.real.buffer_path) == ("images", "notes", "buffers")
    assert (cfg.expert.train_epochs, cfg.expert.num_experts) == (10, 20)
    assert (cfg.towers.image_encoder, cfg.towers.text_encoder) == ("nfnet", "bert")
    cfg = parsed("distill", *words("distill"))
    assert (cfg.match.syn_steps, cfg.match.expert_epochs, cfg.match.max_start_epoch) == (8, 1, (2,))
    assert (cfg.pairs.lr_img, cfg.pairs.lr_txt, cfg.pairs.lr_lr, cfg.pairs.num_pairs) == (1000.0, 1000.0, 0.01, (100,))
    assert (cfg.match.buffer_path, cfg.show.save_dir, cfg.show.draw) == ("buffers", "out", True)
    assert (cfg.data.image_root, cfg.data.ann_root) == ("images", "notes")
    assert (cfg.towers.image_encoder, cfg.towers.text_encoder) == ("nfnet", "bert")


@pytest.mark.parametrize(
    "flags, path, value",
    [
        ("--Iteration 7", "outer.iterations", 7),
        ("--num_queries=9", "pairs.num_pairs", (9,)),
        ("--num_queries 99 100", "pairs.num_pairs", (99, 100)),
        ("--draw", "show.draw", True),
        ("--draw False", "show.draw", False),
        ("--draw=False", "show.draw", False),
        ("--draw --num_queries 3", "show.draw", True),
        ("--lr_lr=1e-02", "pairs.lr_lr", 0.01),
        ("--syn_steps=8.0", "match.syn_steps", 8),
    ],
)
def test_published_spellings(flags, path, value):
    found = parsed("distill", *flags.split())
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_option_is_read_somewhere(verb):
    """A flag that parses and does nothing is worse than one that is refused."""
    folders = ("methods", "data", "networks", "utils")
    source = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py"))
    unread = [name for name in options_of(CONFIGS[verb]) if not re.search(rf"\.{name}\b", source)]
    assert not unread


@pytest.mark.parametrize("verb", COMMANDS)
def test_offline_the_missing_weights_are_named(verb, library, capsys):
    began = time.monotonic()
    assert command(verb, [*words(verb, library), "--device", "cpu"]) == 2
    last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert last.startswith(f"{verb}.py: error: pretrained weights of ") and "_pretrained false" in last
    assert "nfnet_l0" in last or "bert-base-uncased" in last
    assert time.monotonic() - began < 15


def test_flickr30k_is_flickr(library, capsys):
    flags = ["--dataset=flickr30k" if word == "--dataset=flickr" else word for word in words("buffer", library)]
    assert command("buffer", [*flags, "--device", "cpu"]) == 2
    assert "pretrained weights of " in capsys.readouterr().err


def test_the_commands_run(library):
    """Both, scaled down by flags added at their ends; the networks are of the published size."""
    fewer = ["--train_epochs", "2", "--num_experts", "1", "--batch_size_train", "8"]
    assert command("buffer", [*words("buffer", library), *OFFLINE, *fewer]) == 0
    leaf = Path("buffers/flickr/nfnet/bert")
    store = TrajectoryStore.open(leaf)
    assert store.epochs(0) == [0, 1, 2]
    assert {group: sum(torch.Size(shape).numel() for _, shape in parts) for group, parts in store.shapes.items()} == {
        "img": 32_769_488,
        "txt": 7_087_104,
    }
    judged = ["--num_eval", "1", "--epoch_eval_train", "1"]
    # Three batches an epoch take an expert so short a way that the published rate of the rates overshoots at once.
    fewer = ["--num_queries", "4", "--syn_steps", "2", *judged]
    # The root of the trajectories, and the leaf that the reference wants.
    for place, out, steps in (("buffers", "out", "1"), (str(leaf), "out2", "0")):
        assert command("distill", [*words("distill", library, place, out), *OFFLINE, *fewer, "--Iteration", steps]) == 0
    state = torch.load("out/distilled_best.pt", weights_only=True)
    assert state["image"].shape == (4, 3, 32, 32) and state["text"].shape == (4, 768)
    assert {path.name for path in Path("out").iterdir()} >= {
        *("distilled_0.pt", "distilled_1.pt", "report.html", "log.jsonl", "config.yaml", "synthetic_images_0.png"),
        *("clipped_synthetic_images_1_std_2.5.png", "synthetic_sentences_1.txt"),
    }
    assert command("eval", ["--distilled", "out/distilled_best.pt", *judged]) == 0
