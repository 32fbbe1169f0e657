"""The commands that DIME-FM's authors published: training word for word, evaluation by flags of the same names."""

import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data.payloads import image_payload, vector_payload
from data.toy import captioned_shapes, shape_sentences
from data.tsv import TsvWriter
from data.views import normalised
from methods import dimefm
from methods.clip_learning import Learned
from methods.command import command
from methods.dimefm import CONFIGS
from networks.clip import load_clip
from networks.clip_students import SPECS, build_student, load_student, student_spec
from tests.conftest import ROOT, contents
from utils.config import idle_options, parse
from utils.files import read_json
from utils.run import read_log

TRAINING = """
python train_amp.py  --amp --dataroot DATA --tsv_file_list  configs/datalists/cc3m/image.list
configs/datalists/cc3m/image_feat.list configs/datalists/cc3m/text.list  configs/datalists/cc3m/text_feat.list
--batch_size 640 --use_pvl_loss
"""
LISTS = tuple(f"configs/datalists/cc3m/{name}.list" for name in ("image", "image_feat", "text", "text_feat"))
# Every other flag of the released script, with a value that is not its default: where it acts.
FURTHER = {
    "--seed 3": ("run", "seed", 3),
    "--student_config_file configs/models/swin_tiny.yaml": (
        *("student", "student_config_file"),
        "configs/models/swin_tiny.yaml",
    ),
    "--num_workers 4": ("pools", "workers", 4),
    "--base_lr 1e-3": ("learn", "base_lr", 1e-3),
    "--warmup_lr 1e-5": ("learn", "warmup_lr", 1e-5),
    "--min_lr 1e-6": ("learn", "min_lr", 1e-6),
    "--epochs 7": ("learn", "epochs", 7),
    "--warmup_epochs 0.5": ("learn", "warmup_epochs", 0.5),
    "--t_vl 2": ("loss", "t_vl", 2.0),
    "--t_pvl 4": ("loss", "t_pvl", 4.0),
    "--t_udist 5": ("loss", "t_udist", 5.0),
    "--w_vl_loss 0.68": ("loss", "w_vl_loss", 0.68),
    "--w_pvl_loss 0.22": ("loss", "w_pvl_loss", 0.22),
    "--w_udist_loss 0.1": ("loss", "w_udist_loss", 0.1),
    "--use_udist_loss": ("loss", "use_udist_loss", True),
    "--print_freq 10": ("learn", "print_freq", 10),
    "--output_dir snapshots": ("place", "output_dir", "snapshots"),
    "--prefix again": ("place", "prefix", "again"),
}
DEFAULTS = {
    "run": {"seed": 0},
    "student": {"student": "vit_b_32"},
    "learn": {
        **{"base_lr": 8e-4, "warmup_lr": 4e-6, "min_lr": 4e-5, "epochs": 100, "warmup_epochs": 4.0},
        **{"print_freq": 100, "local_rank": -1, "weight_decay": 0.05},
    },
    "loss": {
        **{"t_vl": 1.0, "t_pvl": 3.0, "t_udist": 7.0, "w_vl_loss": 0.7, "w_pvl_loss": 0.3, "w_udist_loss": 0.0},
        **{"use_udist_loss": False, "pvl_mode": "rows2", "log_scale": 100.0},
    },
}
# run_multi.sh takes these variables; each is a flag.
EVALUATION = """
python eval.py --method dimefm --mode zeroshot linear_probe --ds caltech101 --ckpt snapshots/a/student.pt
--num_shots 5 --no-tuning --lr 0.05 --l2 1e-5 --init_head_with_text_encoder false
"""


def words(text: str, *more: str) -> list[str]:
    """What a command says after its script's name."""
    return shlex.split(text, comments=False)[2:] + [word for part in more for word in part.split()]


def parsed(verb: str, argv: list[str]):
    return parse(CONFIGS[verb], verb, argv)[0]


def test_the_training_command_is_taken_word_by_word():
    cfg = parsed("distill", ["--method", "dimefm", *words(TRAINING)])
    assert (cfg.learn.amp, cfg.loss.use_pvl_loss, cfg.learn.batches.batch_size) == (True, True, 640)
    assert (cfg.pools.dataroot, cfg.pools.tsv_file_list) == ("DATA", LISTS)
    assert idle_options(cfg) == []
    for part, values in DEFAULTS.items():
        assert {name: getattr(getattr(cfg, part), name) for name in values} == values


@pytest.mark.parametrize("flag", FURTHER)
def test_further_flags_of_the_script_act_where_they_say(flag, monkeypatch):
    monkeypatch.chdir(ROOT)
    extra = ["--w_udist_loss 0.1"] if flag == "--use_udist_loss" else []
    extra += ["--output_dir snapshots"] if flag.startswith("--prefix") else []
    section, name, value = FURTHER[flag]
    assert getattr(getattr(parsed("distill", words(TRAINING, flag, *extra)), section), name) == value


@pytest.mark.parametrize(("file", "name"), [("vitb32_large_language", "vit_b_32"), ("swin_tiny", "swin_t")])
def test_published_students_are_ours(file, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = parsed("distill", words(TRAINING, f"--student_config_file configs/models/{file}.yaml"))
    found, ours = student_spec(cfg.student), SPECS[name]
    assert (found.kind, found.image_size) == (
        ours.kind,
        ours.image_size,
    ) and ours.options.items() <= found.options.items()
    with torch.device("meta"):
        one, other = (build_student(spec, 768).state_dict() for spec in (found, ours))
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in other.items()}


def test_evaluation_has_the_names_of_the_script():
    cfg = parsed("eval", words(EVALUATION))
    assert cfg.judge.mode == ("zeroshot", "linear_probe") and cfg.data.names == ("caltech101",)
    probe = cfg.probe
    found = (probe.num_shots, probe.no_tuning, probe.lr, probe.l2, probe.init_head_with_text_encoder)
    assert found == (5, True, 0.05, 1e-5, False)
    assert cfg.judge.ckpt == "snapshots/a/student.pt" and idle_options(cfg) == []


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder with the lists, and data in the published layout: 40 images, 24 sentences, an untrained teacher's
    features of them."""
    root = tmp_path_factory.mktemp("published")
    for name in LISTS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text((ROOT / name).read_text())
    images, sentences = captioned_shapes("train", 40, 32)[0], shape_sentences(24)
    clip = load_clip("tiny", root / "cache")
    made: dict[str, list[tuple[str, bytes | str]]] = {
        "image": [(f"i{row}", image_payload(jpeg(image))) for row, image in enumerate(images)],
        "image_feat": [(f"i{row}", vector_payload(v.numpy())) for row, v in enumerate(clip.images(normalised(images)))],
        "text": [(f"t{row}", json.dumps({"captions": [text]})) for row, text in enumerate(sentences)],
        "text_feat": [(f"t{row}", vector_payload(v.numpy())) for row, v in enumerate(clip.texts(sentences))],
    }
    for name, records in made.items():
        path = root / "DATA" / (ROOT / f"configs/datalists/cc3m/{name}.list").read_text().strip()
        path.parent.mkdir(parents=True, exist_ok=True)
        with TsvWriter(path) as file:
            for key, payload in records:
                file.add(key, payload)
    return root


def jpeg(image: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0))).save(file, "JPEG", quality=95)
    return file.getvalue()


def test_the_training_command_runs_several_epochs_stops_and_goes_on(published, monkeypatch, capsys):
    """On small data with a small student: the same flags but for its name and the batch."""
    monkeypatch.chdir(published)
    small = "--batch_size 8 --student vit_tiny --epochs 3 --output_dir snapshots --held_out 0 --warmup_epochs 1"
    base = ["--method", "dimefm", *words(TRAINING, small, "--device cpu --num_workers 1")]
    assert command("distill", base) == 0
    whole = published / "snapshots" / "vit_tiny-ViT-L-14-b8-e3"
    assert [row["step"] for row in read_log(whole)] == [4, 9, 14]  # 40 images in batches of 8, logged at each epoch
    assert command("distill", base) == 2 and "already holds a run" in capsys.readouterr().err
    assert command("distill", [*base, "--prefix", "cut", "--steps", "7"]) == 0
    assert "7 of 15 steps are taken" in capsys.readouterr().out
    assert command("distill", [*base, "--prefix", "cut", "--resume"]) == 0
    cut = published / "snapshots" / "vit_tiny-ViT-L-14-b8-cut-e3"
    one, other = (load_student(folder / "student.pt")[0].state_dict() for folder in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_log(whole)[-1]["loss"] == read_log(cut)[-1]["loss"]


def test_what_was_trained_is_what_is_judged(published, monkeypatch):
    """The published program evaluates a random image tower instead. Scores from the file equal those in memory."""
    monkeypatch.chdir(published)
    flags = "--method dimefm --dataset toy --rows student --teacher tiny --device cpu --num_workers 1"
    small = "--batch_size 8 --student vit_tiny --epochs 2 --save_dir judged --held_out 0 --num_workers 1"
    command("distill", ["--method", "dimefm", *words(TRAINING, small, "--device cpu")])
    assert command("eval", [*flags.split(), "--ckpt", "judged", "--save_predictions"]) == 0
    (path,) = published.glob("judged/eval/*/predictions/*.json")
    found = torch.tensor(read_json(path, "predictions")["predictions"][0])
    net, clip = load_student(published / "judged" / "student.pt")[0], load_clip("tiny", published / "cache")
    images, _, _ = captioned_shapes("test", 0, 32)
    names = ("circle", "square", "triangle", "ring", "cross", "star")
    classes = F.normalize(clip.texts([f"a photo of a {name}." for name in names]), dim=1)
    with torch.no_grad():
        scores = 100 * F.normalize(net(normalised(images)), dim=1) @ classes.T
    torch.testing.assert_close(found, scores.softmax(1), atol=2e-6, rtol=0)
    assert contents(published / "judged")  # and nothing of it is gone


def test_the_seed_decides_the_first_weights(published, monkeypatch):
    """The released script never reads its seed."""
    monkeypatch.chdir(published)
    begun = []

    def learn(cfg, net, *rest):
        begun.append(net.state_dict()["projection"].clone())
        return Learned(0, 0, (), 0.0, 0, 0)

    monkeypatch.setattr(dimefm, "learn", learn)
    for number, seed in enumerate((3, 3, 4)):
        small = f"--batch_size 8 --student vit_tiny --save_dir seeds/{number} --seed {seed} --device cpu"
        assert command("distill", ["--method", "dimefm", *words(TRAINING, small)]) == 0
    assert torch.equal(begun[0], begun[1]) and not torch.equal(begun[0], begun[2])
