"""Make the golden files: one of every kind that the toolkit writes, tiny, as the code writes it today.

    python -m tests.golden.make FOLDER

Those in `tests/golden/1` are of the first formats and stay as they are: tests read them for ever. When a format
changes, run this once at the last commit before, keep what it makes as `tests/golden/<n>`, and add it to
tests/test_golden.py.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

DATA = ("--dataset", "npz", "--data_path", "data.npz", "--device", "cpu")
CLASSES = ("--model", "ConvNetD1W4", *DATA)
EXPERTS = ("--num_experts", "2", "--train_epochs", "1", "--batch_train", "8", "--lr_teacher", "0.05")
BEGUN = (
    *("--method", "mtt", *CLASSES, "--num_experts", "1", "--train_epochs", "2", "--batch_train", "8"),
    *("--lr_teacher", "0.05", "--buffer_path", "begun"),
)
LEARN = ("--syn_steps", "1", "--expert_epochs", "1", "--max_start_epoch", "1", "--lr_img", "1", "--lr_teacher", "0.02")
FEW = ("--iterations", "1", "--eval_it", "1", "--num_eval", "1", "--epoch_eval_train", "1")
POSTER = (
    *("--method", "podd", "--model", "ConvNetD1W4", *DATA, "--poster_width", "18", "--poster_height", "10"),
    *(
        "--patch_num_x",
        "4",
        "--patch_num_y",
        "2",
        "--poster_class_num_x",
        "3",
        "--poster_class_num_y",
        "1",
        "--order",
        "table",
        "--window",
        "1",
        "--totwindow",
        "2",
    ),
    *("--batch_size", "4", "--max_outer_steps", "1", "--test_freq", "1", "--num_eval", "1", "--eval_steps", "1"),
    *("--syn_strategy", "none", "--real_strategy", "none"),
)
PAIRS = (
    *("--dataset", "toy", "--toy_images", "60", "--image_size", "8", "--image_encoder", "ConvNetD1W4"),
    *("--joint_width", "8", "--text_encoder", "tfidf", "--device", "cpu"),
)
LEARN_PAIRS = ("--num_pairs", "2", "--syn_steps", "1", "--expert_epochs", "1", "--max_start_epoch", "1")


def write_data(path: Path) -> None:
    """Twelve images of 8 x 8 in three classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(12) % 3
    images = (rng.integers(0, 80, (12, 8, 8, 3)) + 80 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(path, train_images=images, train_labels=labels, test_images=images[:6], test_labels=labels[:6])


def make(target: Path) -> None:
    """Write all kinds below `target`, which must be new."""
    from methods.command import command

    def run(verb: str, *flags: str) -> None:
        assert command(verb, list(flags)) == 0, (verb, flags)

    target.mkdir(parents=True)
    write_data(Path("data.npz"))
    run("buffer", "--method", "mtt", *CLASSES, *EXPERTS, "--buffer_path", "experts")
    run(
        "distill",
        "--method",
        "mtt",
        *CLASSES,
        *LEARN,
        *FEW,
        "--ipc",
        "1",
        "--buffer_path",
        "experts",
        "--save_dir",
        "images",
    )
    places = ("--distilled", "images/distilled_best.pt", "--save_dir", "judged")
    run("eval", "--method", "mtt", *CLASSES, "--num_eval", "1", "--epoch_eval_train", "1", *places)
    run("distill", *POSTER, "--save_dir", "poster")
    run("buffer", *PAIRS, *EXPERTS[:4], "--buffer_path", "pair_experts")
    run("distill", *PAIRS, *LEARN_PAIRS, *FEW, "--buffer_path", "pair_experts", "--save_dir", "pairs")
    (store,) = {path.parent for path in Path("experts").rglob("manifest.json")}
    shutil.copytree(store, target / "experts", ignore=shutil.ignore_patterns("*.jsonl", "config.yaml"))
    for made in (
        "images/distilled_best.pt",
        "images/checkpoint.pt",
        "pairs/distilled_best.pt",
        "poster/distilled_best.pt",
    ):
        kind, name = made.split("/")
        shutil.copy(made, target / f"{kind}_{name}".replace("_best", ""))
    make_begun(target)
    shutil.copy("poster/order.json", target / "order.json")
    shutil.copy("judged/result.json", target / "result.json")
    make_others(target)


def make_begun(target: Path) -> None:
    """A run of buffer.py that was killed after the first of its expert's two epochs: `progress.pt` and what is beside
    it, for `buffer.py *BEGUN --resume`."""
    from methods.command import command
    from methods.core.expert_files import ExpertFiles

    save = ExpertFiles.save

    def killed(self: ExpertFiles, *state: object) -> None:
        save(self, *state)
        raise KeyboardInterrupt

    ExpertFiles.save = killed
    try:
        assert command("buffer", list(BEGUN)) == 130
    finally:
        ExpertFiles.save = save
    shutil.copytree("begun", target / "begun", ignore=shutil.ignore_patterns(".*"))


def make_others(target: Path) -> None:
    """What is of networks too large for a golden file: prototypes, features, a student, by the functions that write."""
    from data.feature_files import FeatureWriter
    from data.zca import fit_zca
    from methods.clip_inputs import write_manifest
    from methods.prototype_files import Manifest, Prototypes, save_prototypes
    from networks.clip_students import StudentSpec, build_student, student_state
    from utils.files import save_tensors
    from utils.rng import seeded

    fit_zca(torch.arange(24.0).view(2, 3, 2, 2) / 24).save(target / "zca.safetensors")
    latents = torch.arange(16.0).view(1, 4, 2, 2)
    save_prototypes(
        target / "prototypes", Prototypes("n01", "tench", latents, ["a fish"], files=["n01/a.png"], clusters=[0])
    )
    Manifest(target / "prototypes").record("data", images=1)
    features = FeatureWriter(target, "features", 2, 3, {"model": "none"})
    features.add(np.arange(6, dtype=np.float32).reshape(2, 3), bad=[1])
    features.finish()
    write_manifest(target / "pools.yaml", {"images": ["toy:6:8"], "image_feats": ["features.npy"]}, {"dim": 3})
    spec = StudentSpec("golden", "vit", 8, {"width": 8, "layers": 1, "heads": 1, "patch_size": 8})
    with seeded(0):
        save_tensors(target / "student.pt", student_state(build_student(spec, 4), spec, {"epochs": 1}))


if __name__ == "__main__":
    folder = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        make(folder)
