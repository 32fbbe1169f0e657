"""The smallest world of each method that has every kind of file, and its commands in order. All places are relative, so
that a command does the same in any copy of its world at the same place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.data.conftest import Library
from tests.dimefm_world import LEARN, LISTS, TAKE, make_world
from tests.test_resume_mtt import write_data
from tests.test_resume_podd import DATA as POSTER
from tests.test_resume_vlcp import BUFFER as TUNED
from tests.test_resume_vlcp import DATA as SHAPES
from tests.test_resume_vlcp import DISTILL as PROTOTYPES
from tests.test_resume_vlcp import RDED

PAIRS = {
    "method": "vldd",
    "common": {
        **{"dataset": "flickr", "image_encoder": "ConvNetD1W8", "text_encoder": "tfidf", "text_dim": 8},
        **{"image_size": 8, "device": "cpu", "workers": 1},
    },
    "buffer": {"num_experts": 2, "train_epochs": 3, "batch_size_train": 8, "mom": 0.5},
    "distill": {
        **{"num_pairs": 4, "syn_steps": 2, "lr_img": 10, "lr_txt": 10, "lr_lr": 1e-6, "sim_type": "lowrank"},
        **{"sim_rank": 2, "lr_sim": 0.1, "loss_type": "WBCE", "iterations": 8, "eval_it": 4, "num_eval": 1},
        **{"epoch_eval_train": 2, "checkpoint_every": 3, "max_start_epoch": 2},
    },
    "eval": {"num_eval": 2, "epoch_eval_train": 2, "data": ["random", "distilled"]},
}
IMAGES = {
    "method": "mtt",
    "common": {"dataset": "npz", "model": "ConvNetD1W8", "device": "cpu", "zca": True},
    "buffer": {"num_experts": 3, "train_epochs": 2, "batch_train": 8, "mom": 0.5, "lr_teacher": 0.05},
    "distill": {
        **{"syn_steps": 2, "expert_epochs": 1, "max_start_epoch": 2, "lr_img": 10, "lr_teacher": 0.02, "ipc": 2},
        **{"batch_syn": 4, "iterations": 8, "eval_it": 4, "checkpoint_every": 3, "num_eval": 2},
        **{"epoch_eval_train": 2},
    },
    "eval": {
        **{"num_eval": 2, "epoch_eval_train": 2, "data": ["random", "distilled"], "random_lrs": [0.01, 0.05]},
    },
}
WINDOWS = (
    *("--batch_size", "10", "--window", "2", "--totwindow", "6", "--distill_batch_size", "5", "--lr", "0.02"),
    *("--inner_lr", "0.02", "--max_outer_steps", "6", "--test_freq", "1", "--checkpoint_every", "2"),
    *("--num_eval", "2", "--eval_steps", "2,4", "--train_y", "--train_lr", "--zca"),
)
JUDGED = ("--data", "random", "distilled", "--num_eval", "2", "--eval_steps", "2,4", "--zca")


@dataclass(frozen=True)
class Case:
    """A command of a method; `label` tells it from others of the same verb."""

    method: str
    verb: str
    words: tuple[str, ...]
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.method}/{self.label or self.verb}"


def _pairs(root: Path) -> None:
    Library(root)
    (root / "row.yaml").write_text(yaml.safe_dump(PAIRS))


def _images(root: Path) -> None:
    write_data(root / "data.npz")
    (root / "row.yaml").write_text(yaml.safe_dump(IMAGES))


def _clip(root: Path) -> None:
    make_world(root)
    for name in ("b", "made"):
        shutil.rmtree(root / name)
    for name in [*os.listdir(root)]:
        if name.startswith(("runs", "cache")):
            shutil.rmtree(root / name)


WORLDS: dict[str, Callable[[Path], None]] = {
    "vldd": _pairs,
    "mtt": _images,
    "podd": lambda root: write_data(root / "data.npz"),
    "vlcp": lambda root: None,
    "dimefm": _clip,
}


def _row(method: str, *places: str) -> list[Case]:
    """The three commands of a row's file."""
    words = ("--config", "row.yaml", *places)
    return [Case(method, verb, (*words, *(("--resume",) * (verb != "eval")))) for verb in ("buffer", "distill", "eval")]


def cases() -> list[Case]:
    """Every command, each after those whose files it reads."""
    poster = (*POSTER, "--data_path", "data.npz", "--cache_dir", "cache", "--name", "t")
    take, learn = (*TAKE[:-2], "--buffer_path", "b", "--cache_dir", "cache"), (*LEARN[:-4], "--cache_dir", "cache")
    learn = (*learn, "--epochs", "2", "--checkpoint_every", "0.6", "--warmup_epochs", "0", "--resume")
    judge = (*TAKE[:6], "--dataset", "folder", "--data_path", "set", "--save_dir", "e", "--cache_dir", "cache")
    judge = tuple(word for word in judge if word not in ("--teacher", "tiny"))
    return [
        *_row("vldd", "--image_root", "images", "--ann_root", "notes", "--cache_dir", "cache"),
        *_row("mtt", "--data_path", "data.npz", "--cache_dir", "cache"),
        Case("podd", "distill", (*poster, *WINDOWS, "--resume")),
        Case("podd", "eval", (*poster, *JUDGED, "--distilled", "runs/podd/t/distilled_best.pt")),
        Case("vlcp", "buffer", (*SHAPES, *TUNED, "--resume")),
        Case("vlcp", "distill", (*SHAPES, *PROTOTYPES, "--resume")),
        Case("vlcp", "eval", (*SHAPES, *RDED, "--data", "random", "distilled")),
        Case("dimefm", "buffer", (*take, "--resume")),
        Case("dimefm", "distill", (*learn, "--buffer_path", "b", "--save_dir", "made")),
        Case("dimefm", "distill", (*learn, *LISTS, "--save_dir", "tsv"), "distill-tsv"),
        Case("dimefm", "eval", (*judge, "--ckpt", "made")),
    ]
