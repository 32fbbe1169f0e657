"""The whole of VLCP, killed in every stage and gone on with, leaves the very files of a chain that nobody disturbed."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.catalogue import Catalogue
from methods import prototype_classes, prototype_files, prototype_gallery, prototype_judging, prototype_synthesis, vlcp
from methods.command import command
from methods.core import hard_labels, teachers
from methods.prototype_learning import Learner
from networks.captioner import Captioner
from tests.conftest import contents, plain
from tests.processes import killed
from utils.folders import folder_digests

DATA = (
    *("--method", "vlcp", "--dataset", "toy", "--toy_images", "48", "--toy_size", "16", "--nclass", "3"),
    *("--name", "t", "--device", "cpu", "--workers", "1"),
)
BUFFER = (
    *("--recaption", "--caption_model", "tiny", "--max_new_tokens", "6", "--caption_batch", "5", "--model", "tiny"),
    *("--temperature", "0.7", "--resolution", "16", "--vae_steps", "5", "--vae_batch_size", "4"),
    *("--num_train_epochs", "2", "--train_batch_size", "4", "--gradient_accumulation_steps", "2"),
    *("--lr_scheduler", "cosine", "--checkpointing_steps", "2", "--validation_epochs", "1"),
    *("--validation_prompts", "a red circle"),
)
DISTILL = (
    *("--ipc", "4", "--few_images", "share", "--size", "16", "--output_size", "16", "--latent", "sample"),
    *("--num_inference_steps", "2", "--synthesis_batch", "3", "--save_prototype_path", "published"),
)
MINIMAX = (
    *("--protocol", "minimax", "--net_type", "convnet", "--depth", "2", "--width", "0.0625", "--size", "16"),
    *("--epochs", "2", "--repeat", "2", "--data", "random", "herding", "distilled", "full", "--full_epochs", "1"),
)
RDED = (
    *("--protocol", "rded", "--arch_name", "conv1", "--size", "16", "--epochs", "5", "--repeat", "1"),
    *("--teacher_epochs", "4", "--teacher_check", "false"),
)
CHAIN = (("buffer", BUFFER), ("distill", DISTILL), ("eval", MINIMAX), ("eval", RDED))


def words(verb: str, flags: tuple[str, ...]) -> list[str]:
    return [*DATA, *flags, *(() if verb == "eval" else ("--resume",))]


@pytest.fixture(scope="module", autouse=True)
def noted_often() -> Iterator[None]:
    """A teacher's training is noted after each epoch, not each minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "SAVE_EVERY", -1.0)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two folders to type commands in, which share a cache by its relative name."""
    root = tmp_path_factory.mktemp("resume")
    (root / "cache").mkdir()
    for name in ("whole", "cut"):
        (root / name).mkdir()
        (root / name / "cache").symlink_to(root / "cache")  # which contents() passes by, as any link
    return root


@pytest.fixture(scope="module")
def whole(root) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "whole")
        for verb, flags in CHAIN:
            assert command(verb, words(verb, flags)) == 0
    return root / "whole"


def files(folder: Path) -> dict[str, Any]:
    """Every file below a folder, byte for byte; none of them holds a time.

    Two kinds differ nevertheless: torch notes the random name of its temporary file, so what such a file holds is
    taken, and a manifest notes places, of which this folder is one, and its checksum.
    """
    found: dict[str, Any] = contents(folder)
    for name, data in found.items():
        if name.endswith((".pt", ".pth")):
            found[name] = plain(torch.load(folder / name, weights_only=True))
        elif name.endswith("manifest.json"):
            data = data.replace(bytes(folder.resolve()), b"HERE")
            found[name] = re.sub(rb' "checksum": "\w+",\n', b"", data, count=1)
    return found


def interrupted(verb: str, flags: tuple[str, ...], place: Any, name: str, number: int, when: str = "after") -> None:
    """Give a command, and interrupt it before or after the `number`th call of `place.name`."""
    left, real = [number], getattr(place, name)

    def call(*args: object, **options: object) -> object:
        left[0] -= 1
        if left[0] == 0 and when == "before":
            raise KeyboardInterrupt
        done = real(*args, **options)
        if left[0] == 0:
            raise KeyboardInterrupt
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, call)
        assert command(verb, words(verb, flags)) == 130, f"{name} was called {number - left[0]} times only"


def cut_buffer() -> None:
    run = Path("runs/vlcp/t/buffers")
    interrupted("buffer", BUFFER, Captioner, "__call__", 3, "before")
    answers = run / "answers.jsonl"
    answers.write_bytes(answers.read_bytes()[:-20])  # the last line is torn
    assert not (run / "metadata.jsonl").exists()
    interrupted("buffer", BUFFER, Learner, "step", 4, "before")  # of the autoencoder, beyond its second checkpoint
    assert (run / "metadata.jsonl").exists() and not (run / "autoencoder").exists()
    interrupted("buffer", BUFFER, Learner, "step", 3 + 1)  # the first step of the denoiser
    assert (run / "autoencoder").exists()
    killed("buffer", words("buffer", BUFFER), "denoiser_00000004.pt")
    assert [path.name for path in (run / "checkpoints").glob("[!.]*")] == ["denoiser_00000002.pt"]
    assert list((run / "checkpoints").glob(".*.part"))  # a whole file that has not got its name
    interrupted("buffer", BUFFER, Learner, "settle", 1)
    assert not (run / "model").exists()


def cut_distill() -> None:
    run = Path("runs/vlcp/t")
    interrupted("distill", DISTILL, prototype_classes, "save_vectors", 1)  # latents of a class, and no more
    interrupted("distill", DISTILL, prototype_files, "save_vectors", 2)  # half of the second class's prototypes
    assert (
        len(list((run / "prototypes").glob("*.safetensors"))) == 2 == 1 + len(list((run / "prototypes").glob("*.json")))
    )
    interrupted("distill", DISTILL, prototype_classes, "save_prototypes", 2)
    assert not (run / "images").exists()
    interrupted("distill", DISTILL, prototype_synthesis, "png_bytes", 3, "before")
    interrupted("distill", DISTILL, prototype_synthesis, "png_bytes", 4)  # in the first batch of the second class
    assert len(list((run / "images").rglob("*.png"))) == 5 and len(list((run / "sheets").iterdir())) == 1
    interrupted("distill", DISTILL, prototype_gallery, "save_grid", 1)
    assert not (run / "report.html").exists()


def cut_eval() -> None:
    run = Path("runs/vlcp/t")
    interrupted("eval", MINIMAX, prototype_judging, "write_signed", 3)
    assert len(list((run / "eval").rglob("progress/*.json"))) == 3 and not list((run / "eval").rglob("result.json"))
    interrupted("eval", MINIMAX, hard_labels.HardLabels, "_loss", 2)  # of the next student
    interrupted("eval", RDED, teachers, "save_tensors", 2)
    (part,) = (run / "teachers").iterdir()
    assert part.name.endswith(".part.pt")
    interrupted("eval", RDED, teachers, "save_tensors", 2)  # the last one is the teacher; its notes are still there
    assert len(list((run / "teachers").iterdir())) == 2
    interrupted("eval", RDED, prototype_judging, "write_signed", 1)


def test_killed_in_every_stage(root, whole, monkeypatch):
    monkeypatch.chdir(root / "cut")
    stages: list[Callable[[], None]] = [cut_buffer, cut_distill, cut_eval]
    for stage, ends in zip(stages, (CHAIN[:1], CHAIN[1:2], CHAIN[2:]), strict=True):
        stage()
        for verb, flags in ends:
            assert command(verb, words(verb, flags)) == 0
    wanted, found = files(whole), files(root / "cut")
    assert sorted(found) == sorted(wanted)
    assert not [name for name in wanted if found[name] != wanted[name]]
    kinds = {Path(name).suffix for name in wanted}
    assert {".jsonl", ".json", ".yaml", ".safetensors", ".pt", ".pth", ".png", ".html"} <= kinds


def test_a_finished_chain_stays_as_it_is(root, whole, monkeypatch):
    monkeypatch.chdir(whole)
    before = files(whole)
    for verb, flags in CHAIN:
        assert command(verb, words(verb, flags)) == 0
    assert files(whole) == before


@pytest.fixture
def copy(root, whole, monkeypatch) -> Path:
    """The run folder of a finished chain, to be changed."""
    place = root / "copy"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place, symlinks=True)
    monkeypatch.chdir(place)
    return Path("runs/vlcp/t")


def refused(verb: str, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    before = contents(Path())
    assert command(verb, words(verb, flags)) == 2 and contents(Path()) == before
    return capsys.readouterr().err


def flip(path: Path) -> None:
    """Another last letter or digit, or bit, than was written."""
    data = bytearray(path.read_bytes())
    at = max(place for place, value in enumerate(data) if chr(value).isalnum())
    data[at] ^= 1
    path.write_bytes(data)


def test_images_of_two_models_do_not_mix(copy, capsys):
    """The denoiser was tuned anew; its autoencoder, and so the prototypes, are as before."""
    weights = copy / "buffers/model/unet/diffusion_pytorch_model.safetensors"
    save_file({name: value / 2 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    prototype_files.Manifest(copy / "buffers").record("model", files=folder_digests(copy / "buffers/model"))
    next((copy / "images").rglob("*.png")).unlink()
    assert "t holds images of another diffusion model" in refused("distill", DISTILL, capsys)


@pytest.mark.parametrize(
    "name", ["model/unet/diffusion_pytorch_model.safetensors", "model/tokenizer/tokenizer_config.json"]
)
def test_a_damaged_model_is_named(copy, capsys, name):
    flip(copy / "buffers" / name)
    for verb, flags in CHAIN[:2]:
        line = refused(verb, flags, capsys)
        assert f"buffers/{name} is damaged (its digest is another); restore it, or" in line


@pytest.mark.parametrize("harm", [flip, lambda path: path.write_bytes(path.read_bytes()[:-20])], ids=["bit", "torn"])
def test_damaged_captions_are_named(copy, capsys, harm):
    """And nothing else is advised, such as to remove a line: the run is pinned to all of them."""
    captions = copy / "buffers/metadata.jsonl"
    harm(captions)
    assert f"{captions} is not as buffer.py left it; restore it, or give --metajson" in refused(
        "distill", DISTILL, capsys
    )


@pytest.mark.parametrize(("verb", "flags"), CHAIN[:2])
def test_changed_images_are_noticed(copy, capsys, monkeypatch, verb, flags):
    monkeypatch.setattr(Catalogue, "fingerprint", lambda self: "of other images")
    assert "holds a run on another training_set" in refused(verb, flags, capsys)


def test_an_image_that_was_damaged_from_the_start_can_be_mended(whole, tmp_path, monkeypatch, capsys):
    """It is told before anything is made, so that nothing hangs on the images as they were."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole / "cache/unpacked", "cache/unpacked")
    captions = whole / "runs/vlcp/t/buffers/metadata.jsonl"
    (folder,) = Path("cache/unpacked").iterdir()
    image = folder / "train" / json.loads(captions.read_text().splitlines()[-1])["file_name"]
    good = image.read_bytes()
    for flags in (BUFFER, (*BUFFER[1:], "--stages", "finetune", "--metajson_file", str(captions))):
        shutil.rmtree("runs", ignore_errors=True)
        image.write_bytes(good[:40])
        assert command("buffer", words("buffer", flags)) == 2
        assert f"image {image} cannot be decoded" in capsys.readouterr().err
        image.write_bytes(good)
        assert command("buffer", words("buffer", flags)) == 0, capsys.readouterr().err
        assert Path("runs/vlcp/t/buffers/model/model_index.json").is_file()


def test_a_model_keeps_to_its_captions_and_its_beginning(copy, capsys):
    captions = copy / "buffers/metadata.jsonl"
    captions.write_text(captions.read_text().replace('"text": "', '"text": "corrected '))
    assert "metadata.jsonl has other captions than were found here" in refused("buffer", BUFFER, capsys)
    tuning = (*BUFFER, "--stages", "finetune")
    assert "buffers was tuned on other captions" in refused("buffer", tuning, capsys)
    shutil.rmtree(copy / "buffers/model")  # begun, not ended
    assert "buffers was tuned on other captions" in refused("buffer", tuning, capsys)
    shutil.copy(copy.parents[2] / "../whole/runs/vlcp/t/buffers/metadata.jsonl", captions)
    base = next(Path("cache").glob("tiny_diffusion_*"))
    start = Path("base").absolute()
    shutil.copytree(base, start)
    (start / "scheduler/scheduler_config.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlcp, "open_model", lambda *names: str(start))
        assert "buffers began as another --model" in refused("buffer", tuning, capsys)
