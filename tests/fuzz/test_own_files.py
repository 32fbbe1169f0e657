"""JSON and YAML files of our own, as they are found again: manifests, prototypes, orders, logs, results, runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import yaml
from hypothesis import strategies as st

from data.catalogue import Catalogue, Kind
from methods.core.results import as_row, recorded_rows, write_result
from methods.core.store import TrajectoryStore
from methods.poster_order import Order, load_order
from methods.prototype_captions import CaptionConfig, _read_family, ask
from methods.prototype_files import (
    Manifest,
    Prototypes,
    export_published,
    import_published,
    load_prototypes,
    save_prototypes,
)
from methods.vldd import Distill
from tests.fuzz.cases import changed, damaged, fuzz, json_files, numbers, outcome, texts, trees
from utils.config import dump
from utils.files import read_json, write_json
from utils.run import Run, read_log

CLASSES = ("cat", "dog", "owl", "pig")


def clear(scratch: Path) -> None:
    for path in sorted(scratch.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


MANIFEST = {
    "version": 1,
    "shapes": {"img": [["w", [2, 3]], ["b", [2]]], "txt": [["w", [4]]]},
    "dtype": "float32",
    "config": {"image_encoder": "x"},
    "experts": [
        {"seed": 1, "epochs": [0, 1], "metrics": {"1": {"loss": 0.5}}, "done": True},
        {"seed": 2, "epochs": [0], "metrics": {}, "done": False},
    ],
}


@fuzz(800, 16, content=json_files(MANIFEST))
def test_trajectory_manifests(scratch, content) -> None:
    """Any manifest of trajectories is read, or refused in one line, and so is every snapshot that it names."""
    folder = scratch / "buffers"
    if not (folder / "expert_001").is_dir():
        shapes = {group: [(name, shape) for name, shape in parts] for group, parts in MANIFEST["shapes"].items()}
        store = TrajectoryStore.create(folder, shapes, "float32", {})
        for expert, epoch in ((0, 0), (0, 1), (1, 0)):
            store.add(expert, epoch, {"img": torch.ones(8), "txt": torch.ones(4)}, 1, {})
    (folder / "manifest.json").write_bytes(content)

    def main() -> None:
        store = TrajectoryStore.open(folder)
        for expert in range(store.count):
            for epoch in store.epochs(expert):
                store.check(expert, epoch)
                found = store.read(expert, epoch)
                assert all(vector.isfinite().all() for vector in found.values())

    outcome(main)


NOTED = {"format": 1, "data": {"dataset": "toy", "nclass": 0}, "prototypes": {"classes": ["cat"], "ipc": 2}}


@fuzz(400, 8, content=json_files(NOTED), values=st.dictionaries(texts, trees, max_size=2))
def test_manifests_of_stages(scratch, content, values) -> None:
    """Any manifest of stages is read and added to, or refused in one line; what is added is read again."""
    (scratch / "manifest.json").write_bytes(content)

    def main() -> None:
        manifest = Manifest(scratch)
        manifest.section("data").get("dataset")
        manifest.record("images", **values)
        found = manifest.section("images")
        assert json.dumps([found[name] for name in values]) == json.dumps(list(values.values()))

    outcome(main)


def prototypes(texts_: list[str]) -> Prototypes:
    latents = torch.arange(len(texts_) * 16.0).view(-1, 4, 2, 2) / 3
    files = [f"cat/{number}.png" for number in range(len(texts_))]
    words = [[("red", 3)] for _ in texts_]
    return Prototypes("cat", "cat", latents, texts_, files, words, files, list(range(len(files))), files, "a" * 64)


ONE = {name: value for name, value in vars(prototypes(["a cat", "a red cat"])).items() if name != "latents"}


@fuzz(600, 12, content=json_files({"format": 1, **ONE}))
def test_prototypes(scratch, content) -> None:
    """Any JSON of prototypes is read, or refused in one line."""
    save_prototypes(scratch, prototypes(["a cat", "a red cat"]))
    (scratch / "cat.json").write_bytes(content)

    def main() -> None:
        found = load_prototypes(scratch, "cat")
        assert all(isinstance(text, str) for text in found.texts)
        assert len(found.members) == len(found.sizes) == len(found.texts)
        assert len(found.inliers) == len(found.files)

    outcome(main)


@fuzz(300, 8, captions=st.lists(texts, min_size=1, max_size=3))
def test_prototypes_come_back(scratch, captions) -> None:
    """Prototypes are read as they were written, by us and as published, where an empty caption becomes the label."""
    clear(scratch)
    written = prototypes(captions)
    save_prototypes(scratch, written)
    found = load_prototypes(scratch, "cat")
    assert found.texts == captions and torch.equal(found.latents, written.latents)
    files = export_published(scratch, [written], "x", len(captions), 0.7, 30, 1)
    (one,) = import_published(*files, catalogue(("cat",)), len(captions))
    assert one.texts == [text.strip() or "cat" for text in captions] and torch.equal(one.latents, written.latents)


def catalogue(names: tuple[str, ...] = CLASSES) -> Catalogue:
    files = tuple((f"{name}/1.png", f"{name}/2.png") for name in names)
    return Catalogue("x", "folder", tuple(Kind(name, name) for name in names), Path(), Path(), files, (), "", "", 1)


LATENT = [[[0.5, 1.0], [2.0, 3.0]]] * 4
PUBLISHED = {"cat": [LATENT, LATENT], "dog": [LATENT]}, {"cat": ["a", "b"], "dog": ["c"]}


@fuzz(
    600,
    12,
    images=st.one_of(json_files(PUBLISHED[0]), st.just(json.dumps(PUBLISHED[0]).encode())),
    captions=st.one_of(json_files(PUBLISHED[1]), st.just(json.dumps(PUBLISHED[1]).encode())),
)
def test_published_prototypes(scratch, images, captions) -> None:
    """Any two files of published prototypes are read, or refused in one line; what is read is finite."""
    (scratch / "i.json").write_bytes(images)
    (scratch / "t.json").write_bytes(captions)

    def main() -> None:
        for one in import_published(scratch / "i.json", scratch / "t.json", catalogue(("cat", "dog")), 2):
            assert one.latents.isfinite().all() and len(one.texts) == len(one.latents)

    outcome(main)


ORDER = {"encoder": "x", "rows": 2, "columns": 2, "grid": [[0, 1], [3, 2]], "names": [["cat", "dog"], ["pig", "owl"]]}


@fuzz(500, 10, content=json_files(ORDER))
def test_orders(scratch, content) -> None:
    """Any order.json is read, or refused in one line; what is read has each class once, and is written the same."""
    (scratch / "order.json").write_bytes(content)

    def main() -> None:
        order = load_order(scratch / "order.json", CLASSES)
        assert sorted(order.grid.flatten().tolist()) == [0, 1, 2, 3]
        order.save(scratch / "again.json", CLASSES)
        again = load_order(scratch / "again.json", CLASSES)
        assert torch.equal(again.grid, order.grid) and again.encoder == order.encoder

    outcome(main)


@fuzz(200, 5, names=st.lists(texts, min_size=4, max_size=4), encoder=texts, grid=st.permutations(range(4)))
def test_orders_come_back(scratch, names, encoder, grid) -> None:
    """An order is read as it was written, whatever classes are called."""
    Order(torch.tensor(grid).view(2, 2), encoder, "made").save(scratch / "order.json", names)
    found = load_order(scratch / "order.json", names)
    assert found.grid.flatten().tolist() == list(grid) and found.encoder == encoder


ROWS = [{"step": step, "loss": 1.0 / (step + 1), "lr": 0.1} for step in range(4)]
LOG = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
log_lines = st.lists(st.one_of(st.sampled_from(ROWS), changed(ROWS[0]), trees).map(json.dumps), max_size=4)


@fuzz(
    600,
    12,
    content=st.one_of(damaged(LOG), log_lines.map(lambda rows: "\n".join(rows).encode())),
    step=st.integers(0, 5),
)
def test_logs(scratch, content, step) -> None:
    """Any log.jsonl is read and rewound, or refused in one line; a log of ours cut short loses no whole line."""
    clear(scratch)
    run = Run(scratch, Distill(), "distill", "--save_dir")
    (scratch / "log.jsonl").write_bytes(content)
    seen: list[list[dict[str, float]]] = []

    def main() -> None:
        run.rewind(step)
        seen.append(read_log(scratch))
        assert all(row["step"] < step for row in seen[0])

    outcome(main)
    if LOG.startswith(content):
        whole = sum(
            line.rstrip(b"\n") == row for line, row in zip(content.splitlines(True), LOG.splitlines(), strict=False)
        )
        assert seen and seen[0] == [row for row in ROWS[:whole] if row["step"] < step]


@fuzz(
    400,
    8,
    content=st.one_of(
        json_files({"data": "a" * 64}),
        damaged(dump(Distill(), "distill", "vldd").encode()),
        changed(yaml.safe_load(dump(Distill(), "distill", "vldd"))).map(lambda tree: yaml.safe_dump(tree).encode()),
    ),
    name=st.sampled_from(["config.yaml", "inputs.json"]),
)
def test_run_folders(scratch, content, name) -> None:
    """A run folder with any config.yaml or inputs.json is gone on with, or refused in one line."""
    clear(scratch)
    cfg = Distill()
    object.__setattr__(cfg.run, "resume", True)
    Run(scratch, cfg, "distill", "--save_dir").pin(data="a" * 64)
    (scratch / "log.jsonl").write_text("")
    (scratch / name).write_bytes(content)
    outcome(lambda: Run(scratch, cfg, "distill", "--save_dir").pin(data="a" * 64))


ROW = {"name": "distilled", "size": 8, "metrics": {"acc": {"mean": 1.0, "std": 0.5, "values": [1.0]}}, "protocol": {}}


@fuzz(500, 10, content=json_files({"rows": [ROW], "config": {"protocol": "x"}}))
def test_results(scratch, content) -> None:
    """Any result.json of an earlier evaluation is shown, or refused in one line."""
    path = scratch / "eval" / "a" / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    outcome(lambda: [as_row(record) for record in recorded_rows(scratch, lambda config: str(config.get("protocol")))])


@fuzz(300, 8, value=st.dictionaries(texts, trees))
def test_results_come_back(scratch, value) -> None:
    """A config is in result.json as it was, and an earlier result stays."""
    path = write_result(scratch / "eval", [], value)
    comes_back(path, {"config": value})
    path.unlink()


@fuzz(300, 8, value=trees)
def test_json_comes_back(scratch, value) -> None:
    """A JSON value is read as it was written."""
    write_json(scratch / "x.json", value)
    comes_back(scratch / "x.json", value)


def comes_back(path: Path, value: object) -> None:
    """What a JSON file holds is this, at least; only NaN and infinity, which are no JSON, are refused."""
    seen: list[object] = []
    rc, told = outcome(lambda: seen.append(read_json(path, "value")))
    if rc:
        assert "number" in told and any(word in json.dumps(value) for word in ("NaN", "Infinity")), told
    else:
        found = {name: seen[0][name] for name in value} if path.name == "result.json" else seen[0]
        assert json.dumps(found) == json.dumps(value)


ASKED = [
    {"question_id": k, "image": f"{name}/{i}.png", "text": "what?"}
    for k, (name, i) in enumerate((name, i) for name in CLASSES for i in (1, 2))
]
ANSWERS = [{"question_id": 0, "prompt": "what?", "text": "a cat", "metadata": {"image": "cat/1.png"}}]


def json_lines(rows: list[dict]) -> st.SearchStrategy:
    return st.one_of(
        changed(rows).map(lambda tree: "\n".join(map(json.dumps, tree if isinstance(tree, list) else [tree])).encode()),
        damaged("\n".join(map(json.dumps, rows)).encode()),
        json_files(rows),
    )


@fuzz(600, 12, questions=json_lines(ASKED), answers=json_lines(ANSWERS))
def test_questions_and_answers(scratch, questions, answers) -> None:
    """Any file of questions, and any log of answers, is read, or refused in one line."""
    (scratch / "questions.jsonl").write_bytes(questions)
    (scratch / "answers.jsonl").write_bytes(answers)

    def main() -> None:
        asked = ask(CaptionConfig(question_file=str(scratch / "questions.jsonl")), catalogue())
        assert sorted(question.file for question in asked) == sorted(row["image"] for row in ASKED)

    outcome(main)
    known = ask(CaptionConfig(caption_prompt="what?"), catalogue())
    outcome(lambda: _read_family(scratch / "answers.jsonl", known))


@fuzz(200, 5, values=st.lists(numbers, max_size=5))
def test_logged_numbers_come_back(scratch, values) -> None:
    """Numbers are in the log as they were, NaN and infinity too."""
    clear(scratch)
    run = Run(scratch, Distill(), "distill", "--save_dir")
    for step, value in enumerate(values):
        run.log(step, value=value)
    found = [row["value"] for row in read_log(scratch)]
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(found, values, strict=True))
