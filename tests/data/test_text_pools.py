"""Pools of sentences: the same ones from every kind of place, in any script, and lines that hold none."""

import io
import json
import pickle
import tarfile

import pytest

from data.pools import PoolsConfig, open_texts
from data.toy import captioned_shapes, shape_sentences
from data.tsv import TsvWriter
from utils.errors import UserError

SENTENCES = ["A cat.", "Ein Café, « zwei »\u2028drei.", "2012", "猫がいる。"]


@pytest.fixture
def place(tmp_path):
    """place(kind) is a file of the sentences."""

    def make(kind):
        path = tmp_path / f"texts.{kind}"
        if kind == "tsv":
            with TsvWriter(path) as writer:
                for row, sentence in enumerate(SENTENCES):
                    writer.add(f"t{row}", json.dumps({"captions": [sentence]}))
        elif kind == "txt":
            path.write_bytes("\n".join(SENTENCES).encode())
        elif kind == "json":
            path.write_text(json.dumps(SENTENCES))
        elif kind == "jsonl":
            lines = (json.dumps({"file_name": "0.png", "text": text}, ensure_ascii=False) for text in SENTENCES)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            with tarfile.open(path, "w") as archive:
                for row, sentence in enumerate(SENTENCES):
                    for ending, content in (("jpg", b"?"), ("txt", sentence.encode() + b"\n")):
                        member = tarfile.TarInfo(f"{row:03d}.{ending}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        return path

    return make


def opened(*paths, **options):
    return open_texts([str(path) for path in paths], PoolsConfig(**options))


def texts(pool):
    return [pool.text(row) for row in range(len(pool))]


def refused(work, *arguments, **options):
    with pytest.raises(UserError) as caught:
        work(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["tsv", "txt", "json", "jsonl", "tar"])
def test_the_same_sentences_from_every_place(place, kind):
    pool = opened(place(kind))
    assert texts(pool) == SENTENCES
    keys = {"tsv": ["t0", "t3"], "tar": ["000", "003"]}.get(kind, ["0", "3"])
    assert [pool.key(0), pool.key(3)] == keys
    copy = pickle.loads(pickle.dumps(pool))
    assert texts(copy) == SENTENCES and copy.fingerprint() == pool.fingerprint()


def test_places_end_to_end(place):
    pool = opened(place("txt"), place("tsv"))
    assert texts(pool) == SENTENCES * 2 and pool.counts == [4, 4]


def test_empty_lines_are_no_sentences(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n\n two \r\nx\n\n")
    pool = opened(path)
    assert texts(pool) == ["one", " two ", "x"]
    path.write_bytes(b"one\n\n\xff\n")
    pool = opened(path)
    assert pool.text(0) == "one"
    assert f"line 3 of {path} is not UTF-8" in refused(pool.text, 1)


def test_chance_picks_one_of_several_captions(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"captions": ["a", "b"]}, "c", {"caption": "d"}]))
    pool = opened(path)
    assert [pool.text(0, chance) for chance in (0, 0.4, 0.6)] == ["a", "a", "b"]
    assert [pool.text(row, 0.6) for row in (1, 2)] == ["c", "d"]


def test_sentences_of_the_toy_world_are_of_no_drawn_picture():
    pool = opened("toy", toy_texts=50)
    assert texts(pool) == shape_sentences(50) == shape_sentences(80)[:50]
    _, _, captions = captioned_shapes("train", 50, 16)
    assert texts(pool) != captions
    assert sum(a == b for a, b in zip(texts(pool), captions, strict=True)) < 5
    words = {word for text in texts(pool) for word in text.lower().strip(".").replace(",", "").split()}
    known = {
        word
        for text in captioned_shapes("train", 600, 16)[2]
        for word in text.lower().strip(".").replace(",", "").split()
    }
    assert words <= known


def test_lines_that_are_no_captions(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"caption": "a"}\nb\n{"label": 3}\n{"caption": "half \\ud83e"}\n')
    pool = opened(path)
    assert pool.text(0) == "a"
    assert f"line 2 of {path} is no caption: Expecting value" in refused(pool.text, 1)
    assert f"line 3 of {path} is no caption: it has none of captions" in refused(pool.text, 2)
    assert f"line 4 of {path} is no caption: it has half a character" in refused(pool.text, 3)
    with TsvWriter(tmp_path / "x.tsv") as writer:
        writer.add("k0", '{"label": 3}')
        writer.add("k1", b"\xff")
    pool = opened(tmp_path / "x.tsv")
    assert f"line 1 of {tmp_path / 'x.tsv'} is no caption" in refused(pool.text, 0)
    assert f"line 2 of {tmp_path / 'x.tsv'} is not UTF-8" in refused(pool.text, 1)


def test_there_are_no_texts(tmp_path):
    assert "there are no sentences; give --texts" in refused(opened)
    for kind in ("tsv", "txt", "json", "jsonl", "tar"):
        assert f"texts at {tmp_path / f'x.{kind}'}" in refused(opened, tmp_path / f"x.{kind}")
    (tmp_path / "x.txt").write_text("\n\n")
    assert "there are no texts in" in refused(opened, tmp_path / "x.txt")
    (tmp_path / "x.csv").touch()
    assert "do not end in .tsv, .txt, .json, .jsonl, .tar" in refused(opened, tmp_path / "x.csv")
    (tmp_path / "x.json").write_text("{}")
    assert "are a JSON dict, not a list" in refused(opened, tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[")
    assert "are not valid JSON" in refused(opened, tmp_path / "x.json")


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5000])
def test_a_line_that_json_gives_up_on(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line)
    try:
        opened(tmp_path / "x.jsonl").text(0)
    except UserError as told:
        assert "is no caption" in str(told)
