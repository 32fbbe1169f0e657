"""Files of the first formats are read for ever, those of a later toolkit are refused in one line."""

import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data.feature_files import Features
from data.pools import read_manifest
from data.zca import ZCA, fit_zca
from methods import clip_gallery
from methods.clip_inputs import noted_teacher, write_manifest
from methods.core import checkpoints, expert_files, outer, results, store, teachers
from methods.core.results import read_result
from methods.core.trajectories import open_trajectories
from methods.image_files import load_images
from methods.pair_files import read_phases
from methods.poster_files import load_poster
from methods.poster_order import load_order
from methods.prototype_files import Manifest, load_prototypes
from networks.clip_students import load_student
from utils import run
from utils.errors import UserError
from utils.files import VECTORS, load_tensors, save_tensors, save_vectors, write_json
from utils.run import read_inputs

FIRST = Path(__file__).parent / "golden" / "1"


def total(tensor):
    return float(tensor.detach().double().sum())


def near(value):
    return pytest.approx(value, rel=1e-6)


class TestOfTheFirstFormats:
    def test_trajectories(self):
        found = open_trajectories(FIRST / "experts", ("net",))
        assert found.count == 2 and found.epochs(1) == [0, 1]
        assert total(found.read(1, 1)["net"]) == near(3.78983021073509)
        assert found.shapes["net"][0][0] == "features.0.weight"

    def test_distilled_images(self):
        found = load_images([FIRST / "images_distilled.pt"])
        assert found.images.shape == (3, 3, 8, 8) and total(found.images) == near(9.53804212808609)
        assert found.labels.tolist() == [0, 1, 2] and found.lr == near(0.02)

    def test_distilled_pairs(self):
        (phase,), _ = read_phases(FIRST / "pairs_distilled.pt")
        assert len(phase) == 2 and phase.lr == {"img": near(0.1), "txt": near(0.1)}
        assert total(phase.state["image"]) == near(11.808329463005066)
        assert total(phase.state["text"]) == near(-2.3982909001060797)

    def test_distilled_poster(self):
        found = load_poster(FIRST / "poster_distilled.pt")
        assert found.poster.shape == (3, 10, 18) and total(found.poster) == near(2.460305204964243)
        assert found.meta["order"] == [[0, 1, 2]] and found.lr == near(0.001)

    def test_checkpoint(self):
        found = load_tensors(FIRST / "images_checkpoint.pt", "checkpoint")
        assert found["step"] == 1 and found["best"] == near(100 / 3) and "format" not in found

    def test_student(self):
        net, spec, note = load_student(FIRST / "student.pt")
        assert spec.name == "golden" and note == {"epochs": 1}
        assert sum(total(weight) for weight in net.parameters()) == near(34.30961381581801)

    def test_prototypes(self):
        found = load_prototypes(FIRST / "prototypes", "n01")
        assert found.texts == ["a fish"] and found.latents.flatten().tolist() == list(range(16))
        assert Manifest(FIRST / "prototypes").section("data") == {"images": 1}

    def test_order_whitening_result(self):
        assert load_order(FIRST / "order.json", ["0", "1", "2"]).grid.tolist() == [[0, 1, 2]]
        wanted = fit_zca(torch.arange(24.0).view(2, 3, 2, 2) / 24)
        assert torch.allclose(ZCA.load(FIRST / "zca.safetensors").matrix, wanted.matrix, atol=1e-3)
        assert [row["name"] for row in read_result(FIRST / "result.json")["rows"]] == ["random", "distilled"]

    def test_features_and_pools(self):
        found = Features([FIRST / "features.npy"])
        assert found.rows(np.array([1])).tolist() == [[3, 4, 5]] and found.note["bad"] == [1]
        assert read_manifest(FIRST / "pools.yaml")["images"] == ["toy:6:8"]
        assert noted_teacher(FIRST / "pools.yaml") == {"dim": 3}


def newer_json(path, key, version=2):
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: version}))


def newer_tensors(path, version=2):
    state = load_tensors(path, "state")
    state.get("meta", state)["format"] = version
    save_tensors(path, state)


@pytest.mark.parametrize(
    ("file", "change", "read"),
    [
        ("images_distilled.pt", newer_tensors, lambda path: load_images([path])),
        ("pairs_distilled.pt", newer_tensors, read_phases),
        ("poster_distilled.pt", newer_tensors, load_poster),
        (
            "experts/manifest.json",
            lambda path: newer_json(path, "version", 3),
            lambda path: open_trajectories(path.parent, ("net",)),
        ),
        (
            "prototypes/n01.json",
            lambda path: newer_json(path, "format"),
            lambda path: load_prototypes(path.parent, "n01"),
        ),
        (
            "prototypes/manifest.json",
            lambda path: newer_json(path, "format"),
            lambda path: Manifest(path.parent).section("data"),
        ),
        ("order.json", lambda path: newer_json(path, "format"), lambda path: load_order(path, ["0", "1", "2"])),
        ("result.json", lambda path: newer_json(path, "format"), read_result),
        ("features.json", lambda path: newer_json(path, "version"), lambda path: Features([path.with_suffix(".npy")])),
        ("student.pt", lambda path: newer_tensors(path, "clip student 2"), load_student),
        ("experts/inputs.json", lambda path: newer_json(path, "format"), lambda path: read_inputs(path.parent)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_newer_format_is_refused(tmp_path, file, change, read):
    shutil.copytree(FIRST, tmp_path / "1")
    change(tmp_path / "1" / file)
    with pytest.raises(UserError, match="update the toolkit") as caught:
        read(tmp_path / "1" / file)
    assert "\n" not in str(caught.value) and str(tmp_path / "1") in str(caught.value)


def test_a_newer_manifest_of_pools_or_whitening_is_refused(tmp_path, monkeypatch):
    write_manifest(tmp_path / "pools.yaml", {"images": ["toy"]}, {})
    tree = yaml.safe_load((tmp_path / "pools.yaml").read_text())
    (tmp_path / "pools.yaml").write_text(yaml.safe_dump(tree | {"format": tree["format"] + 1}))
    with pytest.raises(UserError, match="format 2, newer than this 1; update the toolkit"):
        read_manifest(tmp_path / "pools.yaml")
    monkeypatch.setattr("utils.files.VECTORS", VECTORS + 1)
    save_vectors(tmp_path / "zca.safetensors", {"mean": torch.zeros(3)})
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 2, newer than this 1; update the toolkit"):
        ZCA.load(tmp_path / "zca.safetensors")


class Learner:
    def state_dict(self):
        return {"x": torch.ones(2)}

    def load_state_dict(self, state):
        assert state.keys() == {"x"}


def test_states_of_a_newer_format_are_refused(tmp_path, monkeypatch):
    kept = checkpoints.Checkpoints(tmp_path, "student", 1, 0)
    kept.save(1, Learner())
    assert kept.restore(Learner()) == 1
    monkeypatch.setattr(checkpoints, "FORMAT", 0)
    with pytest.raises(UserError, match="format 1, newer than this 0; update the toolkit"):
        kept.restore(Learner())
    save_tensors(tmp_path / "progress.pt", {"format": expert_files.FORMAT + 1, "expert": 0, "epoch": 1})
    with pytest.raises(UserError, match=r"progress\.pt is of format 2, newer than this 1; update the toolkit"):
        expert_files._load(tmp_path / "progress.pt")
    write_json(tmp_path / "finished.json", {"format": expert_files.FORMAT + 1, "experts": [0, 1], "entries": []})
    with pytest.raises(UserError, match=r"finished\.json is of format 2, newer than this 1; update the toolkit"):
        expert_files._read_note(tmp_path / "finished.json", None)
    save_tensors(tmp_path / "teacher.pth", {"format": teachers.FORMAT + 1, "model": {}, "classes": ["a"]})
    with pytest.raises(UserError, match=r"teacher\.pth is of format 2, newer than this 1; update the toolkit"):
        teachers.load_teacher("resnet18", tmp_path / "teacher.pth", 32, ["a"])


def test_every_format_has_a_number_and_golden_files():
    """Whoever raises one of these adds a folder of golden files, and a class like the one above."""
    assert (store.FORMAT, VECTORS) == (2, 1)
    assert {part.FORMAT for part in (outer, checkpoints, clip_gallery, expert_files, results, run, teachers)} == {1}
    assert re.fullmatch(r"\d+", FIRST.name) and sum(file.stat().st_size for file in FIRST.rglob("*")) < 120_000


@pytest.mark.parametrize("kind", ["image", "pair", "poster"])
def test_a_page_of_a_damaged_result(tmp_path, kind):
    """Pages are drawn of files of the first formats; a result that lacks its protocol is told in one line."""
    for name in ("distilled_0.pt", "distilled_best.pt"):
        shutil.copy(FIRST / f"{kind}{'s' * (kind != 'poster')}_distilled.pt", tmp_path / name)
    refresh = importlib.import_module(f"methods.{kind}_gallery").refresh_page
    refresh(tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 1000
    row = read_result(FIRST / "result.json")["rows"][0] | {"protocol": {}}
    (tmp_path / "eval/a").mkdir(parents=True)
    (tmp_path / "eval/a/result.json").write_text(
        json.dumps({"rows": [row], "config": read_result(FIRST / "result.json")["config"]})
    )
    with pytest.raises(UserError, match=r"no page can be drawn of|is damaged") as caught:
        refresh(tmp_path)
    assert "\n" not in str(caught.value)
