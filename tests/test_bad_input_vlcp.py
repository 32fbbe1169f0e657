"""What users get wrong with category prototypes, and what the released code got wrong: one clear line or the right
behaviour, and nothing written or lost."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from methods import prototype_captions, prototype_gallery, vlcp
from methods.command import command
from methods.prototype_files import load_prototypes
from networks.diffusion import LatentModel
from tests.conftest import contents, works
from tests.processes import held
from utils.files import read_json

pytestmark = pytest.mark.usefixtures("here")

CLASSES = ("ant", "bee", "cat")
LOOKS = ("red", "green", "blue", "big", "small", "old", "young", "wet", "dry", "fast", "slow", "odd")
DATA = ("--method", "vlcp", "--dataset", "folder", "--data_path", "real", "--device", "cpu", "--workers", "1")
TUNE = (
    *(*DATA, "--buffer_path", "b", "--model", "tiny", "--caption_model", "tiny", "--max_new_tokens", "2"),
    *("--resolution", "16", "--max_train_steps", "1", "--train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    *("--validation_epochs", "0"),
)
SMALL = ("--ipc", "2", "--size", "16", "--output_size", "16", "--num_inference_steps", "2", "--synthesis_batch", "2")
DRAW = (*DATA, "--diffusion_checkpoints_path", "tiny", *SMALL, "--save_dir", "o", "--draw", "false")
JUDGE = (
    *(*DATA, "--net_type", "convnet", "--depth", "1", "--width", "0.0625", "--size", "16", "--epochs", "1"),
    *("--repeat", "1", "--distilled", "made", "--save_dir", "e"),
)
FLAGS = {"buffer": TUNE, "distill": DRAW, "eval": JUDGE}
PUBLISHED = "pub/folder-ipc2-0.7-30-kmexpand1.json"
CAPTIONS = Path("real/train/metadata.jsonl")


def paint(folder: Path, count: int, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{folder.name}_{number:02}.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """`real`: three classes of twelve captioned images; `made`: a distillation of two a class, published in `pub`.

    It is made without any connection to the world (item 7).
    """
    root, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    for name in CLASSES:
        paint(root / "real/train" / name, 12, rng)
        paint(root / "real/val" / name, 2, rng)
    rows = (
        {"file_name": f"{name}/{name}_{number:02}.png", "text": f"A {look} {name} on the grass."}
        for name in CLASSES
        for number, look in enumerate(LOOKS)
    )
    (root / CAPTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def unreachable(*args: object) -> None:
        raise AssertionError("something asks the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(socket.socket, "connect", unreachable)
        works("distill", *DRAW, "--save_dir", "made", "--draw", "true", "--save_prototype_path", "pub")
    return root


@pytest.fixture
def here(world, own_folder, monkeypatch) -> Iterator[None]:
    """The test works on copies. There is no page, whose charts take most of the time."""
    for name in ("real", "made", "pub"):
        shutil.copytree(world / name, name)
    Path("cache").symlink_to(world / "cache")
    monkeypatch.setattr(prototype_gallery, "refresh_page", lambda folder: None)
    yield


@pytest.fixture
def no_model(monkeypatch) -> None:
    """Loading a network fails the test: what is wrong must have been told before."""

    def load(*args: object, **options: object) -> None:
        raise AssertionError("a model is loaded")

    for place, name in ((vlcp, "load_model"), (vlcp, "tune"), (prototype_captions, "load_captioner")):
        monkeypatch.setattr(place, name, load)


def nothing_begun() -> bool:
    """No file but the command's own config, and no results."""
    files = [path.name for folder in "obe" for path in Path(folder).rglob("*") if path.is_file()]
    return {*files} <= {"config.yaml", "inputs.json"} and not Path("runs").exists()


def rows() -> dict[str, dict]:
    """The rows of the one result."""
    (path,) = Path().glob("e*/result.json")
    return {row["name"]: row for row in read_json(path, "result")["rows"]}


# --- the command line


@pytest.mark.parametrize(
    "verb, flags, parts",
    [
        # item 1: --spec is an option, and names that it does not know have a nearest one
        ("distill", "--dataset imagenet --spec nete", ["unknown --spec 'nete'", "'nette'"]),
        ("distill", "--dataset imagenet --spec cifa10", ["unknown --spec 'cifa10'"]),
        ("distill", "--spec nette", ["--spec nette lists classes of ImageNet, not of folder"]),
        ("distill", "--dataset imagnet", ["unknown dataset 'imagnet'", "'imagenet'"]),
        ("buffer", "--nclass 4", ["--nclass is 4", "3 classes"]),
        ("distill", "--data_path nowhere", ["no folder nowhere/train", "--data_path"]),
        # item 6: no GPU
        ("buffer", "--device cuda", ["--device cuda is not on this machine", "cpu"]),
        ("distill", "--device cuda", ["--device cuda is not on this machine", "cpu"]),
        ("eval", "--device cuda:1", ["--device cuda:1 is not on this machine", "cpu"]),
        ("buffer", "--dtype float16 --recaption", ["--dtype float16 needs a GPU", "float32"]),
        ("distill", "--dtype float16", ["--dtype float16 needs a GPU", "float32"]),
        ("buffer", "--mixed_precision fp16", ["--mixed_precision fp16 needs a GPU", "no"]),
        # items 9 and 11: too few images, before or after outliers are out
        ("distill", "--ipc 13", ["class ant has 12 training images, fewer than --ipc 13", "--few_images share"]),
        ("distill", "--ipc 11", ["class ant has 10 of its 12", "outliers", "--ipc 11", "--contamination"]),
        ("distill", "--contamination 0.6", ["--contamination is 0.6", "0.5"]),
        # item 12: prompts
        ("distill", "--prompt_template photo", ["--prompt_template 'photo' lacks {caption}"]),
        ("distill", "--prompt_template {captoin}", ["--prompt_template '{captoin}'", "{caption} and {label}"]),
        ("distill", "--prompt_template {caption", ["--prompt_template '{caption'", "{caption} and {label}"]),
        ("buffer", "--caption_prompt {name}", ["--caption_prompt holds {name}", "{label}"]),
        # item 14: a model without a safety checker
        ("distill", "--safety_checker", ["has no safety checker", "leave the checker off"]),
        # item 16: the size of images
        ("distill", "--output_size 1", ["--output_size is 1", "8 pixels"]),
        ("distill", "--size 20", ["--size 20", "24"]),
        ("buffer", "--resolution 20", ["--resolution is 20", "multiple of 8"]),
        # item 17: strength
        ("distill", "--strength 0.4", ["--strength 0.4 of 2 steps leaves none", "--strength 0.5"]),
        ("distill", "--strength 0.01 --num_inference_steps 50", ["of 50 steps leaves none", "--strength 0.02"]),
        ("distill", "--strength 0.019 --num_inference_steps 50", ["of 50 steps leaves none", "--strength 0.02"]),
        ("distill", "--strength 0", ["--strength is 0.0", "greater than 0"]),
        ("distill", "--strength 1.2", ["--strength is 1.2", "such as 0.7"]),
        # item 19: what RDED's code cannot do is refused where its code is asked for
        ("eval", "--protocol rded --compat_rded", ["no batch for 2 images a class", "--batch_size"]),
        ("eval", "--protocol rded --stud-name resnet1", ["unknown network 'resnet1'", "'resnet18'"]),
        ("eval", "--protocol rded --teacher none.pth", ["no teacher at none.pth"]),
        (
            "eval",
            "--protocol rded --teacher real/train/metadata.jsonl",
            ["teacher real/train/metadata.jsonl", "cannot"],
        ),
        ("eval", "--protocol rded --teacher torchvision", ["--teacher torchvision", "classes of ImageNet only"]),
        # what else is mistyped
        ("distill", "--scheduler euler", ["'euler'", "choose from pndm, ddim, dpm"]),
        ("distill", "--stages synthesise", ["'synthesise'", "'synthesize'"]),
        ("distill", "--few_images maybe", ["--few_images", "share"]),
        ("distill", "--steps 50", ["unknown flag --steps"]),
        ("distill", "--km_expnd 1", ["unknown flag --km_expnd", "--km_expand"]),
        ("distill", "--label_file_path none", ["no label file none", "--label_file_path"]),
        ("distill", "--metajson_file none", ["no captions at none", "--metajson_file"]),
        ("buffer", "--num_beams 2 --temperature 0.2", ["--num_beams 2 searches", "--temperature 0.2 draws"]),
        ("buffer", "--num_chunks 2 --chunk_idx 2", ["--chunk_idx is 2", "the first is 0"]),
        ("buffer", "--top_p 1.5", ["--top_p is 1.5", "such as 0.9"]),
        ("buffer", "--recaption --answers_file real", ["--answers_file real is a folder", "real/answers.jsonl"]),
        ("buffer", "--recaption --question_file none", ["no question file at none"]),
        ("buffer", "--stages finetune --recaption", ["no captions at b/metadata.jsonl", "buffer.py"]),
        ("buffer", "--lr_scheduler constnt", ["'constnt'", "'constant'"]),
        ("eval", "--ipc 3", ["made/images/ant has 2 images of class ant, fewer than --ipc 3", "lower --ipc"]),
        ("eval", "--data random --ipc 13", ["class ant has 12 real training images, fewer than --ipc 13"]),
        ("eval", "--depth 9", ["halves the image 9 times", "at most 4"]),
        ("eval", "--best_on val --holdout 0.99", ["--holdout 0.99 takes all 12 training images of ant", "lower it"]),
        ("eval", "--distilled nowhere", ["no folder of distilled images at nowhere", "--distilled"]),
        ("eval", "--distilled real", ["real lacks 3 of the 3 classes, such as ant", "found by name"]),
        ("eval", "--distilled real/train/ant", ["real/train/ant holds no class folders"]),
    ],
)
def test_words(refused, verb, flags, parts):
    line = refused(verb, *FLAGS[verb], *flags.split())
    assert all(part in line for part in parts), line
    assert nothing_begun()


@pytest.mark.parametrize(
    "verb, flags, parts",
    [
        ("buffer", "--model nobody/sd", ["the weights of nobody/sd", "out of reach", "tiny"]),
        ("buffer", "--model nowhere/a/b", ["no model folder at nowhere/a/b", "--model"]),
        (
            "buffer",
            "--recaption --caption_model nobody/llava",
            ["nobody/llava", "out of reach", "--caption_model tiny"],
        ),
        ("buffer", "--recaption --caption_model real", ["captioner folder real cannot be loaded"]),
        ("distill", "--diffusion_checkpoints_path nobody/sd", ["nobody/sd", "out of reach", "tiny"]),
        ("distill", "--diffusion_checkpoints_path real", ["--diffusion_checkpoints_path real lacks vae, unet"]),
    ],
)
def test_models_that_are_not_to_be_had(refused, verb, flags, parts):
    """Told at once; and the corrected command needs neither --resume nor another folder."""
    line = refused(verb, *FLAGS[verb], *flags.split())
    assert all(part in line for part in parts), line
    assert nothing_begun()
    stages = ("--stages", "caption", "--recaption", "--train_limit", "1") if verb == "buffer" else ("--strength", "1")
    works(verb, *FLAGS[verb], *stages)


@pytest.mark.parametrize("part", ["unet", "unet/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_model_that_lacks_a_part(refused, part):
    shutil.copytree(next(Path("cache").glob("tiny_diffusion_*")), "model")
    path = Path("model") / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    line = refused("distill", *DRAW, "--diffusion_checkpoints_path", "model")
    assert "model" in line and ("lacks unet" in line or "cannot be loaded" in line) and nothing_begun()


def test_no_model_at_all(refused):
    words = [word for word in DRAW if word not in ("--diffusion_checkpoints_path", "tiny")]
    line = refused("distill", *words)
    assert line.startswith("no diffusion model in o/buffers; run buffer.py first, or give --diffusion_checkpoints_path")
    assert nothing_begun()


# --- classes (items 4 and 10)


def test_stray_files_are_no_classes():
    for name in ("real/train/notes.txt", "real/train/ant/notes.txt"):
        Path(name).write_text("x")
    Path("real/train/.cache").mkdir()
    works("distill", *DRAW, "--stages", "prototypes")
    assert sorted(path.stem for path in Path("o/prototypes").glob("*.json")) == list(CLASSES)


@pytest.mark.parametrize(
    "damage, verb, parts",
    [
        ("empty", "distill", ["class folder real/train/aardvark holds no images", "remove it"]),
        ("train", "eval", ["folders of other classes, such as cat", "--nclass"]),
        ("val", "eval", ["1 of the 3 classes have no folder in real/val, such as cat", "--data_path"]),
        ("all val", "eval", ["no folder real/val"]),
        (
            "wordnet",
            "distill",
            ["3 of 3 folders of real/train have no WordNet name", "such as ant", "--dataset folder"],
        ),
    ],
)
def test_class_folders(refused, no_model, damage, verb, parts):
    flags = FLAGS[verb]
    if damage == "empty":
        Path("real/train/aardvark").mkdir()
    elif damage == "wordnet":
        flags = (*flags, "--dataset", "imagenet")
    else:
        shutil.rmtree({"train": "real/train/cat", "val": "real/val/cat", "all val": "real/val"}[damage])
    line = refused(verb, *flags)
    assert all(part in line for part in parts), line
    assert nothing_begun()


@pytest.mark.parametrize(
    "text, parts",
    [
        ("ant\nbee\ncat\ndog\n", ["line 4 of labels.txt: 'dog' is no folder of real/train", "correct the line"]),
        ("ant\nbee\nant\n", ["line 3 of labels.txt repeats 'ant' of line 1"]),
        ("0\n1\n2\n", ["line 1 of labels.txt: '0' is no folder"]),
        ("", ["label file labels.txt is empty"]),
    ],
)
def test_label_files(refused, no_model, text, parts):
    Path("labels.txt").write_text(text)
    line = refused("distill", *DRAW, "--label_file_path", "labels.txt")
    assert all(part in line for part in parts), line
    assert nothing_begun()


def test_classes_go_by_name_and_not_by_place():
    """Item 10: neither a folder more nor the order of a label file gives a class another one's captions; and (13) its
    images do not depend on what else is made."""
    shutil.copytree("real/train/ant", "real/train/aardvark")
    Path("labels.txt").write_bytes(b"cat\tthe cat\r\nbee\r\n")
    works("distill", *DRAW, "--label_file_path", "labels.txt")
    for name, label in (("bee", "bee"), ("cat", "the cat")):
        found, before = (load_prototypes(Path(run) / "prototypes", name) for run in ("o", "made"))
        assert torch.equal(found.latents, before.latents) and found.texts == before.texts and found.label == label
        assert contents(Path("o/images") / name) == contents(Path("made/images") / name)
    assert sorted(path.name for path in Path("o/images").iterdir()) == ["bee", "cat"]


# --- captions (item 8)


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda lines: lines[1:], ["1 images without a caption: ant/ant_00.png", "--allow_missing"]),
        (
            lambda lines: lines[:-12],
            ["12 images without a caption: cat/cat_00.png, cat/cat_01.png, cat/cat_02.png, ..."],
        ),
        (lambda lines: [*lines, lines[0]], ["1 second captions of an image: ant/ant_00.png (line 37)"]),
        (
            lambda lines: [*lines, lines[0].replace("_00", "_99")],
            ["1 captions of no image", "ant/ant_99.png (line 37)"],
        ),
        (
            lambda lines: [lines[0].replace("A red ant on the grass.", " "), *lines[1:]],
            ["1 empty captions: ant/ant_00.png"],
        ),
        (lambda lines: [*lines[:3], '{"file_name": "an'], ["line 4 of real/train/metadata.jsonl is not valid JSON"]),
        (
            lambda lines: [lines[0].replace("text", "txt")],
            ["line 1 of real/train/metadata.jsonl", '"file_name" and "text"'],
        ),
        (
            lambda lines: [line.replace("/", "-of-other-images/") for line in lines],
            ["36 images without a caption", "36 lines"],
        ),
        (lambda lines: [], ["36 images without a caption"]),
    ],
)
@pytest.mark.parametrize("verb", ["buffer", "distill"])
def test_wrong_captions_are_told_before_any_model(refused, no_model, verb, change, parts):
    lines = CAPTIONS.read_text().splitlines()
    CAPTIONS.write_text("\n".join(change(lines)) + "\n")
    line = refused(verb, *FLAGS[verb])
    assert "real/train/metadata.jsonl" in line and all(part in line for part in parts), line
    assert nothing_begun()


def test_no_captions_at_all(refused, no_model):
    CAPTIONS.unlink()
    line = refused("distill", *DRAW)
    assert line.startswith("no captions of the training images: run buffer.py, or give --metajson_file")
    assert nothing_begun()


def test_missing_captions_may_be_allowed():
    """Their images belong to clusters all the same; and (12) a class of no captions has its name for a prompt."""
    kept = [line for line in CAPTIONS.read_text().splitlines() if "cat" not in line]
    CAPTIONS.write_text("\n".join(kept[1:]) + "\n")
    works("distill", *DRAW, "--allow_missing")
    assert load_prototypes(Path("o/prototypes"), "cat").texts == ["cat", "cat"]
    found, before = (load_prototypes(Path(run) / "prototypes", "ant") for run in ("o", "made"))
    assert torch.equal(found.latents, before.latents) and found.clusters[0] >= 0


def test_prompts_are_never_empty_and_may_be_short():
    """Item 12: captions without a word that counts, shorter than the negative prompt."""
    rows = [json.loads(line) for line in CAPTIONS.read_text().splitlines()]
    CAPTIONS.write_text("".join(json.dumps(row | {"text": "It is."}) + "\n" for row in rows))
    works("distill", *DRAW)
    assert load_prototypes(Path("o/prototypes"), "bee").texts == ["It is."] * 2
    assert len(list(Path("o/images").rglob("*.png"))) == 6


# --- images


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_damaged_image(refused, content):
    """It is named; and once it is mended the run goes on with what it has."""
    path = Path("real/train/cat/cat_05.png")
    whole = path.read_bytes()
    path.write_bytes(whole[:60] if content is None else content)
    line = refused("distill", *DRAW)
    assert "real/train/cat/cat_05.png cannot be decoded" in line and "drop it" in line
    made = contents(Path("o/latents"))
    assert len(made) == 2
    path.write_bytes(whole)
    works("distill", *DRAW, "--resume")
    assert made.items() <= contents(Path("o/latents")).items()
    assert contents(Path("o/images")) == contents(Path("made/images"))


def test_few_images_are_told_or_shared(capsys):
    """Items 9 and 11."""
    works("distill", *DRAW, "--train_limit", "3", "--ipc", "4", "--few_images", "share", "--contamination", "0.5")
    assert "3 of 3 classes have no more than 10 training images" in capsys.readouterr().out
    names = sorted(path.name for path in Path("o/images/ant").iterdir())
    # Two are left; the noise of a second round is another.
    assert names == [f"ant-image{number}-{again}.png" for number in (0, 1) for again in (0, 1)]
    assert len({path.read_bytes() for path in Path("o/images/ant").iterdir()}) == 4


def test_images_do_not_depend_on_the_batch():
    """Item 13, up to the rounding of floats."""
    works("distill", *DRAW, "--synthesis_batch", "1")
    for path in Path("made/images").rglob("*.png"):
        ours, theirs = (np.asarray(Image.open(root / path.relative_to("made"))) for root in (Path("o"), Path("made")))
        assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_an_image_that_is_flagged_is_never_kept(refused, monkeypatch):
    """Item 14: black pixels are no training data."""
    real = LatentModel.synthesize
    monkeypatch.setattr(
        LatentModel, "synthesize", lambda self, *args: (real(self, *args)[0] * 0, [True] * len(args[0]))
    )
    line = refused("distill", *DRAW, code=1)
    assert "safety checker flags ant-image" in line and "--seed" in line and not list(Path("o").rglob("*.png"))


def test_the_size_is_an_option(capsys):
    """Item 16: no path decides it. Item 17: how many steps are taken is said; 0.58 of 50 are 28 in floats."""
    shutil.copytree(next(Path("cache").glob("tiny_diffusion_*")), "Image1K_seed0")
    flags = ("--nclass", "1", "--strength", "0.58", "--num_inference_steps", "50", "--output_size", "24")
    works("distill", *DRAW, "--diffusion_checkpoints_path", "Image1K_seed0", *flags)
    assert {Image.open(path).size for path in Path("o/images").rglob("*.png")} == {(24, 24)}
    assert "each image took 28 of 50 denoising steps" in capsys.readouterr().out


def test_each_class_has_means_of_its_own():
    """Items 20 and 21: in float32, and not those of the class that came last."""
    for name in CLASSES:
        found = load_prototypes(Path("made/prototypes"), name)
        latents = load_file(f"made/latents/{name}.safetensors")["latents"]
        assert latents.dtype == found.latents.dtype == torch.float32
        for number, mean in enumerate(found.latents):
            members = latents[[cluster == number for cluster in found.clusters]]
            assert torch.allclose(members.mean(0), mean, atol=1e-5)


# --- files of an earlier command (items 2, 3 and 15)


@pytest.mark.parametrize(
    "path, content, says",
    [
        (
            "prototypes/bee.json",
            None,
            "no prototypes at made/prototypes/bee.json; distill.py --stages prototypes makes",
        ),
        ("prototypes/bee.safetensors", None, "no prototypes at made/prototypes/bee.safetensors; distill.py --stages"),
        ("prototypes/bee.json", b'{"format": 1, "iden', "prototypes made/prototypes/bee.json is not valid JSON"),
        ("prototypes/bee.safetensors", b"damaged", "prototypes made/prototypes/bee.safetensors cannot be read"),
    ],
)
def test_half_a_folder_of_prototypes(refused, path, content, says):
    """It is told where prototypes are wanted as they are, and made anew where they may be made."""
    place, before = Path("made") / path, contents(Path("made"))
    place.unlink() if content is None else place.write_bytes(content)
    damaged = contents(Path("made"))
    words = [word for word in DRAW if word not in ("o", "--save_dir")]
    same = (*words, "--save_dir", "made", "--resume")
    assert says in refused("distill", *same, "--stages", "synthesize")
    assert says in refused("distill", *DRAW, "--prototype_path", "made/prototypes")
    assert contents(Path("made")) == damaged and nothing_begun()
    works("distill", *same)
    assert contents(Path("made") / "prototypes") == {
        name.removeprefix("prototypes/"): data for name, data in before.items() if name.startswith("prototypes/")
    }


@pytest.mark.parametrize("name", ["manifest.json", "inputs.json", "config.yaml"])
def test_damaged_notes_of_a_run(refused, name):
    (Path("made") / name).write_text("{")
    before = contents(Path("made"))
    line = refused("distill", *DRAW, "--save_dir", "made", "--resume")
    assert f"made/{name}" in line and contents(Path("made")) == before


def test_stages_may_be_separate_commands():
    """Item 2: the second finds what the first made, without naming any file; so does eval.py."""
    works("distill", *DRAW, "--stages", "prototypes")
    shutil.rmtree("real/train")  # nor does it need the images again
    works("distill", *DRAW, "--stages", "synthesize", "--resume")
    assert contents(Path("o/images")) == contents(Path("made/images"))


def test_buffer_stages_may_be_separate_commands(capsys):
    CAPTIONS.unlink()
    works("buffer", *TUNE, "--stages", "caption", "--answers_file", "answers.jsonl")  # item 5: a name without a folder
    answers = Path("answers.jsonl").read_bytes()
    assert answers.count(b"\n") == 36 and not Path("b/model").exists()
    works("buffer", *TUNE, "--stages", "caption", "finetune", "--answers_file", "answers.jsonl", "--resume")
    assert Path("answers.jsonl").read_bytes() == answers and (Path("b/model") / "model_index.json").is_file()
    words = [word for word in DRAW if word not in ("--diffusion_checkpoints_path", "tiny")]
    works("distill", *words, "--buffer_path", "b", "--stages", "prototypes")
    assert read_json("o/manifest.json", "")["prototypes"]["classes"] == list(CLASSES)


def test_the_manifest_tells_eval_its_data():
    words = [word for word in JUDGE if word not in ("--dataset", "folder", "--data_path", "real")]
    works("eval", *words, "--data", "distilled")
    assert rows()["distilled"]["size"] == 6


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--ipc 1", "ipc was 2, is 1"),
        ("--strength 0.9", "strength was 0.7, is 0.9"),
        ("--contamination 0", "contamination was 0.1, is 0.0"),
        ("--prompt_template {label}", "prompt_template was '{caption}', is '{label}'"),
        ("--seed 1", "seed was 0, is 1"),
        ("--compat vlcp", "compat was '', is 'vlcp'"),
    ],
)
def test_resumed_with_other_options(refused, flags, says):
    before = contents(Path("made"))
    same = (*DRAW, "--save_dir", "made")
    line = refused("distill", *same, *flags.split(), "--resume")
    assert says in line and "choose another --save_dir" in line
    assert "already holds a run; --resume" in refused("distill", *same)
    assert contents(Path("made")) == before


def test_resumed_with_other_captions(refused):
    CAPTIONS.write_text(CAPTIONS.read_text().replace("grass", "moss"))
    before = contents(Path("made"))
    line = refused("distill", *DRAW, "--save_dir", "made", "--resume")
    assert "made holds a run on another captions" in line and contents(Path("made")) == before


def test_a_folder_that_holds_images_already(refused, no_model):
    """Neither a new run nor one that is resumed takes others' images for its own."""
    place = Path("images/folder_ipc2_2_s0.7_g10.0_kmexpand1_seed0/ant")
    place.mkdir(parents=True)
    shutil.copy("real/train/ant/ant_00.png", place / "ant-image0-0.png")
    before = contents(Path("images"))
    for more in ((), ("--save_dir", "made", "--resume")):
        line = refused("distill", *DRAW, "--save_init_image_path", "images", *more)
        assert "already holds images; choose another --save_init_image_path" in line and nothing_begun()
    assert contents(Path("images")) == before


@pytest.mark.parametrize(
    "damage, flags, parts",
    [
        ("", "--ipc 3", ["has 2 prototypes of class ant, and --ipc 3 is no multiple"]),
        ("", "--nclass 2", ["--nclass is 2, but", "has 3 classes"]),
        ("", "--text_prototype none.json", ["looked for none.json, pub/none.json", "--text_prototype"]),
        ("", "--prototype_path none.json", ["no image prototypes at none.json"]),
        ("", "--prototype_path real", ["no prototypes in real", "--stages prototypes"]),
        ("texts", "", ["text_2_0.7_30.json is not valid JSON"]),
        ("names", "", ["has class 'ant', which the data set lacks"]),
        ("images", "", [f"image prototypes {PUBLISHED} is cut short"]),
    ],
)
def test_published_prototypes(refused, damage, flags, parts):
    texts = Path("pub/folder_text/text_2_0.7_30.json")
    if damage == "images":
        Path(PUBLISHED).write_bytes(Path(PUBLISHED).read_bytes()[:300])
    elif damage:
        texts.write_text(texts.read_text()[:30] if damage == "texts" else texts.read_text().replace('"ant"', '"emu"'))
    words = [word for word in DRAW if word not in ("--data_path", "real")]
    line = refused("distill", *words, "--prototype_path", PUBLISHED, *flags.split())
    assert all(part in line for part in parts), line
    assert not list(Path("o").rglob("*.png")) and (damage in ("names", "images") or nothing_begun())


# --- eval (items 18 and 19)


def test_results_are_never_run_over(capsys):
    """Item 18: neither by other seeds nor by other data; both the last and the best epoch are told, and who chose."""
    words = [word for word in JUDGE if word not in ("--save_dir", "e")]
    for more in ((), ("--seed", "1"), ("--nclass", "2"), ("--data", "random"), ("--best_on", "val")):
        works("eval", *words, *more)
    said = capsys.readouterr().out
    found = [read_json(path, "result") for path in Path("made/eval").glob("*/result.json")]
    assert len(found) == 5
    assert {frozenset(found_["rows"][0]["metrics"]) for found_ in found} == {
        frozenset(("last", "best on test")),
        frozenset(("last", "best on val")),
    }
    assert "best epoch chosen on test" in said and "best epoch chosen on val" in said


def test_any_ipc_has_a_batch():
    """Item 19: RDED's code has none but for 1, 10 and 50 images a class; a relative folder is found, too."""
    flags = ("--protocol", "rded", "--arch_name", "conv1", "--teacher_epochs", "1", "--teacher_check", "false")
    works("eval", *JUDGE[:-4], "--syn-data-path", "made/images", "--save_dir", "e", *flags)
    assert rows()["distilled"]["size"] == 6 and rows()["distilled"]["protocol"]["batch"] == 6


def test_numbered_folders_are_taken_in_order(refused, capsys):
    for number, name in enumerate(CLASSES):
        shutil.copytree(Path("made/images") / name, f"numbered/{number:05}")
    works("eval", *JUDGE, "--distilled", "numbered", "--data", "distilled")
    assert "numbered numbers its classes; 00000 is taken to be ant, 00002 cat" in capsys.readouterr().out
    Path("numbered/00002").rename("numbered/00003")
    assert "numbered lacks 3 of the 3 classes" in refused("eval", *JUDGE, "--distilled", "numbered")


@pytest.mark.parametrize(
    "damage, parts",
    [
        ("unknown", ["made/images lacks 1 of the 3 classes, such as ant", "it has emu"]),
        ("more", ["made/images has 1 folders of other classes, such as emu", "move them away"]),
        ("few", ["made/images/ant has 1 images of class ant, fewer than --ipc 2"]),
        ("none", ["made/images/ant holds no images", "finish the distillation"]),
        ("picture", ["made/images/ant/ant-image0-0.png cannot be decoded"]),
    ],
)
def test_distilled_folders_that_do_not_fit(refused, damage, parts):
    place = Path("made/images/ant")
    if damage == "unknown":
        place.rename("made/images/emu")
    elif damage == "more":
        shutil.copytree(place, "made/images/emu")
    elif damage == "picture":
        (place / "ant-image0-0.png").write_bytes(b"no picture")
    else:
        for path in sorted(place.iterdir())[: 1 if damage == "few" else 2]:
            path.unlink()
    line = refused("eval", *JUDGE, "--distilled", "made/images", "--data", "distilled", "--ipc", "2")
    assert all(part in line for part in parts), line
    assert not list(Path("e").rglob("*.json"))


def test_a_teacher_with_other_classes(refused):
    flags = ("--protocol", "rded", "--arch_name", "conv1", "--data", "distilled", "--teacher_epochs", "1")
    works("eval", *JUDGE, *flags, "--teacher_check", "false", "--nclass", "2")
    (teacher,) = Path("made/teachers").iterdir()
    line = refused("eval", *JUDGE, *flags, "--save_dir", "f", "--teacher", teacher, "--ipc", "2")
    assert (
        f"the teacher {teacher} does not know the class 'cat'; it knows 2" in line
        and not Path("f/result.json").exists()
    )


def test_interrupted(monkeypatch, capsys):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(LatentModel, "synthesize", stop)
    assert command("distill", [*DRAW]) == 130
    assert "distill.py: interrupted; --resume goes on" in capsys.readouterr().err


def test_a_folder_where_another_evaluation_goes_on(refused):
    with held("e") as other:
        line = refused("eval", *JUDGE)
        assert f"e is being filled by process {other.pid} on" in line and "choose another --save_dir" in line
    assert [path.name for path in Path("e").iterdir()] == [".lock"]
