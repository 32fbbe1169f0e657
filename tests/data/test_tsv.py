"""TSV files and their indexes: what is written, to the byte, and what is said of files damaged on their way."""

import contextlib
import json
import multiprocessing
import pickle
import threading

import numpy as np
import pytest

from data.byte_files import ByteFile, line_ends
from data.payloads import vector_payload
from data.tsv import TsvFile, TsvWriter
from utils.errors import UserError

VECTOR = np.array([1.0, -2.0, 0.5])


@pytest.fixture
def packed(tmp_path):
    """packed(*records) is the path of a TSV file of (key, payload), with its index."""

    def pack(*records):
        path = tmp_path / "text_00.tsv"
        with TsvWriter(path) as writer:
            for key, payload in records:
                writer.add(key, payload)
        return path

    return pack


def refused(work, *arguments):
    with pytest.raises(UserError) as caught:
        work(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def many(count=300):
    """Records of all lengths, some of them not ASCII."""
    return [(f"k{i}", "é" * (i * 7 % 90) or "{}") for i in range(count)]


# The bytes


def test_a_record_of_twenty_bytes_and_its_index(packed):
    path = packed(("k0", vector_payload(VECTOR)), ("k1", vector_payload(VECTOR)))
    assert path.read_bytes() == b"k0\tAACAPwAAAMAAAAA/\nk1\tAACAPwAAAMAAAAA/\n"
    assert path.with_suffix(".lineidx").read_bytes() == b"0\n20\n"


@pytest.mark.parametrize(
    ("payload", "length"),
    [
        (json.dumps({"captions": ["a cat"]}), 27),
        (json.dumps({"captions": ["café"]}, ensure_ascii=False), 27),
        (json.dumps({"captions": ["café"]}), 31),
    ],
)
def test_offsets_count_bytes(packed, payload, length):
    path = packed(("t0", payload), ("t1", "x"))
    assert path.with_suffix(".lineidx").read_bytes() == b"0\n%d\n" % length
    assert TsvFile(path).key(1) == "t1"


def test_the_index_has_the_name_without_its_last_ending(tmp_path):
    with TsvWriter(tmp_path / "image_00.feat.tsv") as writer:
        writer.add("k", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image_00.feat.lineidx", "image_00.feat.tsv"]


def test_what_is_written_is_read_in_any_order(packed):
    records = many()
    file = TsvFile(packed(*records))
    file.check()
    assert len(file) == len(records)
    for row in np.random.default_rng(0).permutation(len(records)).tolist():
        key, payload = records[row]
        assert file.record(row) == (key.encode(), payload.encode())
        assert file.pair(row) == (key, payload.encode())
    assert file.keys([5, 0, 299]) == ["k5", "k0", "k299"]
    with pytest.raises(IndexError):
        file.payload(len(records))


def test_a_key_longer_than_what_is_read_of_it_at_first(packed):
    file = TsvFile(packed(("k" * 1000, "x" * 1000), ("k", "x" * 1000)))
    assert file.keys([0, 1]) == ["k" * 1000, "k"]


def test_without_an_index_offsets_are_found(packed):
    path = packed(*many())
    known = TsvFile(path)
    path.with_suffix(".lineidx").unlink()
    found = TsvFile(path)
    assert [found.record(row) for row in range(len(found))] == [known.record(row) for row in range(len(known))]
    assert not path.with_suffix(".lineidx").exists()


def test_a_lone_carriage_return_within_a_record_is_data(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(b"a\tone\rtwo\nb\tx\n")
    path.with_suffix(".lineidx").write_bytes(b"0\n10\n")
    file = TsvFile(path)
    file.check()
    assert file.payload(0) == b"one\rtwo" and file.key(1) == "b"


def test_a_list_of_records_is_read_sorted_and_may_repeat_some(packed):
    path = packed(*many(5))
    path.with_suffix(".linelist").write_text("4\n1\n1\n")
    assert TsvFile(path).keys(range(3)) == ["k1", "k1", "k4"]
    path.with_suffix(".linelist").write_text("4\n5\n")
    assert "keeps record 5 of text_00.tsv, which has 5" in refused(TsvFile, path)


def test_no_records_are_a_file_too(packed):
    path = packed()
    assert path.read_bytes() == path.with_suffix(".lineidx").read_bytes() == b""
    TsvFile(path).check()
    assert len(TsvFile(path)) == 0


# The writer


@pytest.mark.parametrize("field", ["a\tb", "a\nb", "a\rb"])
def test_separators_do_not_go_into_fields(tmp_path, field):
    with TsvWriter(tmp_path / "x.tsv") as writer:
        assert "no TAB, CR or LF" in refused(writer.add, field, "x")
        assert "no TAB, CR or LF" in refused(writer.add, "x", field.encode())
        writer.add("k", "x")
    assert TsvFile(tmp_path / "x.tsv").keys([0]) == ["k"]


def test_a_writer_that_fails_leaves_what_was_there(packed, tmp_path):
    path = packed(("k0", "old"))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(KeyError), TsvWriter(path) as writer:
        writer.add("k0", "new and longer")
        raise KeyError
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_file_that_replaces_another_has_its_own_index(packed):
    packed(*many())
    assert TsvFile(packed(("k0", "new"))).record(0) == (b"k0", b"new")


def test_an_index_is_no_name_for_records(tmp_path):
    assert "end the name of a TSV file in .tsv" in refused(TsvWriter, tmp_path / "x.lineidx")


# Damage


def test_a_missing_file_and_a_folder(tmp_path):
    assert "no TSV file of texts at" in refused(TsvFile, tmp_path / "x.tsv", "TSV file of texts")
    (tmp_path / "y.tsv").mkdir()
    assert "is a folder" in refused(TsvFile, tmp_path / "y.tsv")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_truncated_file(packed, indexed):
    path = packed(*many())
    path.write_bytes(path.read_bytes()[:-5])
    if not indexed:
        path.with_suffix(".lineidx").unlink()
    assert "is truncated: its last record has no end; fetch it again" in refused(TsvFile, path)


def test_a_file_truncated_before_its_last_records(packed):
    path = packed(*many())
    starts = path.with_suffix(".lineidx").read_text().split()
    path.write_bytes(path.read_bytes()[: int(starts[200])])
    assert "is truncated: it has" in refused(TsvFile, path)


@pytest.mark.parametrize("indexed", [True, False])
def test_line_ends_changed_in_transfer(packed, indexed):
    path = packed(*many())
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    if not indexed:
        path.with_suffix(".lineidx").unlink()
    assert "lines that end in CR LF: it was transferred or saved as a text" in refused(TsvFile, path)


def test_line_ends_changed_together_with_the_index(packed):
    path = packed(*many())
    for file in (path, path.with_suffix(".lineidx")):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert "is not a list of offsets, a line each; remove it" in refused(TsvFile, path)


def test_an_index_that_counts_characters(packed):
    records = many()
    path = packed(*records)
    starts = np.cumsum([0] + [len(f"{key}\t{payload}\n") for key, payload in records])[:-1]
    path.with_suffix(".lineidx").write_text("".join(f"{start}\n" for start in starts))
    assert "does not fit text_00.tsv: no record is whole from byte" in refused(TsvFile, path)


@pytest.mark.parametrize(
    "index",
    [
        b"1\n20\n40\n",  # does not begin with the file
        b"0\n20\n20\n",  # the same twice
        b"0\n40\n20\n",  # backwards
        b"0\n20\n41\n",  # within a record
        b"0\n20\n",  # ends before the file
        b"",
    ],
)
def test_an_index_of_another_file(packed, index):
    path = packed(*[(f"k{i}", vector_payload(VECTOR)) for i in range(3)])
    path.with_suffix(".lineidx").write_bytes(index)
    assert "does not fit text_00.tsv" in refused(TsvFile, path)


@pytest.mark.parametrize("index", [b"0\n400000000000000000000000000000000000000\n", b"0\n60\n"])
def test_an_index_beyond_the_file(packed, index):
    path = packed(*[(f"k{i}", vector_payload(VECTOR)) for i in range(3)])
    path.with_suffix(".lineidx").write_bytes(index)
    assert "is truncated: it has 60 bytes" in refused(TsvFile, path)


def test_one_wrong_offset_among_many_is_found_by_the_whole_check_and_when_it_is_read(packed):
    path = packed(*[(f"k{i}", vector_payload(VECTOR)) for i in range(3000)])
    starts = path.with_suffix(".lineidx").read_text().split()
    for wrong in range(1, 2999):  # one that opening the file does not try
        changed = [*starts[:wrong], str(int(starts[wrong]) + 1), *starts[wrong + 1 :]]
        path.with_suffix(".lineidx").write_text("\n".join(changed))
        try:
            file = TsvFile(path)
            break
        except UserError:
            continue
    assert f"no record is whole from byte {changed[wrong]} on" in refused(file.check)
    assert "does not fit" in refused(file.record, wrong - 1)
    assert "does not fit" in refused(file.record, wrong)
    assert "does not fit" in refused(file.key, wrong)
    assert file.key(wrong + 1) == f"k{wrong + 1}"


@pytest.mark.parametrize(("line", "count"), [(b"k1", "1 field;"), (b"k1\tx\ty", "3 fields;")])
def test_a_record_of_too_few_or_too_many_fields(tmp_path, line, count):
    path = tmp_path / "x.tsv"
    path.write_bytes(b"k0\tx\n" + line + b"\nk2\tx\n")
    file = TsvFile(path)
    assert f"line 2 of {path} has {count}" in refused(file.check)
    assert f"line 2 of {path} has {count}" in refused(file.payload, 1)
    assert file.payload(2) == b"x"


def test_the_whole_check_goes_on_from_block_to_block(packed, monkeypatch):
    path = packed(*many(200))
    monkeypatch.setattr("data.byte_files._BLOCK", 7)
    TsvFile(path).check()
    path.with_suffix(".lineidx").unlink()
    file = TsvFile(path)
    file.check()
    assert file.key(199) == "k199"
    path.write_bytes(path.read_bytes().replace(b"k150\t", b"k150 "))
    assert "line 151 of" in refused(TsvFile(path).check)


def test_carriage_returns_of_a_few_lines_are_found_by_the_whole_check_and_when_they_are_read(tmp_path):
    path = tmp_path / "x.tsv"
    lines = [b"k\tx\n"] * 2000
    for line in range(1, 1999):  # one that opening the file does not try
        path.write_bytes(b"".join([*lines[:line], b"k\tx\r\n", *lines[line + 1 :]]))
        try:
            file = TsvFile(path)
            break
        except UserError:
            continue
    assert "end in CR LF" in refused(file.check)
    assert "end in CR LF" in refused(file.record, line)


def test_whatever_is_damaged_is_refused_or_read_as_it_stands(packed):
    """One byte of the file or of its index is dropped, doubled or changed, 400 times, and the slow obvious reader is
    asked what there is."""
    path = packed(*many(40))
    index = path.with_suffix(".lineidx")
    whole = path.read_bytes(), index.read_bytes()
    rng, refusals = np.random.default_rng(0), 0
    for turn in range(400):
        damaged = list(whole)
        content = bytearray(damaged[turn % 2])
        place, byte = int(rng.integers(len(content))), b"\n\r\tk1"[int(rng.integers(5))]
        content[place : place + 1] = [b"", content[place : place + 1] * 2, bytes([byte])][int(rng.integers(3))]
        damaged[turn % 2] = bytes(content)
        path.write_bytes(damaged[0]), index.write_bytes(damaged[1])
        there = [tuple(line.split(b"\t")) for line in damaged[0].split(b"\n")[:-1]]
        try:
            file = TsvFile(path)
            for row in range(len(file)):  # before all is checked, whole records come out or none
                with contextlib.suppress(UserError):
                    assert file.record(row) in there
            file.check()
        except UserError:
            refusals += 1
            continue
        assert damaged[0].endswith(b"\n") and [file.record(row) for row in range(len(file))] == there
    assert 250 < refusals < 400


def test_a_key_that_is_no_text(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(b"\xff\tx\n")
    assert f"the key in line 1 of {path} is not UTF-8" in refused(TsvFile(path).key, 0)


def test_a_file_that_shrinks_while_it_is_open(packed):
    path = packed(*many())
    file = TsvFile(path)
    with open(path, "r+b") as handle:
        handle.truncate(10)
    assert "became shorter while it was read" in refused(file.record, 200)


# Threads and processes


def test_threads_share_one_file(packed):
    records = many()
    file, wrong = TsvFile(packed(*records)), []

    def read(seed):
        for row in np.random.default_rng(seed).integers(len(records), size=2000).tolist():
            if file.pair(row) != (records[row][0], records[row][1].encode()):
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_process_reads_on_beside_its_parent(packed):
    records = many()
    file = TsvFile(packed(*records))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map_async(file.key, list(range(300)) * 4)
        here = [file.key(row) for row in range(300)]
        assert found.get(60) == here * 4 == [key for key, _ in records] * 4


def test_another_process_opens_the_file_anew(packed):
    file = TsvFile(packed(*many(5)))
    copy = pickle.loads(pickle.dumps(file))
    assert copy.file._descriptor != file.file._descriptor
    assert copy.record(3) == file.record(3)


def test_line_ends_are_those_of_lf_alone(tmp_path):
    path = tmp_path / "x"
    path.write_bytes("a\x85b\u2028c\rd\x0b\n\nlast".encode())
    assert line_ends(ByteFile(path)).tolist() == [12, 13]
