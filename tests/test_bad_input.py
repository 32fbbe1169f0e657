"""What users get wrong, and what machines do to them: one clear line, the right exit code, and nothing lost."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from methods.command import command
from methods.core.store import TrajectoryStore
from tests.conftest import contents, limited, works
from tests.data.conftest import Library
from tests.processes import held

ROOT = Path(__file__).resolve().parents[1]
TOY = ("--dataset", "toy", "--toy_images", "80", "--image_size", "8", "--device", "cpu", "--workers", "1")
NETS = ("--image_encoder", "ConvNetD1W8", "--text_encoder", "tfidf", "--text_dim", "16")
TINY = (*TOY, *NETS)
EXPERTS = ("--num_experts", "1", "--train_epochs", "2", "--eval_freq", "0")
PAIRS = ("--num_pairs", "6", "--syn_steps", "2", "--lr_img", "1", "--lr_txt", "1", "--lr_lr", "1e-6")
JUDGED = ("--num_eval", "1", "--epoch_eval_train", "1")
LEARN = (*TINY, *PAIRS, *JUDGED, "--iterations", "2", "--eval_it", "2")


pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """One toy expert in `made / buffers` and six pairs in `made / run`; nothing changes them."""
    root = tmp_path_factory.mktemp("made")
    cache = ("--cache_dir", root / "cache")
    works("buffer", *TINY, *EXPERTS, *cache, "--buffer_path", root / "buffers")
    works("distill", *LEARN, *cache, "--buffer_path", root / "buffers", "--save_dir", root / "run")
    return root


@pytest.fixture
def buffers(made, tmp_path) -> Path:
    """A copy of the toy expert, to be damaged: the leaf folder."""
    shutil.copytree(made / "buffers", tmp_path / "buffers")
    return tmp_path / "buffers" / "toy" / "ConvNetD1W8" / "tfidf"


# --- words


@pytest.mark.parametrize(
    "verb, flags, parts",
    [
        ("distill", ["--num_pair", "3"], ["unknown flag --num_pair", "'--num_pairs'"]),
        ("buffer", ["--epochs=3"], ["unknown flag --epochs", "buffer.py --help"]),
        ("eval", ["--resume"], ["unknown flag --resume"]),
        ("buffer", ["extra"], ["unexpected word 'extra'"]),
        ("buffer", ["--dataset", "flikr"], ["unknown dataset 'flikr'", "'flickr'"]),
        ("buffer", ["--dataset"], ["--dataset"]),
        ("buffer", ["--method", "vlld"], ["unknown method 'vlld'", "'vldd'"]),
        ("buffer", [*TOY, "--text_encoder", "tfidf", "--image_encoder", "nfnett"], ["'nfnett'", "'nfnet'"]),
        ("buffer", [*TOY, "--image_encoder", "ConvNetD1W8", "--text_encoder", "brt"], ["of brt", "'bert'"]),
        ("eval", ["--protocol", "lorss"], ["--protocol", "'lorss'", "'lors'"]),
        ("eval", ["--data", "distiled"], ["--data", "'distiled'", "'distilled'"]),
        ("eval", ["--data", ""], ["--data names nothing"]),
        ("distill", ["--syn_steps", "0"], ["--syn_steps is 0", "at least 1"]),
        ("distill", ["--num_queries", "ten"], ["--num_pairs", "whole number", "'ten'"]),
        ("distill", ["--draw", "maybe"], ["--draw", "true or false", "'maybe'"]),
        ("distill", ["--image_only", "--text_only"], ["nothing to learn"]),
        ("buffer", [*TINY, "--device", "gpu"], ["--device gpu", "cpu"]),
        ("buffer", [*TINY, "--save_epochs", "0,99"], ["save_epochs", "99"]),
        ("distill", ["--config", "nowhere.yaml"], ["no config file nowhere.yaml"]),
        ("distill", ["--config", "."], ["is a folder"]),
    ],
)
def test_words(refused, tmp_path, verb, flags, parts):
    line = refused(verb, *flags)
    assert all(part in line for part in parts), line
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    "text, part",
    [
        ("distill: {num_pears: 3}", "(did you mean 'num_pairs'?)"),
        ("distil: {num_pairs: 3}", "unknown block 'distil'"),
        ("distill: [1, 2]", "not keys and values"),
        ("distill: {num_pairs: many}", "whole number"),
        ("a: b: c", "not valid YAML"),
        ("method: vlld", "'vldd'"),
    ],
)
def test_words_in_a_config(refused, tmp_path, text, part):
    (tmp_path / "row.yaml").write_text(text)
    assert part in refused("distill", "--config", "row.yaml")


def test_debug_shows_where(capsys):
    assert command("buffer", ["--dataset", "flikr", "--debug"]) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text and text.splitlines()[-1].startswith("buffer.py: error: unknown dataset")


# --- data


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path / "library")


def flickr(library: Library, **changes: object) -> list[object]:
    given = {"image_root": library.images, "ann_root": library.notes, "buffer_path": "b"} | changes
    places = [word for name, value in given.items() for word in (f"--{name}", value)]
    small = ["--dataset", "flickr", "--image_size", "8", "--device", "cpu", "--workers", "1", "--batch_size_train", "8"]
    return [*small, *NETS, *EXPERTS, *places]


def test_data_as_it_should_be(library):
    works("buffer", *flickr(library))


def broken(library: Library, kind: str) -> None:
    train = library.file("train")
    match kind:
        case "no train":
            train.unlink()
        case "no val":
            library.file("val").unlink()
        case "cut short":
            train.write_bytes(train.read_bytes()[:200])
        case "empty":
            train.write_text("")
        case "no text":
            train.write_bytes(bytes(range(256)))
        case "deep":
            train.write_text("[" * 100_000)
        case "an object":
            train.write_text('{"images": []}')
        case "no records":
            train.write_text("[]")
        case "no captions":
            library.write("train", [{"image": "flickr30k-images/train0.jpg", "image_id": 1}])
        case "other keys":
            library.write("train", [{"file": "a.jpg", "text": "a dog"}])
        case "val as train":
            shutil.copy(library.file("val"), train)
        case "train as val":
            shutil.copy(train, library.file("val"))
        case "outside":
            library.write("train", [{"image": "../secret.jpg", "caption": "a", "image_id": 1}])
        case "no image":
            (library.images / library.names["train"][3]).unlink()
        case "no val image":
            (library.images / library.names["val"][1]).unlink()
        case "half an image":
            path = library.images / library.names["train"][3]
            path.write_bytes(path.read_bytes()[:300])
        case "no picture":
            (library.images / library.names["train"][3]).write_text("<html>404</html>")


@pytest.mark.parametrize(
    "kind, parts",
    [
        ("no train", ["flickr30k_train.json", "fetch https://"]),
        ("no val", ["flickr30k_val.json", "fetch https://"]),
        ("cut short", ["flickr30k_train.json", "not valid JSON"]),
        ("empty", ["flickr30k_train.json", "not valid JSON"]),
        ("no text", ["flickr30k_train.json", "not valid JSON"]),
        ("deep", ["flickr30k_train.json", "not valid JSON"]),
        ("an object", ["flickr30k_train.json", "not a list"]),
        ("no records", ["flickr30k_train.json", "empty"]),
        ("no captions", ["record 1 of", "no 'caption'"]),
        ("other keys", ["record 1 of", "no 'image'", "file, text"]),
        ("val as train", ["record 1 of", "as val and test files do"]),
        ("train as val", ["record 1 of", "as train files do"]),
        ("outside", ["../secret.jpg", "not below the image folder"]),
        ("no image", ["1 of 12 images", "train3.jpg", "--image_root"]),
        ("no val image", ["1 of 4 images", "val1.jpg", "--image_root"]),
        ("half an image", ["train3.jpg", "cannot be decoded", "fetch it again"]),
        ("no picture", ["train3.jpg", "cannot be decoded", "none of JPEG"]),
    ],
)
def test_damaged_data(refused, library, kind, parts):
    broken(library, kind)
    line = refused("buffer", *flickr(library, eval_freq=1, num_experts=1))
    assert all(part in line for part in parts), line
    assert not list(Path("cache").rglob("*.images")) + list(Path("b").rglob("*.part"))


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"ann_root": "nowhere"}, ["no annotation folder nowhere", "--ann_root"]),
        ({"ann_root": ""}, ["no annotation folder", "--ann_root", "--dataset toy"]),
        ({"image_root": "nowhere"}, ["no image folder nowhere", "--image_root", "https://www.kaggle"]),
        ({"image_root": ""}, ["no image folder", "--image_root"]),
    ],
)
def test_a_mistyped_folder_can_be_corrected_at_once(refused, library, changes, parts):
    line = refused("buffer", *flickr(library, **changes))
    assert all(part in line for part in parts), line
    works("buffer", *flickr(library))  # the same run folder, without --resume


def test_a_file_with_an_unknown_method_or_data_set_is_named(refused):
    Path("row.yaml").write_text("method: 'mtt*'\ndataset: cifar9\n")
    line = refused("buffer", "--config", "row.yaml")
    assert line.startswith("unknown method 'mtt*' (did you mean 'mtt'?)") and line.endswith("'mtt*' is from row.yaml")
    line = refused("buffer", "--config", "row.yaml", "--method", "mt")
    assert "unknown method 'mt' (did you mean" in line and "row.yaml" not in line
    Path("row.yaml").write_text("method: m\n")  # a file that was cut short
    assert refused("buffer", "--config", "row.yaml").endswith("; 'm' is from row.yaml")
    assert "row.yaml" not in refused("buffer", "--config", "row.yaml", "--method=m")
    Path("row.yaml").write_text("")
    line = refused("buffer", "--config", "row.yaml", "--zca")
    assert line.startswith("unknown flag --zca") and line.endswith("; row.yaml names no --method")
    assert "row.yaml" not in refused("buffer", "--config", "row.yaml", "--method", "vldd", "--zca")
    Path("row.yaml").write_text("dataset: cifar9\n")
    line = refused("buffer", "--config", "row.yaml")
    assert "unknown dataset 'cifar9' (did you mean" in line and line.endswith("; 'cifar9' is from row.yaml")
    line = refused("buffer", "--config", "row.yaml", "--dataset", "cifar8")
    assert "unknown dataset 'cifar8' (did you mean" in line and "row.yaml" not in line


WRONG = [("dataset", "flackr"), ("image_encoder", "nfnot"), ("buffer_path", "no/where")]


@pytest.mark.parametrize("option, word", WRONG)
def test_a_file_of_options_is_named_with_what_is_wrong_in_it(refused, option, word):
    """Also where it is noticed long after the file was read."""
    made = {"dataset": "toy", "toy_images": 20, "image_size": 16, "image_encoder": "ConvNetD1W8", "device": "cpu"}
    made |= {"text_encoder": "tfidf", "buffer_path": "b", option: word}
    Path("row.yaml").write_text(yaml.safe_dump({"method": "vldd", "distill": made}))
    line = refused("distill", "--config", "row.yaml")
    assert line.endswith(f"; '{word}' is from row.yaml")
    given = refused("distill", "--config", "row.yaml", f"--{option}", word)
    assert given == line.removesuffix(f"; '{word}' is from row.yaml")


def test_a_config_written_by_hand_is_not_replaced(refused):
    text = "# mine\ndistill: {num_pairs: 3}\n"
    Path("o").mkdir()
    Path("o/config.yaml").write_text(text)
    assert "already holds a run" in refused("distill", *LEARN, "--save_dir", "o")
    assert Path("o/config.yaml").read_text() == text


# --- trajectories


def distilling(made: Path, folder: Path, *more: object) -> list[object]:
    return [*LEARN, "--buffer_path", folder, "--save_dir", "o", *more]


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--image_encoder", "ConvNetD1W4"], ["another network", "the network and sizes that buffer.py had"]),
        (["--joint_width", "24"], ["another network"]),
        (["--text_dim", "12"], ["another network", "txt"]),
        (["--image_size", "16"], ["another network"]),
        (["--image_trainable", "false"], ["another network: img learned there"]),
        (["--max_start_epoch", "3"], ["max_start_epoch 3 + expert_epochs 1", "epochs up to 3", "keep [0, 1, 2]"]),
        (["--expert_epochs", "5"], ["expert_epochs 5", "keep [0, 1, 2]"]),
        (["--num_pairs", "81"], ["num_pairs is 81", "80 images"]),
        (["--sim_type", "lowrank", "--sim_rank", "7"], ["sim_rank is 7"]),
    ],
)
def test_trajectories_that_do_not_fit(refused, made, buffers, flags, parts):
    line = refused("distill", *distilling(made, buffers, *flags))
    assert all(part in line for part in parts), line
    if flags[0] == "--sim_type":
        assert not Path("o").exists()  # told before there was a run
        return
    assert list(Path("o").iterdir()) == [Path("o/config.yaml")]
    if flags[0] != "--num_pairs":
        assert not Path("cache").exists()  # told before the captions were embedded


def test_no_trajectories(refused, made):
    line = refused("distill", *distilling(made, Path("nowhere")))
    assert "no trajectories in nowhere" in line and "run buffer.py first" in line


@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "foreign"])
def test_damaged_snapshot(refused, made, buffers, damage):
    path = buffers / "expert_000" / "epoch_002.safetensors"
    if damage == "gone":
        path.unlink()
    elif damage == "foreign":
        shutil.copy(made / "run" / "distilled_best.pt", path)
    else:
        path.write_bytes(path.read_bytes()[: 5000 if damage == "cut" else 0])
    line = refused("distill", *distilling(made, buffers))
    assert str(path) in line and "buffer.py" in line
    assert not Path("cache").exists()


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"version": 1}', '{"version": "a"}', '{"version": 99}', "entry without epochs"],
)
def test_damaged_manifest(refused, made, buffers, text):
    path = buffers / "manifest.json"
    if text.startswith("entry"):
        manifest = json.loads(path.read_text())
        del manifest["experts"][0]["epochs"]
        text = json.dumps(manifest)
    path.write_text(text)
    line = refused("distill", *distilling(made, buffers))
    assert str(buffers) in line
    assert "buffer.py" in line or "restore" in line or "update" in line


@pytest.fixture
def published(made, tmp_path) -> Path:
    """The toy expert in the published layout."""
    works("buffer", *TINY, *EXPERTS, "--buffer_path", made / "buffers", "--export", tmp_path / "published")
    return tmp_path / "published"


def test_published_trajectories_do_as_well(made, published):
    works("distill", *distilling(made, published))
    assert Path("o/log.jsonl").read_text() == (made / "run" / "log.jsonl").read_text()


@pytest.mark.parametrize("damage", ["gone", "cut", "flat", "harm", "mixed", "nothing"])
def test_damaged_published_trajectories(refused, made, published, damage):
    path = published / "txt_replay_buffer_0.pt"
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:9000])
    elif damage == "mixed":
        (expert,) = torch.load(path, weights_only=True)
        expert[2][0] = expert[2][0][1:]
        torch.save([expert], path)
    else:
        torch.save({"flat": torch.zeros(3), "harm": Harm(), "nothing": []}[damage], path)
    assert str(published) in refused("distill", *distilling(made, published))
    assert not Path("harmed").exists()


# --- computations that fail


def test_experts_that_diverge(refused):
    line = refused("buffer", *TINY, *EXPERTS, "--buffer_path", "b", "--lr_teacher_img", "1e30", code=1)
    assert "expert 0" in line and "not finite" in line and "lower the rate" in line


@pytest.mark.parametrize("every", [1, 20])
def test_pixels_that_diverge(refused, made, every):
    flags = distilling(made, made / "buffers", "--iterations", "4", "--checkpoint_every", every)
    line = refused("distill", *flags, "--lr_img", "1e20", code=1)
    assert "not finite" in line or "is nan" in line or "is inf" in line
    assert line.startswith("step ")
    (phase,) = torch.load("o/checkpoint.pt", weights_only=True)["learned"]["phases"]
    assert all(tensor.isfinite().all() for tensor in phase)
    assert "o/checkpoint.pt" in line and "--resume" in line
    works("distill", *flags, "--resume", "--lr_img", "1")
    assert Path("o/distilled_4.pt").exists()


def test_evaluation_of_what_diverged(refused, made):
    flags = distilling(made, made / "buffers", "--eval_it", "1", "--checkpoint_every", "1")
    line = refused("distill", *flags, "--lr_img", "1e30", code=1)
    assert line.startswith("step 1: ") and "state is that of step 0 in o/checkpoint.pt" in line
    works("distill", *flags, "--resume", "--lr_img", "1")


def test_rates_that_turn_negative(refused, made):
    flags = distilling(made, made / "buffers", "--lr_lr", "1e3")
    line = refused("distill", *flags, "--clamp_lr", "0", code=1)
    assert line.startswith("step ") and "the learned rate of" in line and "--clamp_lr" in line
    works("distill", *flags, "--resume", "--clamp_lr", "1e-3", "--lr_lr", "1e-3")


def test_memory_that_runs_out(refused, made, monkeypatch):
    def fill(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")

    monkeypatch.setattr("methods.core.matching.hypergradient", fill)
    line = refused("distill", *distilling(made, made / "buffers"), code=1)
    assert "Tried to allocate 2 GiB" in line and "use smaller batches" in line


# --- disks


def test_files_that_may_not_grow(refused, made, buffers):
    root, before = buffers.parents[2], contents(buffers)
    more = (*TINY, *EXPERTS, "--buffer_path", root, "--num_experts", "2", "--resume")
    with limited(40_000):
        assert "larger than this disk or limit allows" in refused("buffer", *more)
    after = contents(buffers)
    assert {name: after[name] for name in before if name.endswith(".safetensors")}.items() <= before.items()
    TrajectoryStore.open(buffers).read(0, 2)
    works("buffer", *more)
    assert TrajectoryStore.open(buffers).count == 2


def test_learned_files_that_may_not_grow(refused, made):
    flags = distilling(made, made / "buffers", "--cache_dir", made / "cache")
    with limited(12_000):  # room for the pairs, not for the page
        assert "larger than this disk or limit allows" in refused("distill", *flags)
    torch.load("o/distilled_0.pt", weights_only=True)
    works("distill", *flags, "--resume")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 kB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk(refused, made, small_disk):
    leaf = small_disk / "toy" / "ConvNetD1W8" / "tfidf"
    line = refused("buffer", *TINY, *EXPERTS, "--train_epochs", "6", "--buffer_path", small_disk)
    assert "the disk is full" in line
    store = TrajectoryStore.open(leaf)
    assert store.epochs(0)
    assert all(store.read(0, epoch) for epoch in store.epochs(0))
    line = refused("distill", *LEARN, "--buffer_path", made / "buffers", "--save_dir", small_disk / "o")
    assert "the disk is full" in line
    assert not [path for path in small_disk.rglob("*") if path.name.endswith(".part")]


def test_unwritable_folders(refused, made):
    Path("file").write_text("mine")
    place = "file/below"
    assert "is a file" in refused("buffer", *TINY, *EXPERTS, "--buffer_path", place)
    assert "is a file" in refused("distill", *LEARN, "--buffer_path", made / "buffers", "--save_dir", place)
    assert "is a file" in refused("distill", *LEARN, "--buffer_path", made / "buffers", "--save_dir", "file")
    assert "is a file" in refused("buffer", *TINY, *EXPERTS, "--buffer_path", "b", "--cache_dir", place)
    assert "is a file" in refused("eval", "--distilled", made / "run/distilled_best.pt", *JUDGED, "--save_dir", place)
    assert Path("file").read_text() == "mine"


# --- run folders


def test_finished_runs_are_not_run_over(refused, made, buffers, tmp_path):
    root = buffers.parents[2]
    shutil.copytree(made / "run", "o")
    before = contents(root), contents(Path("o"))
    again = (*TINY, *EXPERTS, "--buffer_path", root)
    line = refused("buffer", *again)
    assert "already holds a run" in line and "--resume" in line and "--buffer_path" in line
    line = refused("distill", *distilling(made, made / "buffers"))
    assert "o already holds a run" in line and "--resume" in line and "--save_dir" in line
    line = refused("buffer", *again, "--resume", "--seed", "5", "--mom", "0.9")
    assert "seed was 0, is 5" in line and "mom was 0.0, is 0.9" in line
    line = refused("distill", *distilling(made, made / "buffers"), "--resume", "--syn_steps", "3")
    assert "syn_steps was 2, is 3" in line
    line = refused("distill", *LEARN, "--buffer_path", root, "--save_dir", buffers, "--resume")
    assert "of another verb" in line
    assert (contents(root), contents(Path("o"))) == before


def test_resumed_with_moved_data_but_not_with_other(refused, library):
    works("buffer", *flickr(library))
    records = library.records("train")
    library.root = library.root.rename("moved")
    library.images, library.notes = library.root / "images", library.root / "notes"
    more = ("--num_experts", "2", "--resume")
    records[0]["caption"] = "Something else."
    library.write("train", records)
    before = contents(Path("b"))
    line = refused("buffer", *flickr(library), *more)
    assert "another training_set and text_encoder" in line  # tfidf is learned from the captions
    assert contents(Path("b")) == before
    records[0]["caption"] = "A nice photo, number 0."
    library.write("train", records)
    works("buffer", *flickr(library), *more)


@pytest.mark.parametrize("text", ["", "distill:", "distill: 3", "{", "buffer: {seed: 0}"])
def test_damaged_run_config(refused, made, text):
    shutil.copytree(made / "run", "o")
    Path("o/config.yaml").write_text(text)
    assert "o/config.yaml is damaged" in refused("distill", *distilling(made, made / "buffers"), "--resume")


def test_damaged_checkpoint(refused, made):
    shutil.copytree(made / "run", "o")
    flags = distilling(made, made / "buffers", "--resume")
    path = Path("o/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:1000])
    assert "checkpoint o/checkpoint.pt cannot be read" in refused("distill", *flags)
    torch.save([1, 2], path)
    assert "does not fit" in refused("distill", *flags)


def test_damaged_progress(refused, buffers):
    (buffers / "progress.pt").write_bytes(b"PK half of it")
    again = [*TINY, *EXPERTS, "--buffer_path", "buffers", "--num_experts", "2", "--resume"]
    line = refused("buffer", *again)
    assert "progress.pt cannot be read" in line and "remove it to begin that expert anew" in line
    (buffers / "progress.pt").unlink()
    works("buffer", *again)


# --- eval


@pytest.fixture
def distilled(made, tmp_path) -> Path:
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run" / "distilled_best.pt"


def test_eval_without_a_file(refused):
    line = refused("eval", "--distilled", "nowhere.pt")
    assert "no distilled file at nowhere.pt" in line
    assert "runs/vldd/mine/distilled_best.pt" in refused("eval", "--name", "mine", *TINY)


def test_eval_finds_a_row_by_its_name(made, tmp_path):
    shutil.copytree(made / "run", "runs/vldd/mine")
    works("eval", "--name", "mine", *JUDGED)
    assert Path("runs/vldd/mine/eval/clean-ConvNetD1W8-tfidf/result.json").exists()


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def changed(path: Path, **parts: object) -> None:
    torch.save(torch.load(path, weights_only=True) | parts, path)


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "list", "tensor", "state", "pickle", "torch pickle"])
def test_eval_of_what_is_no_distilled_file(refused, distilled, kind):
    match kind:
        case "cut":
            distilled.write_bytes(distilled.read_bytes()[:3000])
        case "empty":
            distilled.write_bytes(b"")
        case "text":
            distilled.write_text("no tensors here")
        case "list":
            torch.save([torch.zeros(2)], distilled)
        case "tensor":
            torch.save(torch.zeros(2), distilled)
        case "state":
            torch.save({"meta": 3, "weight": torch.zeros(2)}, distilled)
        case "pickle":
            distilled.write_bytes(pickle.dumps(Harm()))
        case "torch pickle":
            torch.save({"image": Harm()}, distilled)
    line = refused("eval", "--distilled", distilled, *TOY, *NETS)
    assert str(distilled) in line
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    "parts, flags, wanted",
    [
        ({"text": torch.zeros(6, 9)}, [], ["texts 9 wide", "tfidf gives 16"]),
        ({}, ["--text_dim", "9"], ["texts 16 wide", "gives 9"]),
        ({}, ["--image_size", "16"], ["images of 8 px", "--image_size is 16"]),
        ({}, ["--train_limit", "60"], ["another tfidf"]),
        ({"text": torch.zeros(5, 16)}, [], ["do not belong together"]),
        ({"image": torch.zeros(6, 1, 8, 8)}, [], ["(6, 1, 8, 8)"]),
        ({"image": torch.zeros(6, 3, 8, 9)}, [], ["(6, 3, 8, 9)"]),
        ({"image": torch.full((6, 3, 8, 8), float("nan"))}, [], ["not finite"]),
        ({"syn_lr_img": torch.tensor(-0.5)}, [], ["rate of img is -0.5"]),
        ({"syn_lr_txt": torch.tensor(float("nan"))}, [], ["rate of txt is nan"]),
        ({"meta": {"format": 7}}, [], ["format 7", "update"]),
        ({}, ["--data", "random", "--num_pairs", "81"], ["num_pairs is 81", "80 images"]),
    ],
)
def test_eval_of_what_does_not_fit(refused, distilled, parts, flags, wanted):
    changed(distilled, **parts)
    more = [] if "meta" not in parts else [*TINY]
    line = refused("eval", "--distilled", distilled, *JUDGED, *more, *flags)
    assert all(part in line for part in wanted), line


def test_eval_never_replaces_a_result(made, distilled):
    flags = ("--distilled", distilled, *JUDGED)
    works("eval", *flags)
    folder = distilled.parent / "eval"
    first = contents(folder)
    works("eval", *flags, "--data", "random")
    after = contents(folder)
    assert first.items() <= after.items() and len(after) == 2 * len(first)
    assert "random" in (distilled.parent / "report.html").read_text()
    works("eval", *flags, "--save_dir", "mine")
    works("eval", *flags, "--save_dir", "mine")
    assert Path("mine/result.json").exists() and Path("mine-2/result.json").exists()


def test_eval_elsewhere_keeps_the_captions_of_the_page(made, distilled):
    caption = (distilled.parent / "synthetic_sentences_0.txt").read_text().splitlines()[0]
    works("eval", "--distilled", distilled, *JUDGED, "--data", "random", "--num_pairs", "4", "--image_encoder", "mlp")
    assert caption in (distilled.parent / "report.html").read_text()


# --- interruptions


def test_interrupted(made, capsys, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("methods.core.matching.hypergradient", stop)
    assert command("distill", [str(flag) for flag in distilling(made, made / "buffers")]) == 130
    text = capsys.readouterr().err
    assert text.rstrip("\n").split("\n")[-1].startswith("distill.py: interrupted; --resume") and "Traceback" not in text


def test_interrupted_evaluation(made, capsys, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("methods.core.training.Trainer.fit", stop)
    assert command("eval", ["--distilled", str(made / "run/distilled_best.pt")]) == 130
    assert "eval.py: interrupted; give the command again" in capsys.readouterr().err


def test_a_folder_that_another_process_fills(made, refused):
    """Nobody else gets in, to resume or not, until that one ends; then the run goes on as ever."""
    shutil.copytree(made / "run", "o")
    shutil.copytree(made / "buffers", "b")
    (leaf,) = (path.parent for path in Path("b").rglob("manifest.json"))
    for folder, verb, flags in (
        ("o", "distill", distilling(made, made / "buffers")),
        (str(leaf), "buffer", [*TINY, *EXPERTS, "--buffer_path", "b"]),
    ):
        with held(folder) as other:
            before = contents(Path(folder))
            for more in ([], ["--resume"]):
                line = refused(verb, *flags, *more)
                assert f"{folder} is being filled by process {other.pid} on" in line and "choose another --" in line
            assert contents(Path(folder)) == before
        works(verb, *flags, "--resume")
        assert not (Path(folder) / ".lock").exists()


def test_old_files_may_be_removed(made):
    shutil.copytree(made / "run", "o")
    Path("o/distilled_0.pt").unlink()
    works("distill", *distilling(made, made / "buffers"), "--iterations", "4", "--resume")
    works("eval", "--distilled", "o/distilled_best.pt", *JUDGED)


def test_control_c():
    flags = [*TINY, *EXPERTS, "--train_epochs", "1000", "--buffer_path", "b"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "buffer.py"), *flags]
    # Tests that were begun in the background ignore the signal, and so would what they begin.
    listening = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=env)
    finally:
        signal.signal(signal.SIGINT, listening)
    while not list(Path("b").rglob("epoch_001.safetensors")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and "Traceback" not in text, text
    assert text.rstrip("\n").split("\n")[-1].startswith("buffer.py: interrupted; --resume")
