"""Pools of images, sentences and features: TSV files with lineidx and linelist, lines, JSON, and notes on features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from data.feature_files import Features, FeatureWriter
from data.payloads import caption_of, image_payload, vector_payload
from data.text_pools import TextPool, open_text_shard
from data.tsv import TsvFile, TsvWriter
from tests.fuzz.cases import damaged, fuzz, json_files, outcome, texts, trees, whole

RECORDS = [
    ("t0", b'{"captions": ["a cat", "cats"]}'),
    ("t1", b'"a dog"'),
    ("t2", b"plain"),
    ("t3", b'{"tags": ["owl"]}'),
]
TSV = b"".join(key.encode() + b"\t" + payload + b"\n" for key, payload in RECORDS)
INDEX = b"0\n35\n46\n55\n"
CLASSIFIED = {"task": "classification", "class_name": "owl"}


def clear(scratch: Path) -> None:
    for path in scratch.iterdir():
        if path.is_file():
            path.unlink()


payloads = st.one_of(texts.map(str.encode), st.binary(max_size=20), trees.map(lambda tree: json.dumps(tree).encode()))
records = st.lists(st.tuples(texts, payloads), max_size=5)


@fuzz(600, 12, rows=records, again=st.booleans())
def test_tsv_comes_back(scratch, rows, again) -> None:
    """Records that are written are read as they were, with the index and without; others are refused in one line."""
    clear(scratch)

    def main() -> None:
        with TsvWriter(scratch / "x.tsv") as writer:
            for key, payload in rows:
                writer.add(key, payload)
        if again:
            (scratch / "x.lineidx").unlink()
        file = TsvFile(scratch / "x.tsv")
        file.check()
        assert [file.pair(row) for row in range(len(file))] == rows

    rc, told = outcome(main)
    assert rc == 0 or "no TAB, CR or LF" in told or "CR LF" in told, told
    assert rc == 0 or any(sign in key.encode() + payload for key, payload in rows for sign in b"\t\r\n")


numbers = st.lists(st.one_of(st.integers(0, 60), whole), max_size=6).map(
    lambda found: "".join(f"{number}\n" for number in found).encode()
)


@fuzz(
    1000,
    20,
    content=damaged(TSV),
    index=st.one_of(st.none(), st.just(INDEX), damaged(INDEX), numbers, st.binary(max_size=9)),
    kept=st.one_of(st.none(), st.none(), damaged(b"0\n2\n"), numbers),
)
def test_tsv_files(scratch, content, index, kept) -> None:
    """Any TSV file, index and list of lines are read, or refused in one line; what is read are records of the file."""
    clear(scratch)
    (scratch / "t.tsv").write_bytes(content)
    for name, own in (("t.lineidx", index), ("t.linelist", kept)):
        if own is not None:
            (scratch / name).write_bytes(own)
    lines = content.split(b"\n")

    def main() -> None:
        file = TsvFile(scratch / "t.tsv")
        for row in range(len(file)):
            key, payload = file.pair(row)
            assert key.encode() + b"\t" + payload in lines
        file.check()
        if kept is None:
            assert len(file) == content.count(b"\n")

    outcome(main)
    outcome(lambda: read_texts(scratch / "t.tsv"))


def read_texts(path: Path) -> None:
    pool = TextPool([open_text_shard(path)], "texts")
    for row in range(len(pool)):
        assert isinstance(pool.text(row, 0.7), str)
    pool.fingerprint()


captions = st.one_of(
    trees.map(lambda tree: json.dumps(tree).encode()),
    st.dictionaries(st.sampled_from(["captions", "caption", "tags", "text", "task", "class_name"]), trees).map(
        lambda tree: json.dumps(tree).encode()
    ),
    payloads,
)


@fuzz(800, 16, rows=st.lists(captions, max_size=4), ending=st.sampled_from([".txt", ".jsonl", ".json"]))
def test_texts(scratch, rows, ending) -> None:
    """Any file of sentences is read, or refused in one line."""
    path = scratch / f"texts{ending}"
    path.write_bytes(b"[" + b",".join(rows) + b"]" if ending == ".json" else b"\n".join(rows))
    outcome(lambda: read_texts(path))


@fuzz(
    300,
    8,
    content=json_files([{"captions": ["a cat", "cats"]}, "a dog", CLASSIFIED]),
    ending=st.sampled_from([".json", ".jsonl"]),
)
def test_lists_of_texts(scratch, content, ending) -> None:
    """Any JSON of sentences is read, or refused in one line."""
    path = scratch / f"list{ending}"
    path.write_bytes(content)
    outcome(lambda: read_texts(path))


@fuzz(300, 8, text=texts.filter(str.strip), chance=st.floats(0, 1, exclude_max=True))
def test_a_caption_as_json_comes_back(scratch, text, chance) -> None:
    """A caption in any of its forms is the caption."""
    told = text.replace("[unused0]", "person")
    for form in (text, [text], {"captions": [text]}, {"caption": text}, {"text": text}):
        assert caption_of(json.dumps(form).encode(), chance) == told


NOTE = {"model": "m", "layer": "l", "normalised": True}
SIDECAR = NOTE | {"format": "npy", "dtype": "float32", "dim": 3, "count": 4, "digest": "a" * 64, "bad": [1]}
VALUES = np.arange(12, dtype=np.float32).reshape(4, 3)


def write_features(folder: Path, form: str, part: int | None = None) -> FeatureWriter:
    writer = FeatureWriter(folder, "f", 4, 3, NOTE, form, str)
    writer.add(VALUES[writer.done : part], [1] if writer.done == 0 else [])
    return writer


@fuzz(600, 12, content=json_files(SIDECAR), form=st.sampled_from(["npy", "tsv"]))
def test_notes_on_features(scratch, content, form) -> None:
    """Any note beside features is read, or refused in one line, by who reads them and by who would go on with them."""
    clear(scratch)
    write_features(scratch, form).finish()
    (scratch / "f.json").write_bytes(content)

    def main() -> None:
        found = Features([scratch / f"f.{form}"])
        assert (found.rows([0, 3]).numpy() == VALUES[[0, 3]]).all()
        assert found.bad <= set(range(4))
        found.fingerprint()

    outcome(main)
    outcome(lambda: FeatureWriter(scratch, "f", 4, 3, NOTE, form, str).close())


@fuzz(400, 8, content=json_files({"note": SIDECAR, "bad": [1]}), form=st.sampled_from(["npy", "tsv"]))
def test_notes_on_unfinished_features(scratch, content, form) -> None:
    """Any note on unfinished features is gone on with, or refused in one line."""
    clear(scratch)
    write_features(scratch, form, 2).close()
    (scratch / "f.unfinished.json").write_bytes(content)

    def main() -> None:
        writer = write_features(scratch, form)
        writer.finish()
        found = Features([scratch / f"f.{form}"])
        assert (found.rows(range(4)).numpy() == VALUES).all()

    outcome(main)


@fuzz(
    400,
    8,
    content=st.one_of(
        damaged(b"".join(f"{k}\t".encode() + vector_payload(VALUES[k]) + b"\n" for k in range(4))),
        damaged(b"0\t" + image_payload(b"123456") + b"\n"),
    ),
)
def test_features_in_tsv(scratch, content) -> None:
    """Any TSV file of features is read, or refused in one line."""
    clear(scratch)
    (scratch / "f.tsv").write_bytes(content)

    def main() -> None:
        found = Features([scratch / "f.tsv"])
        found.rows(range(len(found)))

    outcome(main)
