"""What users get wrong with DIME-FM's buffer.py and distill.py, and what the released code got wrong: one clear line,
and nothing left behind."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.payloads import image_payload, vector_payload
from tests.conftest import contents, limited, works
from tests.dimefm_world import (
    FLAGS,
    JUDGE,
    LEARN,
    LISTS,
    TAKE,
    change,
    make_world,
    no_networks,
    nothing_begun,
    own_world,
    told,
)

ARRAYS = "--images pics --image_feats b/image_feats.npy --text_feats b/text_feats.npy"
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


@pytest.fixture
def here(world, own_folder, monkeypatch) -> None:
    own_world(world, monkeypatch)


@pytest.fixture
def no_network(monkeypatch) -> None:
    no_networks(monkeypatch)


# --- the command line


@pytest.mark.parametrize(
    "verb, flags, parts",
    [
        ("buffer", "--images nowhere", ["no images at nowhere", "correct the path"]),
        ("buffer", "--texts nowhere.txt", ["nowhere.txt", "correct the path"]),
        ("buffer", "--stages feature", ["--stages does not know 'feature'", "'features'"]),
        ("buffer", "--stages select", ["--stages select", "--budget"]),
        ("buffer", "--local_rank 0", ["--local_rank"]),
        ("distill", "--buffer_path nowhere", ["no manifest of pools at nowhere/pools.yaml; run buffer.py"]),
        ("distill", "--use_udist_loss", ["--use_udist_loss with --w_udist_loss 0", "such as 0.1"]),
        ("distill", "--use_pvl_loss --w_pvl_loss 0", ["--use_pvl_loss with --w_pvl_loss 0"]),
        ("distill", "--w_vl_loss 0", ["--w_vl_loss is 0", "nothing would be learned"]),
        ("distill", "--base_lr 1e38", ["--base_lr is 1e+38", "float32 hardly holds"]),
        ("distill", "--warmup_lr 1e38", ["--warmup_lr is 1e+38", "float32 hardly holds"]),
        ("buffer", "--teacher_lr 1e38", ["--teacher_lr is 1e+38", "float32 hardly holds"]),
        ("distill", "--images pics", ["no features of the images", "--image_feats"]),
        ("distill", "--tsv_file_list image_00.tsv text_00.feat.tsv", ["no features of the images", "--image_feats"]),
        ("distill", "--tsv_file_list image_00.tsv image_00.feat.tsv", ["no features of the sentences"]),
        ("distill", "--tsv_file_list roberta_00.tsv", ["'roberta_00.tsv'", "cannot be told", "--texts"]),
        ("distill", "--tsv_file_list gone.list", ["no list of files at gone.list"]),
        ("distill", f"{ARRAYS} --image_feats b/gone.npy", ["no features of the images at b/gone.npy", "buffer.py"]),
        ("distill", f"{ARRAYS} --image_feats b/text_feats.npy", ["has 40 images, the features b/text_feats.npy 30"]),
        ("distill", f"{ARRAYS} --images set/train", ["set/train has 12 images, the features b/image_feats.npy 40"]),
        ("distill", f"{ARRAYS} --images texts.txt", ["images texts.txt are no folder"]),
        ("distill", f"{ARRAYS} --pool_manifest b/pools.yaml", ["--images and --pool_manifest", "give one"]),
        ("distill", "--student resnet", ["unknown student 'resnet'", "timm:NAME"]),
        ("distill", "--student timm:resnet51x", ["timm has no 'resnet51x'"]),
        ("distill", "--local_rank 0", ["--local_rank 0 needs torchrun", "--nproc_per_node"]),
        ("distill", "--device cuda", ["--device cuda is not on this machine", "cpu"]),
    ],
)
def test_words(refused, verb, flags, parts):
    told(refused, verb, flags, parts)


def test_sizes_are_told_before_a_network_is_built(refused):
    """The released code ends in a StopIteration, or takes whatever there is."""
    told(refused, "distill", f"{ARRAYS} --text_batch 31", ["there are 30 sentences, fewer than a batch of 31"])
    told(refused, "distill", "--batch_size 50", ["there are 36 images to learn from, fewer than a batch of 50"])


@pytest.mark.parametrize(
    "environment, flags, parts",
    [
        ("0 x 0", "", ["WORLD_SIZE=x", "are no process numbers", "torchrun"]),
        ("3 2 0", "", ["RANK=3 is not one of WORLD_SIZE=2", "torchrun"]),
        ("0 1 0", "--local_rank 1", ["--local_rank 1 is not torchrun's LOCAL_RANK=0"]),
    ],
)
def test_processes_that_torchrun_did_not_start(refused, no_network, monkeypatch, environment, flags, parts):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), environment.split(), strict=True):
        monkeypatch.setenv(name, value)
    told(refused, "distill", flags, parts)


def test_a_loss_that_is_not_finite(refused):
    line = refused("distill", *FLAGS["distill"], "--base_lr", "1e30", "--warmup_lr", "1e30", code=1)
    assert "not finite" in line and "lower --base_lr" in line and not Path("o/student.pt").exists()


# --- TSV files


def rows_but(number: int, row: bytes | None):
    """One line of a file replaced, or left out."""

    def damage(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        return b"".join([*lines[:number], *([] if row is None else [row]), *lines[number + 1 :]])

    return damage


@pytest.mark.parametrize(
    "path, damage, parts",
    [
        ("image_00.tsv", lambda data: data[:-50], ["image_00.tsv is truncated", "fetch it again"]),
        ("image_00.tsv", lambda data: data[:-9000], ["image_00.tsv is truncated", "image_00.lineidx knows a record"]),
        ("image_00.tsv", lambda data: data.replace(b"\n", b"\r\n"), ["image_00.tsv has lines that end in CR LF"]),
        ("image_00.tsv", lambda data: b"", ["image_00.tsv is truncated: it has 0 bytes"]),
        ("image_00.lineidx", lambda data: b"9" * 39 + b"\n", ["image_00.lineidx knows a record"]),
        ("image_00.lineidx", lambda data: data[:-20] + b"\n", ["image_00.lineidx does not fit image_00.tsv"]),
        ("image_00.lineidx", lambda data: b"offsets", ["image_00.lineidx is not a list of offsets", "remove it"]),
        ("text_00.feat.tsv", lambda data: data.replace(b"text0\t", b"text9\t"), ["row 0 is 'text0'", "and 'text9'"]),
        ("image_00.feat.tsv", rows_but(7, None), ["40 images, the features image_00.feat.tsv 39", "matched by row"]),
        ("image_00.feat.tsv", rows_but(3, b"image3\t" + vector_payload(np.ones(20)) + b"\n"), ["20 numbers, not 64"]),
        ("image_00.feat.tsv", rows_but(3, b"image3\t?\n"), ["line 4 of image_00.feat.tsv is not base64"]),
        ("image_00.feat.tsv", rows_but(3, b"image3\n"), ["line 4 of image_00.feat.tsv has 1 field"]),
        ("image_00.feat.tsv", rows_but(3, b"image3\t" + vector_payload(np.full(64, np.nan)) + b"\n"), ["not finite"]),
    ],
)
def test_a_tsv_file_that_does_not_fit(refused, path, damage, parts):
    change(path, damage)
    if ".feat" in path:
        Path(path).with_suffix(".lineidx").unlink()
    line = refused("distill", *LEARN, *LISTS)
    assert all(part in line for part in parts), line
    assert not Path("o/student.pt").exists()


def test_a_tsv_file_that_was_damaged_from_the_start_can_be_mended(refused):
    """Nothing hangs on it yet; once something does, the run stays with what it began with."""
    good = Path("text_00.feat.tsv").read_bytes()
    change("text_00.feat.tsv", lambda data: data[:1500] + b"\0" + data[1501:])
    assert "of text_00.feat.tsv is not base64" in refused("distill", *LEARN, *LISTS)
    Path("text_00.feat.tsv").write_bytes(good)
    works("distill", *LEARN, *LISTS, "--resume")
    change("text_00.feat.tsv", rows_but(0, b"text0\t" + vector_payload(np.ones(64)) + b"\n"))
    assert "o holds a run on another text_feats" in refused("distill", *LEARN, *LISTS, "--resume")


def test_features_of_another_width(refused):
    narrow = np.load("b/image_feats.npy")[:, :32]
    np.save("narrow.npy", narrow)
    told(refused, "distill", f"{ARRAYS} --image_feats narrow.npy", ["have 32 and 64 numbers", "one teacher"])


# --- files of an earlier command


@pytest.mark.parametrize(
    "path, content, parts",
    [
        ("pools.yaml", b"images: [", ["manifest b/pools.yaml is not valid YAML"]),
        ("pools.yaml", b"\xff\xfe", ["manifest b/pools.yaml is not valid YAML"]),
        ("pools.yaml", b"[]", ["holds no keys and values", "image_feats"]),
        ("pools.yaml", b"imges: [pics]", ["unknown key 'imges'", "'images'"]),
        ("pools.yaml", b"images: 5", ["images is 5; it must be a list of files"]),
        ("pools.yaml", b"images: [gone]", ["no features of the images"]),
        ("image_feats.npy", None, ["no features of the images at b/image_feats.npy", "buffer.py"]),
        ("image_feats.npy", b"", ["b/image_feats.npy cannot be read", "extract them again"]),
        ("image_feats.npy", b"damaged", ["b/image_feats.npy cannot be read", "extract them again"]),
        ("image_feats.json", b"{", ["b/image_feats.json is not valid JSON"]),
        ("image_feats.json", b"[]", ["b/image_feats.json is no note on features"]),
    ],
)
def test_damaged_buffers(refused, no_network, path, content, parts):
    place = Path("b") / path
    place.unlink() if content is None else place.write_bytes(content)
    told(refused, "distill", "", parts)


def test_a_manifest_whose_teacher_is_no_name(refused, no_network):
    text = re.sub("(?m)^digest.*\n", "", Path("b/pools.yaml").read_text())
    Path("b/pools.yaml").write_text(text.replace("source: tiny", "source: 5"))
    told(refused, "distill", "", ["manifest b/pools.yaml: the teacher's source is 5; it must be a name or a folder"])


def test_images_that_changed_since(refused, no_network):
    Path("pics/00.png").write_bytes(Path("pics/01.png").read_bytes())
    told(refused, "distill", ARRAYS, ["were extracted of other images", "again"])


KEYS = "NAME: a, EMBED_DIM: 64, IMAGE_RESOLUTION: 32, VISION_LAYERS: 1, VISION_WIDTH: 64, VISION_PATCH_SIZE: 8"
CLIP_YAML = f"MODEL: {{TYPE: CLIP, {KEYS}}}"


@pytest.mark.parametrize(
    "text, parts",
    [
        (None, ["no student config at s.yaml"]),
        ("MODEL: [", ["s.yaml is not valid YAML"]),
        ("[]", ["s.yaml has a value of another kind"]),
        ("MODEL: {TYPE: Focal}", ["MODEL.TYPE is Focal, not CLIP or Unicl"]),
        ("MODEL: {TYPE: CLIP}", ["s.yaml lacks the key EMBED_DIM"]),
        (CLIP_YAML.replace("64,", "wide,", 1), ["s.yaml has a value of another kind", "wide"]),
        (CLIP_YAML.replace("32", "-32"), ["s.yaml has a value of another kind", "IMAGE_RESOLUTION is -32"]),
        (CLIP_YAML.replace(": 8", ": 7"), ["cuts images into 7 pixels"]),
        (CLIP_YAML.replace("64", "768"), ["for a joint space of width 768; the teacher's is 64"]),
        (CLIP_YAML.replace("NAME", "NAEM"), ["s.yaml lacks the key NAME"]),
        (CLIP_YAML.replace("}", ", DEPTH: 3}"), ["unknown key MODEL.DEPTH"]),
    ],
)
def test_student_configs(refused, text, parts):
    if text is not None:
        Path("s.yaml").write_text(text)
    words = [word for word in FLAGS["distill"] if word not in ("--student", "vit_tiny")]
    line = refused("distill", *words, "--student_config_file", "s.yaml")
    assert all(part in line for part in parts), line
    assert nothing_begun()


def test_a_run_folder_that_is_taken(refused):
    before = contents(Path("made"))
    same = (*LEARN, *LISTS, "--save_dir", "made")
    assert "made already holds a run; --resume goes on with it" in refused("distill", *same)
    assert "use_pvl_loss was False, is True" in refused("distill", *same, "--use_pvl_loss", "--resume")
    assert contents(Path("made")) == before
    assert "b already holds a run" in refused("buffer", *TAKE, "--buffer_path", "b")
    checkpoint = Path("made/checkpoint_00000004.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    assert f"checkpoint {checkpoint} cannot be read" in refused("distill", *same, "--resume")


# --- images and sentences


def test_images_that_cannot_be_decoded(refused, capsys):
    """Passed over and counted, and beyond a share a reason to stop. The released code learns a grey picture."""
    change("pics/05.png", lambda data: data[:60])
    line = refused("buffer", *TAKE)
    assert "1 of 40 images cannot be decoded, such as 05.png" in line and "--bad_images" in line
    shutil.rmtree("n")
    works("buffer", *TAKE, "--bad_images", "0.05")
    assert "note: 1 of 40 images cannot be decoded; they are left out" in capsys.readouterr().out
    works("distill", *LEARN, "--buffer_path", "n")
    # Of features from elsewhere nobody has noted which are of nothing.
    change("image_00.tsv", rows_but(9, b"image9\t" + image_payload(b"no picture") + b"\n"))
    Path("image_00.lineidx").unlink()
    flags = (*LEARN, *LISTS, "--save_dir", "f", "--text_batch", "8")
    line = refused("distill", *flags, "--batch_size", "32")
    assert re.search(r"of 32 images cannot be decoded, such as image9 of .*\.tsv \(", line), line
    shutil.rmtree("f")
    works("distill", *flags, "--batch_size", "32", "--bad_images", "0.1")
    assert "1 of 32 images could not be decoded and were passed over" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.txt", b"\xff\xfe\x00", "line 1 of a.txt is not UTF-8"),
        ("a.txt", b"", "there are no texts in a.txt"),
        ("a.json", b'["a", ', "texts a.json are not valid JSON"),
        ("a.jsonl", b'"a"\n{"x": 1}\n', "line 2 of a.jsonl is no caption"),
        ("a.csv", b"a", "a.csv"),
    ],
)
def test_sentences_that_are_none(refused, name, content, says):
    Path(name).write_bytes(content)
    assert says in refused("buffer", *TAKE, "--texts", name) and not Path("n/pools.yaml").exists()


# --- disks


def test_disks_that_are_full(refused):
    """Nothing is lost by it, and the same commands go on when there is room."""
    with limited(8_000):
        assert "larger than this disk or limit allows" in refused("buffer", *TAKE)
        assert "larger than this disk or limit allows" in refused("distill", *FLAGS["distill"])
    assert not Path("o/student.pt").exists() and not Path("n/pools.yaml").exists()
    works("buffer", *TAKE, "--resume")
    works("distill", *FLAGS["distill"], "--resume")
    assert contents(Path("n"))["image_feats.npy"] == contents(Path("b"))["image_feats.npy"]


def test_folders_that_are_files(refused):
    Path("file").write_text("")
    for verb, flag in (("buffer", "--buffer_path"), ("distill", "--save_dir")):
        assert "file: this is a file, not a folder" in refused(verb, *FLAGS[verb], flag, "file")
    # Examples are written first.
    told = "file/examples: a part of this path is a file, not a folder; choose another"
    assert told in refused("eval", *FLAGS["eval"], "--save_dir", "file")
    assert "file: this is a file" in refused("eval", *JUDGE, "--cache_dir", "file")
    assert nothing_begun()
