"""Everything that DIME-FM's commands read, small and whole, for tests to spoil."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.payloads import image_payload, vector_payload
from data.tsv import TsvWriter
from methods import clip_inputs, clip_judging, dimefm
from tests.conftest import works

IMAGES, TEXTS = 40, 30
SOME = ("--method", "dimefm", "--device", "cpu", "--workers", "1")
TAKE = (*SOME, "--teacher", "tiny", "--images", "pics", "--texts", "texts.txt", "--buffer_path", "n")
LEARN = (
    *(*SOME, "--student", "vit_tiny", "--batch_size", "8", "--epochs", "1", "--warmup_epochs", "0"),
    *("--save_dir", "o"),
)
LISTS = ("--tsv_file_list", "image_00.tsv", "image_00.feat.tsv", "text_00.tsv", "text_00.feat.tsv", "--teacher", "tiny")
JUDGE = (*SOME, "--dataset", "folder", "--data_path", "set", "--ckpt", "made", "--save_dir", "e")
FLAGS = {"buffer": TAKE, "distill": (*LEARN, "--buffer_path", "b"), "eval": JUDGE}


def paint(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)


def make_world(root: Path) -> None:
    """Images and sentences, as files and as TSV; `b`: the tiny CLIP's features of them; `made`: a student of these;
    `set`: labelled images of two classes. Made without any connection to the world."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        paint(root / f"pics/{number:02}.png", rng)
    for split, name, number in ((s, n, i) for s in ("train", "test") for n in ("ant", "bee") for i in range(6)):
        paint(root / f"set/{split}/{name}/{number}.png", rng)
    (root / "texts.txt").write_text("".join(f"a picture of {number}\n" for number in range(TEXTS)))

    def unreachable(*args: object) -> None:
        raise AssertionError("something asks the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(socket.socket, "connect", unreachable)
        works("buffer", *TAKE, "--buffer_path", "b")
        feats = {kind: np.load(f"b/{kind}_feats.npy") for kind in ("image", "text")}
        pics = [image_payload(Path(f"pics/{number:02}.png").read_bytes()) for number in range(IMAGES)]
        said = [json.dumps({"captions": [f"a picture of {number}"]}) for number in range(TEXTS)]
        for kind, rows in (("image", pics), ("text", said)):
            with TsvWriter(f"{kind}_00.tsv") as data, TsvWriter(f"{kind}_00.feat.tsv") as features:
                for number, row in enumerate(rows):
                    data.add(f"{kind}{number}", row)
                    features.add(f"{kind}{number}", vector_payload(feats[kind][number]))
        works("distill", *LEARN, *LISTS, "--save_dir", "made")
        works("eval", *JUDGE)
        shutil.rmtree("e")


def own_world(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it here, and no pages, whose charts take most of the time."""
    shutil.copytree(world, ".", dirs_exist_ok=True)
    for place in (dimefm, clip_judging):
        monkeypatch.setattr(place, "refresh_page", lambda folder: None)


def no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading or building a network fails the test: what is wrong must have been told before."""

    def load(*args: object, **options: object) -> None:
        raise AssertionError("a network is loaded")

    for place, name in ((clip_inputs, "load_clip"), (dimefm, "build_student"), (clip_judging, "open_towers")):
        monkeypatch.setattr(place, name, load)


def nothing_begun() -> bool:
    """No file but the command's own config, and no results."""
    files = [path.name for folder in "noe" for path in Path(folder).rglob("*") if path.is_file()]
    return {*files} <= {"config.yaml", "inputs.json"} and not Path("runs").exists()


def told(refused: Callable[..., str], verb: str, flags: str, parts: list[str], code: int = 2) -> None:
    """The command is refused by a line with all these parts."""
    line = refused(verb, *FLAGS[verb], *flags.split(), code=code)
    assert all(part in line for part in parts), line
    assert nothing_begun()


def change(path: str, damage: Callable[[bytes], bytes]) -> None:
    """Write a file anew, damaged."""
    Path(path).write_bytes(damage(Path(path).read_bytes()))
