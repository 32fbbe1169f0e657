"""Discs of three colours through the three scripts, each in a process of its own: what is drawn of prototypes teaches
their names.

The demo's shapes (configs/smoke/vlcp.yaml) take minutes to be drawn well; colours are what so small a model can tell
within seconds.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
import yaml
from PIL import Image

from tests.conftest import contents
from tests.processes import alone
from utils.files import read_json

COLOURS = {"blue": (40, 60, 210), "green": (50, 180, 60), "red": (215, 50, 50)}
COMMON = ("--method", "vlcp", "--name", "discs", "--dataset", "folder", "--data_path", "discs", "--device", "cpu")
BUFFER = (
    *("--model", "tiny", "--resolution", 32, "--vae_steps", 40, "--max_train_steps", 80, "--train_batch_size", 16),
    *("--gradient_accumulation_steps", 1, "--learning_rate", 2e-3, "--validation_epochs", 0),
)
DISTILL = (
    *("--ipc", 8, "--size", 32, "--output_size", 32, "--num_inference_steps", 10, "--guidance_scale", 3),
    *("--synthesis_batch", 8),
)
EVAL = (
    *("--data", "random", "distilled", "full", "--protocol", "minimax", "--net_type", "convnet", "--depth", 2),
    *("--width", 0.125, "--size", 32, "--epochs", 40, "--full_epochs", 5, "--lr", 0.05, "--repeat", 2),
)


def draw(folder: Path, count: int, colour: tuple[int, int, int], rng: np.random.Generator) -> list[dict[str, str]]:
    """Discs of about this colour, anywhere, of any size, on any grey; the captions of these images."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:32, :32]
    captions = []
    for number in range(count):
        grey, centre, radius = rng.integers(20, 235), rng.uniform(11, 21, 2), rng.uniform(7, 11)
        pixels = np.full((32, 32, 3), float(grey))
        pixels[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = colour
        pixels += rng.normal(0, 8, pixels.shape)
        name = f"{folder.name}/{number:03}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder.parent / name)
        size, place = "large" if radius > 9 else "small", "dark" if grey < 128 else "light"
        captions.append({"file_name": name, "text": f"A {size} {folder.name} circle on a {place} background."})
    return captions


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder in which the three commands ran, and what each printed; nobody writes there."""
    root, rng, said = tmp_path_factory.mktemp("discs"), np.random.default_rng(0), {}
    rows = [row for name in COLOURS for row in draw(root / "discs/train" / name, 40, COLOURS[name], rng)]
    for name in COLOURS:
        draw(root / "discs/val" / name, 20, COLOURS[name], rng)
    (root / "discs/train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for verb, flags in (("buffer", BUFFER), ("distill", DISTILL), ("eval", EVAL)):
        done = alone(verb, *COMMON, *flags, cwd=root)
        assert done.rc == 0, f"{verb}: {done.stderr[-2000:]}"
        said[verb] = done.stdout
    return root, said


@pytest.fixture(scope="module")
def run(demo) -> Path:
    return demo[0] / "runs/vlcp/discs"


def test_the_model_learns(run):
    rows = [json.loads(line) for line in (run / "buffers/log.jsonl").read_text().splitlines()]
    for name, steps, share in (("vae_loss", 40, 0.8), ("loss", 80, 0.8)):
        losses = [row[name] for row in rows if name in row]
        assert len(losses) == steps and np.mean(losses[-10:]) < share * np.mean(losses[:10]), name


def test_students_learn_of_what_is_drawn(run):
    (path,) = run.glob("eval/*/result.json")
    rows = {row["name"]: row for row in read_json(path, "result")["rows"]}
    assert {name: row["size"] for name, row in rows.items()} == {"random": 24, "distilled": 24, "full": 120}
    for name, row in rows.items():
        # Guessing: 33; distilled images gave 89, 93 and 66 with seeds 0, 1 and 2.
        assert row["metrics"]["last"]["mean"] > 50, name
        assert len(row["metrics"]["last"]["values"]) == 2


@pytest.mark.skipif(transformers.__version__ < "5", reason="4 draws another tiny model, which learns green more slowly")
def test_pictures_have_the_colour_of_their_class(run):
    for channel, name in ((2, "blue"), (1, "green"), (0, "red")):
        found = [np.asarray(Image.open(path)).astype(float) for path in sorted((run / "images" / name).iterdir())]
        assert len(found) == 8 and all(image.shape == (32, 32, 3) for image in found)
        assert np.mean(found, axis=(0, 1, 2)).argmax() == channel


def test_the_files_are_there(run):
    assert {path.name for path in (run / "buffers/model").iterdir()} >= {"unet", "vae", "model_index.json"}
    assert sorted(contents(run / "sheets")) == [f"{name}.png" for name in COLOURS]
    captions = {json.loads(line)["text"] for line in (run.parents[2] / "discs/train/metadata.jsonl").open()}
    for name in COLOURS:
        found = read_json(run / "prototypes" / f"{name}.json", "prototypes")
        assert len(found["texts"]) == 8 and {*found["texts"]} <= captions and found["clusters"].count(-1) == 4
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 4 and "distilled" in page and "Loss of the denoiser" in page
    noted = read_json(run / "manifest.json", "manifest")
    assert noted["prototypes"]["classes"] == [*COLOURS] and noted["images"]["count"] == 24
    for folder, verb in ((run, "distill"), (run / "buffers", "buffer")):
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        assert tree["method"] == "vlcp" and tree[verb]["dataset"] == "folder"


def test_each_verb_says_what_it_did(demo):
    said = demo[1]
    assert "120 captions in discs/train/metadata.jsonl" in said["buffer"] and "buffers/model" in said["buffer"]
    assert (
        "24 images of 32 x 32 pixels in runs/vlcp/discs/images" in said["distill"] and "report.html" in said["distill"]
    )
    for words in ("| random ", "| distilled ", "| full ", "2 students", "convnet-2"):
        assert words in said["eval"]
