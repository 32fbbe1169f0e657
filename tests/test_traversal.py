"""Files of somebody else that name files: through the scripts, a name that leads elsewhere is one line of refusal, and
nothing is read or written there. Links on the disk are of whoever unpacked the files there, and are followed."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import contents, rewrite, works
from tests.golden.make import write_data
from utils.files import load_tensors, save_tensors

GOLDEN = Path(__file__).parent / "golden" / "1"
AWAY = ("../secret.png", "/etc/secret.png", "a/../../secret.png")
CPU = ("--device", "cpu", "--workers", "1")
PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
pytestmark = pytest.mark.usefixtures("own_folder")


def paint(path: Path, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (40, 90, 10)).save(path)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("name", AWAY)
def test_images_of_annotations(refused, name, split):
    paint(Path("images/0.png"))
    for own in ("train", "val", "test"):
        row = {"image": name if own == split else "0.png", "caption": "a dog", "image_id": 1}
        row |= {} if own == "train" else {"caption": ["a dog"]}
        Path(f"x_{own}.json").write_text(json.dumps([row]))
    data = ("--dataset", "folder", "--image_root", "images", "--ann_root", ".", "--image_size", "8")
    towers = ("--image_encoder", "ConvNetD1W4", "--joint_width", "4", "--text_encoder", "tfidf", "--text_dim", "1")
    verb = "eval" if split == "test" else "buffer"
    places = ("--distilled", GOLDEN / "pairs_distilled.pt") if split == "test" else ("--buffer_path", "b")
    line = refused(verb, *data, *towers, *CPU, *places, *(("--num_experts", 1) if verb == "buffer" else ()))
    assert f"x_{split}.json has the image '{name}', which is not below the image folder" in line


CLASSED = ("--method", "vlcp", "--dataset", "folder", *CPU, "--ipc", "2", "--save_dir", "o", "--draw", "false")


def model() -> tuple[str, str]:
    """What looks like a diffusion model for as long as nobody loads it."""
    for part in PARTS:
        Path("model", part).mkdir(parents=True)
    return "--diffusion_checkpoints_path", "model"


@pytest.mark.parametrize("name", ["../secret.png", "cat/../../secret.png", "x/train/cat/../../../secret.png"])
def test_captions_of_images(refused, name):
    for part in ("train", "val"):
        paint(Path("set", part, "cat", "1.png"))
    paint(Path("secret.png"))
    rows = [{"file_name": "cat/1.png", "text": "a cat"}, {"file_name": name, "text": "a secret"}]
    Path("set/train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refused("distill", *CLASSED, *model(), "--data_path", "set")
    assert f"1 captions of no image, or of several at once: {name} (line 2)" in line


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "..", "a/b", ""])
def test_classes_of_published_prototypes(refused, name):
    latent = [[[0.5, 1.0], [2.0, 3.0]]] * 4
    Path("pub").mkdir()
    Path("pub/i.json").write_text(json.dumps({name: [latent, latent]}))
    Path("pub/t.json").write_text(json.dumps({name: ["a", "b"]}))
    flags = ("--prototype_path", "pub/i.json", "--text_prototype", "pub/t.json")
    assert f"t.json has a class {name!r}, which can be no name of files" in refused(
        "distill", *CLASSED, *model(), *flags
    )
    assert not Path("o").exists()


@pytest.mark.parametrize("field", ["classes", "ident", "files", "nearest", "text_files"])
@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png"])
def test_prototypes_of_somebody_else(refused, field, name):
    """Their names are those of files that are written, and of training images that the sheets show."""
    from methods.prototype_files import Manifest, Prototypes, save_prototypes

    files = ["cat/1.png", "cat/2.png"]
    known = {"files": files, "nearest": list(files), "text_files": list(files)}
    if field in known:
        known[field][1] = name
    ident = name if field == "classes" else "cat"
    words = [[("red", 1)], []]
    save_prototypes(
        Path("theirs/prototypes"),
        Prototypes("cat", "cat", torch.zeros(2, 4, 2, 2), ["a", "b"], words=words, clusters=[0, 1], **known),
    )
    if field == "ident":
        rewrite(Path("theirs/prototypes/cat.json"), lambda known: known | {"ident": name})
    Manifest("theirs").record("prototypes", path="theirs/prototypes", classes=[ident], ipc=2, train_root="")
    before = contents(Path("theirs"))
    line = refused("distill", *CLASSED, *model(), "--prototype_path", "theirs/prototypes")
    if field == "classes":
        assert f"has a class {name!r}, which can be no name of files" in line
    else:
        assert "cat.json is no file of prototypes" in line and "below the training folder" in line
    assert contents(Path("theirs")) == before and not Path("o").exists()


POOLS = ("--method", "dimefm", *CPU, "--student", "vit_tiny", "--save_dir", "o")


@pytest.mark.parametrize("name", ["../image.tsv", "a/../../image.tsv"])
@pytest.mark.parametrize("role", ["list", "manifest", "list in a manifest"])
def test_lists_and_manifests_of_pools(refused, role, name):
    Path("files.list").write_text(f"image_feat.tsv\n{name}\n")
    inside = "files.list" if role == "list in a manifest" else name
    Path("pools.yaml").write_text(f"images: [toy, '{inside}']\n")
    flags = ("--tsv_file_list", "files.list") if role == "list" else ("--pool_manifest", "pools.yaml")
    line = refused("distill", *POOLS, *flags)
    assert f"has the name '{name}', which leads out of its folder; give the whole path" in line


def test_whole_paths_in_lists_of_pools(refused):
    """They are what buffer.py writes and what the field's lists have: the files are looked for there."""
    Path("files.list").write_text(f"{Path.cwd()}/x/../image.tsv\n")
    for flag, folder in (("--images", "elsewhere"), ("--texts", "")):
        line = refused("buffer", *POOLS[:6], "--teacher", "tiny", flag, "files.list", "--dataroot", folder)
        assert f"at {Path.cwd()}/x/../image.tsv; correct the path" in line


KINDS = {"symbolic": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}


@pytest.mark.parametrize("role, ending", [("images", "png"), ("texts", "txt")])
@pytest.mark.parametrize("kind", [*KINDS, "up", "absolute"])
def test_archives(refused, kind, role, ending):
    with tarfile.open("pool.tar", "w") as archive:
        content = png() if ending == "png" else b"a dog"
        for name in (f"0.{ending}", {"up": f"a/../../1.{ending}", "absolute": f"/tmp/1.{ending}"}.get(kind, "")):
            if name:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        if kind in KINDS:
            member = tarfile.TarInfo(f"1.{ending}")
            member.type, member.linkname = KINDS[kind], "/etc/passwd"
            archive.addfile(member)
    line = refused("buffer", "--method", "dimefm", *CPU, "--teacher", "tiny", f"--{role}", "pool.tar")
    wanted = {"up": "leads elsewhere", "absolute": "leads elsewhere", "symbolic": "is a link to '/etc/passwd'"}
    wanted |= {"hard": "is a link to '/etc/passwd'"}
    assert f"archive pool.tar: its member '{member.name}'" in line and wanted.get(kind, "is no plain file") in line
    assert not Path("runs").exists()


def test_a_distilled_file_does_not_say_where_to_write():
    """A distilled file notes the options it was made with; those of its maker's machine are not taken."""
    for part in ("train", "test"):
        for name in "012":
            for number in range(3):
                paint(Path("set", part, name, f"{number}.png"))
    state = load_tensors(GOLDEN / "images_distilled.pt", "images")
    theirs = {"dataset": "folder", "data_path": "set", "res": 8, "holdout": 0.0}
    state["meta"]["config"] |= theirs | {"cache_dir": "../evil", "workers": 10**9, "download": True}
    save_tensors("images.pt", state)
    judged = ("--num_eval", "1", "--epoch_eval_train", "1", "--source", "random", "--save_dir", "e", "--device", "cpu")
    works("eval", "--method", "mtt", "--distilled", "images.pt", *judged)
    assert list(Path("cache/images").iterdir()) and not Path("../evil").exists()


@pytest.mark.parametrize("part", ["text", "unet", "text_encoder"])
@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors"])
def test_shards_of_a_model(refused, part, name):
    index = json.dumps({"metadata": {}, "weight_map": {"a": name}})
    if part == "text":
        from transformers import BertConfig

        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9).save_pretrained("theirs")
        Path("theirs/model.safetensors.index.json").write_text(index)
        flags = ("--dataset", "toy", "--toy_images", "20", "--image_size", "8", "--image_encoder", "ConvNetD1W4")
        line = refused("buffer", *flags, "--joint_width", "4", "--text_encoder", "theirs", *CPU, "--num_experts", "1")
        folder = "theirs"
    else:
        from networks.tiny import tiny_diffusion

        folder = str(tiny_diffusion("cache"))
        name_of = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}[part]
        Path(folder, part, f"{name_of}.safetensors").unlink()
        Path(folder, part, f"{name_of}.safetensors.index.json").write_text(index)
        for split in ("train", "val"):
            paint(Path("set", split, "cat", "1.png"))
        paint(Path("set/train/cat/2.png"))
        rows = [{"file_name": f"cat/{number}.png", "text": "a cat"} for number in (1, 2)]
        Path("set/train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = refused("distill", *CLASSED, "--diffusion_checkpoints_path", folder, "--data_path", "set")
    assert f"names the file '{name}', which is not beside it" in line and folder in line


def test_code_that_comes_with_a_model(refused, monkeypatch):
    """Nobody is asked whether to run it, and it is not run."""
    Path("mine").mkdir()
    Path("mine/config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code_of_mine.Mine", "AutoModel": "x.Y"}})
    )
    Path("mine/code_of_mine.py").write_text(
        f"import os\nos.mkdir({str(Path('owned').absolute())!r})\n"
        "from transformers import PretrainedConfig\nclass Mine(PretrainedConfig):\n    model_type = 'mine'\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    flags = ("--dataset", "toy", "--toy_images", "20", "--image_size", "8", "--image_encoder", "ConvNetD1W4")
    line = refused("buffer", *flags, "--joint_width", "4", "--text_encoder", "mine", *CPU, "--num_experts", "1")
    assert "text encoder folder mine cannot be loaded" in line
    assert not Path("owned").exists()


def test_links_in_a_circle(refused):
    for part in ("train", "test"):
        paint(Path("set", part, "a", "0.png"))
    for name in "xy":
        Path("set/train/a", name).symlink_to(".")
    line = refused("buffer", "--method", "mtt", "--dataset", "folder", "--data_path", "set", *CPU)
    assert "is a link to a folder that it is in; remove it" in line
    line = refused("buffer", "--method", "dimefm", *CPU, "--teacher", "tiny", "--images", "set/train/a")
    assert "is a link to a folder that it is in; remove it" in line


def test_links_out_of_a_folder_are_of_its_user():
    """Data sets are kept on other disks and linked; what is no image is refused as such."""
    for part in ("train", "test"):
        for name in "abc":
            paint(Path("disk", part, name, "0.png"))
    Path("set").symlink_to("disk")
    write_data(Path("data.npz"))
    from data.photographs import class_files, class_folders

    assert len(class_files(class_folders(Path("set/train")))) == 3
