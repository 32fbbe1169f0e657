"""Small files of a run that its commands leave each other: notes of finished experts, inputs, progress, examples,
results, settings; and webdataset archives."""

from __future__ import annotations

import contextlib
import io
import tarfile
from types import SimpleNamespace

import yaml
from hypothesis import strategies as st
from PIL import Image

from data.image_pools import BadImage, ImagePool, open_image_shard
from data.text_pools import TextPool, open_text_shard
from methods import clip_gallery
from methods.core.expert_files import ExpertFiles
from methods.core.report import write_report
from methods.core.results import read_student, readable
from methods.core.store import TrajectoryStore
from methods.pair_experts import _check_frozen
from tests.fuzz.cases import changed, damaged, fuzz, json_files, outcome, trees

ENTRIES = [
    {"seed": 1, "epochs": [0, 1], "metrics": {"1": {"loss": 0.5}}, "digests": {"0": "a", "1": "b"}, "done": True},
    {"seed": 2, "epochs": [0], "metrics": {}, "digests": {}, "done": False},
]


@fuzz(800, 12, content=json_files({"experts": [0, 2], "entries": ENTRIES}))
def test_notes_of_finished_experts(scratch, content) -> None:
    """Any note of finished experts is taken into the manifest, or refused in one line."""
    for path in scratch.rglob("*.json"):
        path.unlink()
    store = TrajectoryStore.create(scratch, {"net": [("w", [2])]}, "float32", {})
    (scratch / "expert_000").mkdir(exist_ok=True)
    (scratch / "expert_000/finished.json").write_bytes(content)
    lines: list[dict] = []
    run = SimpleNamespace(
        folder=scratch,
        resumed=True,
        ranks=SimpleNamespace(first=True, world=2),
        log=lambda **row: lines.append(row),
        rewind=lambda step: None,
    )

    def main() -> None:
        files = ExpertFiles(store, run, 1)
        planned = {expert for company in files.plan(3, 2) for expert in company.experts}
        files.collect()
        done = {number for number, entry in enumerate(store.experts[:3]) if entry["done"]}
        assert planned | done == {0, 1, 2}

    rc, told = outcome(main)
    assert rc == 0 or "finished.json" in told
    TrajectoryStore.open(scratch)  # whatever came, the manifest is whole


@fuzz(300, 8, content=json_files({"text_encoder": "a" * 64, "frozen_image": "b" * 64, "training_set": "c"}))
def test_inputs_of_experts(scratch, content) -> None:
    """Any inputs.json of experts is compared with ours, or refused in one line."""
    (scratch / "inputs.json").write_bytes(content)
    rc, told = outcome(lambda: _check_frozen(scratch, {"text_encoder": "a" * 64, "frozen_image": None}))
    assert rc == 0 or str(scratch) in told


STUDENT = {"last": 40.0, "best": 41.5, "epoch": 3, "looks": 4, "images": 20, "protocol": {"protocol": "x", "about": ""}}


@fuzz(400, 8, content=json_files(STUDENT))
def test_results_of_a_student(scratch, content) -> None:
    """Any result of one student is taken for what it says, or refused in one line."""
    (scratch / "distilled.json").write_bytes(content)
    seen: list[dict] = []
    rc, told = outcome(lambda: seen.append(read_student(scratch / "distilled.json")))
    assert rc or 0 <= seen[0]["best"] + seen[0]["last"] <= 200
    assert rc == 0 or "distilled.json" in told


def png(side: int = 2) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


TOLD = [{"file": "examples/a-0.png", "text": "is a cat"}, {"file": "examples/a-1.png", "text": "is a dog"}]


EXAMPLES = st.one_of(json_files(TOLD), json_files({"format": 1, "examples": TOLD}))


@fuzz(500, 10, content=EXAMPLES, picture=st.one_of(st.just(png()), damaged(png())))
def test_examples(scratch, content, picture) -> None:
    """Any list of examples becomes pictures that are beside it, or is refused in one line."""
    folder = scratch / "eval/x"
    (folder / "examples").mkdir(parents=True, exist_ok=True)
    for number in (0, 1):
        (folder / f"examples/a-{number}.png").write_bytes(picture)
    (folder / "examples.json").write_bytes(content)
    seen: list = []
    if outcome(lambda: seen.append(clip_gallery._examples(scratch)))[0] == 0:
        assert all(pair.after_png == picture and isinstance(pair.after_text, str) for pair in seen[0])


def archive(ending: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("0", "a/1", "2"):
            member = tarfile.TarInfo(f"{name}.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue().rstrip(b"\0") + b"\0" * 1024


def headers(content: bytes) -> st.SearchStrategy:
    """Archives with a field of a header changed, and the header's checksum made to fit."""
    places = st.sampled_from(
        [place for place in range(0, len(content) - 512, 512) if content[place + 257 :][:5] == b"ustar"]
    )
    fields = st.sampled_from(
        [(0, 8), (100, 8), (124, 12), (136, 12), (156, 1), (157, 20), (257, 8), (329, 8), (345, 20)]
    )

    def put(place: int, field: tuple[int, int], value: bytes) -> bytes:
        start, size = field
        head = bytearray(content[place : place + 512])
        head[start : start + size] = value[:size].ljust(size, b"\0")
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        return content[:place] + bytes(head) + content[place + 512 :]

    odd = [
        b"77777777777",
        b"-1",
        b"\xff" * 12,
        b"\x80" + b"\0" * 10 + b"\x01",
        b"../x.png",
        b"/x",
        b"x",
        b"L",
        b"S",
        b"2",
    ]
    return st.builds(put, places, fields, st.one_of(st.sampled_from(odd), st.binary(max_size=12)))


def archives(ending: str, content: bytes) -> st.SearchStrategy:
    whole = archive(ending, content)
    return st.one_of(headers(whole), headers(whole), damaged(whole), st.just(whole))


@fuzz(1000, 16, content=archives("png", png()))
def test_archives_of_images(scratch, content) -> None:
    """Any archive is a pool of images or bad images, or refused in one line; what is read are bytes of the archive."""
    (scratch / "pool.tar").write_bytes(content)

    def main() -> None:
        pool = ImagePool([open_image_shard(scratch / "pool.tar", scratch / "cache")], "images")
        for row in range(len(pool)):
            shard, inner = pool.find(row)
            assert isinstance(pool.key(row), str) and shard.raw(inner) in content
            with contextlib.suppress(BadImage):
                pool.image(row)
        pool.fingerprint()

    outcome(main)
    assert {path.name for path in scratch.iterdir()} <= {"pool.tar", "cache"}


@fuzz(600, 8, content=archives("txt", b"a cat"))
def test_archives_of_texts(scratch, content) -> None:
    """Any archive is a pool of sentences, or refused in one line."""
    (scratch / "pool.tar").write_bytes(content)

    def main() -> None:
        pool = TextPool([open_text_shard(scratch / "pool.tar")], "texts")
        assert all(isinstance(pool.text(row), str) for row in range(len(pool)))

    outcome(main)


PROTOCOL = {"network": "student", "metric": "accuracy", "classes": 2, "data": "x", "protocol": "p", "about": "a"}
ROW = {
    "name": "student, x, zero-shot",
    "size": 12,
    "metrics": {"accuracy": {"mean": 50.0, "std": 1.0, "values": [49.0, 51.0]}},
    "protocol": PROTOCOL | {"notes": ["a note"], "n": 2},
}
CONFIG = {"num_shots": 5, "templates": "auto", "class_names": "auto", "no_tuning": False, "mode": ["zeroshot"]}
JUDGED = {"format": 1, "rows": [ROW], "config": CONFIG | {"elevater_compat": False}}


@fuzz(500, 8, content=json_files(JUDGED))
def test_results_on_a_page(scratch, content) -> None:
    """Any result.json of an evaluation of CLIPs becomes a table, or is refused in one line."""
    path = scratch / "eval/a/result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)

    def main() -> None:
        with readable(scratch):
            write_report(scratch, clip_gallery.clip_page(scratch, {}))

    rc, told = outcome(main)
    assert rc == 0 or "result.json" in told


def yaml_files(tree: object) -> st.SearchStrategy:
    written = st.one_of(changed(tree), changed(tree).flatmap(changed), trees)
    return st.one_of(
        written.map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode()),
        damaged(yaml.safe_dump(tree).encode()),
    )


SETTINGS = {"student": "vit_tiny", "teacher": "tiny", "batch_size": 8, "epochs": 1, "seed": 0}


@fuzz(300, 4, content=yaml_files({"method": "dimefm", "distill": SETTINGS}))
def test_settings_on_a_page(scratch, content) -> None:
    """Any config.yaml of a run that is judged becomes a page, or none, or is refused in one line."""
    (scratch / "config.yaml").write_bytes(content)
    outcome(lambda: clip_gallery.refresh_page(scratch))
