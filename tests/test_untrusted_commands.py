"""Malicious pickles in every place where a command takes files of others: it is refused in one line, and nothing that
the pickle asks for is done."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import TINY
from tests.golden.make import BEGUN, CLASSES, DATA, EXPERTS, FEW, LEARN, write_data
from tests.test_untrusted import FORMS, Malice

GOLDEN = Path(__file__).parent / "golden" / "1"
CPU = ("--device", "cpu", "--workers", "1")
ONE = ("--num_experts", "1")
Trap = Callable[[Path], None]  # puts the pickle there
pytestmark = pytest.mark.usefixtures("own_folder")


def pictures() -> None:
    for split in ("train", "val"):
        for number in (1, 2):
            path = Path("set", split, "cat", f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (number, 90, 10)).save(path)
    rows = [{"file_name": f"cat/{number}.png", "text": "a cat"} for number in (1, 2)]
    Path("set/train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def bert(trap: Trap) -> str:
    from transformers import BertConfig

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertConfig(**shape, vocab_size=9).save_pretrained("theirs")
    trap(Path("theirs/pytorch_model.bin"))
    return "theirs"


def text_folder(trap: Trap) -> tuple:
    return ("buffer", *TINY[:-1], bert(trap), *CPU, *ONE)


def text_weights_folder(trap: Trap) -> tuple:
    return ("buffer", *TINY[:-1], "distilbert", "--text_weights", bert(trap), *CPU, *ONE)


def text_cache(trap: Trap) -> tuple:
    for part in ("", "train_"):
        trap(Path(f"cached/toy_bert_{part}text_embed.npz"))
    return ("buffer", *TINY[:-1], "bert", "--text_cache", "cached", *CPU, *ONE)


def timm_file(trap: Trap) -> tuple:
    trap(Path("weights.pth"))
    flags = ("--image_encoder", "resnet18", "--image_weights", "weights.pth")
    return ("buffer", *TINY, *flags, *CPU, *ONE)


def timm_cached(trap: Trap) -> tuple:
    """What timm keeps of the hub, in a file that is no .safetensors."""
    import timm

    repo = timm.get_pretrained_cfg("resnet18").hf_hub_id
    folder = Path("hub") / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("a" * 40)
    trap(folder / "snapshots" / ("a" * 40) / "pytorch_model.bin")
    return ("buffer", *TINY, "--image_encoder", "resnet18", *CPU, *ONE)


def clip_towers(trap: Trap) -> tuple:
    trap(Path("weights.bin"))
    return ("buffer", *TINY, "--image_encoder", "clip", "--image_weights", "weights.bin", *CPU, *ONE)


def clip_folder(trap: Trap) -> tuple:
    from networks.tiny import tiny_clip

    folder = Path(str(tiny_clip("cache")))
    (folder / "model.safetensors").unlink()
    trap(folder / "pytorch_model.bin")
    pictures()
    return ("buffer", "--method", "dimefm", *CPU, "--teacher", folder, "--images", "set/train")


def open_clip_file(trap: Trap) -> tuple:
    trap(Path("open.pt"))
    pictures()
    return ("buffer", "--method", "dimefm", *CPU, "--teacher", "open_clip:ViT-B-32:open.pt", "--images", "set/train")


def features(trap: Trap) -> tuple:
    trap(Path("feats.npy"))
    flags = ("--images", "toy", "--texts", "toy", "--image_feats", "feats.npy", "--text_feats", "feats.npy")
    return ("distill", "--method", "dimefm", *CPU, "--student", "vit_tiny", "--save_dir", "o", *flags)


def student(trap: Trap) -> tuple:
    trap(Path("student.pt"))
    pictures()
    place = ("--dataset", "folder", "--data_path", "set", "--ckpt", "student.pt", "--teacher", "tiny")
    return ("eval", "--method", "dimefm", *CPU, *place, "--save_dir", "e")


VLCP = ("--method", "vlcp", "--dataset", "folder", "--data_path", "set", *CPU)


def diffusion(part: str, name: str) -> Callable[[Trap], tuple]:
    def make(trap: Trap) -> tuple:
        from networks.tiny import tiny_diffusion

        folder = Path(str(tiny_diffusion("cache")))
        (folder / part / f"{name}.safetensors").unlink()
        trap(folder / part / f"{'pytorch_model' if name == 'model' else name}.bin")
        pictures()
        flags = ("--ipc", "2", "--save_dir", "o", "--draw", "false", "--diffusion_checkpoints_path", folder)
        return ("distill", *VLCP, *flags)

    return make


def captioner(trap: Trap) -> tuple:
    from networks.tiny import tiny_llava

    folder = Path(str(tiny_llava("cache")))
    (folder / "model.safetensors").unlink()
    trap(folder / "pytorch_model.bin")
    pictures()
    Path("set/train/metadata.jsonl").unlink()
    return ("buffer", *VLCP, "--model", "tiny", "--caption_model", folder, "--buffer_path", "b")


def photo_teacher(trap: Trap) -> tuple:
    trap(Path("teacher.pth"))
    pictures()
    shutil.copytree("set/train", "distilled", ignore=shutil.ignore_patterns("*.jsonl"))
    flags = ("--distilled", "distilled", "--teacher", "teacher.pth", "--arch_name", "conv3", "--stud_name", "conv3")
    return ("eval", *VLCP, "--protocol", "rded", *flags, "--ipc", "2", "--size", "16", "--save_dir", "e")


MTT = ("--method", "mtt", *CLASSES)


def npz(trap: Trap) -> tuple:
    trap(Path("data.npz"))
    return ("buffer", *MTT, *EXPERTS, "--buffer_path", "b")


def objects(trap: Trap) -> tuple:
    """Arrays of objects, which are pickles inside of a whole .npz file."""
    trap(Path("x.pt"))
    traps = np.array([Malice(Path("owned").absolute())], dtype=object)
    np.savez("data.npz", train_images=traps, train_labels=traps, test_images=traps, test_labels=traps)
    return ("buffer", *MTT, *EXPERTS, "--buffer_path", "b")


def replay_buffer(trap: Trap) -> tuple:
    write_data(Path("data.npz"))
    trap(Path("published/replay_buffer_0.pt"))
    return ("distill", *MTT, *LEARN, *FEW, "--ipc", "1", "--buffer_path", "published", "--save_dir", "o")


def pair_buffers(trap: Trap) -> tuple:
    for group in ("img", "txt"):
        trap(Path(f"published/{group}_replay_buffer_0.pt"))
    learn = ("--num_pairs", "2", "--syn_steps", "1", "--expert_epochs", "1", "--max_start_epoch", "1")
    return ("distill", *TINY, *CPU, *learn, *FEW, "--buffer_path", "published", "--save_dir", "o")


def experts_in_progress(trap: Trap) -> tuple:
    write_data(Path("data.npz"))
    shutil.copytree(GOLDEN / "begun", "begun")
    trap(Path("begun/npz/ConvNetD1W4/expert_000/progress.pt"))
    return ("buffer", *BEGUN, "--resume")


def distilled_images(trap: Trap, name: str = "distilled_best.pt") -> tuple:
    write_data(Path("data.npz"))
    trap(Path("theirs") / name)
    return ("eval", *MTT, "--distilled", Path("theirs") / name, "--save_dir", "e")


def distilled_labels(trap: Trap) -> tuple:
    import torch

    write_data(Path("data.npz"))
    Path("theirs").mkdir()
    torch.save(torch.zeros(3, 3, 8, 8), "theirs/images_best.pt")
    trap(Path("theirs/labels_best.pt"))
    return ("eval", *MTT, "--distilled", "theirs/images_best.pt", "--save_dir", "e")


def distilled_pairs(trap: Trap) -> tuple:
    trap(Path("theirs/distilled.pt"))
    return ("eval", *TINY, *CPU, "--distilled", "theirs/distilled.pt", "--save_dir", "e")


def poster(trap: Trap) -> tuple:
    write_data(Path("data.npz"))
    trap(Path("theirs/best_poster.pt"))
    flags = ("--model", "ConvNetD1W4", *DATA, "--distilled", "theirs/best_poster.pt")
    return ("eval", "--method", "podd", *flags, "--save_dir", "e")


PLACES = {
    "a folder of transformers": text_folder,
    "a folder of text weights": text_weights_folder,
    "embeddings of captions": text_cache,
    "a checkpoint of timm": timm_file,
    "timm's cache of the hub": timm_cached,
    "weights of CLIP's image side": clip_towers,
    "a folder of CLIP": clip_folder,
    "a file of open_clip": open_clip_file,
    "features": features,
    "a student": student,
    "an autoencoder": diffusion("vae", "diffusion_pytorch_model"),
    "a denoiser": diffusion("unet", "diffusion_pytorch_model"),
    "the text encoder of a diffusion model": diffusion("text_encoder", "model"),
    "a captioner": captioner,
    "a teacher of photographs": photo_teacher,
    "a data set": npz,
    "arrays of objects": objects,
    "published trajectories": replay_buffer,
    "published trajectories of pairs": pair_buffers,
    "experts in progress": experts_in_progress,
    "distilled images": distilled_images,
    "published images": functools.partial(distilled_images, name="images_best.pt"),
    "published labels": distilled_labels,
    "distilled pairs": distilled_pairs,
    "a published poster": poster,
}


@pytest.mark.parametrize(
    "form", ["zip", *(pytest.param(form, marks=pytest.mark.slow) for form in ("legacy", "pickle"))]
)
@pytest.mark.parametrize("place", PLACES)
def test_a_malicious_pickle(refused, monkeypatch, place, form):
    import timm.models._builder as builder

    # As timm 1.0.22 has it, the oldest that we take; later ones are careful themselves.
    monkeypatch.setattr(builder, "load_state_dict", functools.partial(builder.load_state_dict, weights_only=False))
    target = Path("owned").absolute()
    laid = []

    def trap(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        FORMS[form](Malice(target), path)
        laid.append(path)

    verb, *flags = PLACES[place](trap)
    line = refused(verb, *flags)
    assert laid and not target.exists(), line
    # The command got as far as the file.
    places = [str(part) for path in laid for part in (path, path.parent, path.parent.parent)]
    assert any(place in line for place in places if place != ".") or "data.npz" in line, line
    assert not any(word in line for word in ("trust", "unsafe", "False` will", "allow_pickle=`")), line
