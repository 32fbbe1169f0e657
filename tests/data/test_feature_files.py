"""Files of features: written in pieces, killed in between, and read in any order."""

import os
import pickle

import numpy as np
import pytest
import torch

from data.feature_files import Features, FeatureWriter
from data.payloads import vector_payload
from data.tsv import TsvFile, TsvWriter
from tests.conftest import contents, rewrite
from utils.errors import RunError, UserError
from utils.files import file_digest, read_json

NOTE = {"model": "tiny", "layer": "projection", "normalised": False, "pool": "p", "keys": "k"}
FORMS = ("npy", "tsv")


def refused(work, *arguments, kind=UserError, **options):
    with pytest.raises(kind) as caught:
        work(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numbers(count, dim=5, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def key(row):
    return f"clé {row}"


def writer(folder, count, form="npy", note=NOTE, dim=5):
    return FeatureWriter(folder, "image_00.feat", count, dim, note, form, key)


def written(folder, rows, form="npy", note=NOTE, bad=()):
    made = writer(folder, len(rows), form, note, rows.shape[1])
    made.add(rows, bad)
    return made.finish()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_in_any_order(tmp_path, form):
    rows = numbers(300)
    path = written(tmp_path, rows, form)
    features = Features([path])
    assert (len(features), features.dim, features.bad) == (300, 5, frozenset())
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    found = features.rows(order)
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), rows[order])
    assert features.rows(torch.tensor([7, 7])).tolist() == [rows[7].tolist()] * 2
    assert features.rows([]).shape == (0, 5)
    assert features.key(3) == (key(3) if form == "tsv" else None)
    with pytest.raises(IndexError):
        features.rows([300])
    with pytest.raises(IndexError):
        features.rows([-1])


def test_a_plain_array_is_what_numpy_opens(tmp_path):
    rows = numbers(10)
    path = written(tmp_path, rows)
    opened = np.load(path, mmap_mode="r")
    assert opened.dtype == np.float32 and np.array_equal(opened, rows)
    np.save(tmp_path / "same.npy", rows)
    assert path.read_bytes() == (tmp_path / "same.npy").read_bytes()


def test_a_tsv_file_is_what_the_writer_of_records_makes(tmp_path):
    rows = numbers(10)
    path = written(tmp_path / "a", rows, "tsv")
    with TsvWriter(tmp_path / "b.tsv") as other:
        for row, vector in enumerate(rows):
            other.add(key(row), vector_payload(vector))
    assert path.read_bytes() == (tmp_path / "b.tsv").read_bytes()
    assert path.with_suffix(".lineidx").read_bytes() == (tmp_path / "b.lineidx").read_bytes()
    TsvFile(path).check()


@pytest.mark.parametrize("form", FORMS)
def test_the_sidecar_tells_what_the_numbers_are(tmp_path, form):
    path = written(tmp_path, numbers(10), form, bad=[2, 7])
    made = {"format": form, "dtype": "float32", "dim": 5, "count": 10, "digest": file_digest(path), "bad": [2, 7]}
    made = {"version": 1} | made
    assert read_json(path.with_suffix(".json"), "") == NOTE | made
    assert Features([path]).note == NOTE | made
    names = {"image_00.feat.json", f"image_00.feat.{form}"} | ({"image_00.feat.lineidx"} if form == "tsv" else set())
    assert {file.name for file in tmp_path.iterdir()} == names


def test_half_precision_halves_the_file(tmp_path):
    rows = numbers(1000)
    path = written(tmp_path, rows, note=NOTE | {"dtype": "float16"})
    assert path.stat().st_size == 128 + 1000 * 5 * 2
    assert np.array_equal(Features([path]).rows(range(1000)).numpy(), rows.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("torn", [0, 1, 13])
def test_a_killed_writer_goes_on_behind_its_last_whole_row(tmp_path, form, torn):
    rows = numbers(30)
    whole = contents(written(tmp_path / "whole", rows, form, bad=[3, 12, 25]).parent)
    first = writer(tmp_path / "killed", 30, form)
    first.add(rows[:10], [3])
    first.add(rows[10:20], [2])
    first.close()
    part = tmp_path / "killed" / f"image_00.feat.unfinished.{form}"
    with open(part, "r+b") as file:
        file.truncate(part.stat().st_size - torn)
    second = writer(tmp_path / "killed", 30, form)
    assert second.done == (19 if torn else 20) and second.bad == {3, 12}
    second.add(rows[second.done : 25])
    second.add(torch.from_numpy(rows[25:]), [0])
    second.finish()
    assert contents(tmp_path / "killed") == whole


@pytest.mark.parametrize("form", FORMS)
def test_a_writer_killed_before_its_sidecar_only_writes_that(tmp_path, form, monkeypatch):
    rows = numbers(10)
    whole = contents(written(tmp_path / "whole", rows, form, bad=[3]).parent)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("data.feature_files.file_digest", killed)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "killed", rows, form, bad=[3])
    monkeypatch.undo()
    again = writer(tmp_path / "killed", 10, form)
    assert again.done == 10
    again.finish()
    assert contents(tmp_path / "killed") == whole


@pytest.mark.parametrize("form", FORMS)
def test_what_is_finished_is_not_written_again(tmp_path, form):
    path = written(tmp_path, numbers(10), form, bad=[3])
    before = contents(tmp_path)
    again = writer(tmp_path, 10, form)
    assert (again.done, again.bad) == (10, {3})
    assert again.finish() == path
    assert contents(tmp_path) == before


@pytest.mark.parametrize("at", [1, 9, 30, 68])  # in the magic, the header's length, its type and its shape
def test_a_damaged_beginning_of_unfinished_features(tmp_path, at):
    first = writer(tmp_path, 10)
    first.add(numbers(10)[:4])
    first.close()
    good = first.part.read_bytes()
    first.part.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(UserError, match=rf"unfinished features {first.part} are damaged; restore them, or remove it"):
        writer(tmp_path, 10)
    first.part.unlink()
    assert writer(tmp_path, 10).done == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_bit_is_never_a_feature(tmp_path, form):
    path = written(tmp_path, numbers(10), form, bad=[3])
    good, whole = path.read_bytes(), contents(tmp_path)
    assert len(Features([path])) == 10
    at = len(good) - 9  # within the last row, which stays finite
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    for use in (lambda: Features([path]), lambda: writer(tmp_path, 10, form)):
        with pytest.raises(UserError, match=rf"features {path} are damaged \(not what the digest in .*json says\)"):
            use()
    path.unlink()
    path.with_suffix(".json").unlink()
    written(tmp_path, numbers(10), form, bad=[3])  # as the line says
    assert contents(tmp_path) == whole and len(Features([path])) == 10


def test_a_file_is_gone_through_once(tmp_path, monkeypatch):
    path, seen = written(tmp_path, numbers(10)), []
    monkeypatch.setattr("data.feature_files.file_digest", lambda path: seen.append(path) or file_digest(path))
    Features([path]), Features([path]), pickle.loads(pickle.dumps(Features([path])))
    assert seen == [path]
    os.utime(path)
    Features([path])
    assert seen == [path, path]
    path.with_suffix(".json").unlink()  # a published file has no note
    Features([path])
    assert len(seen) == 2


@pytest.mark.parametrize("told", [[], 3, "half", {}])
def test_a_digest_that_is_none(tmp_path, told):
    path = written(tmp_path, numbers(10))
    rewrite(path.with_suffix(".json"), lambda note: note | {"digest": told})
    with pytest.raises(UserError, match="not what the digest in"):
        Features([path])


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"note": NOTE | {"model": "other"}}, "its model is tiny, now it is other"),
        ({"note": NOTE | {"dtype": "float16"}}, "its dtype is float32, now it is float16"),
        ({"count": 11}, "its count is 10, now it is 11"),
        ({"dim": 6}, "its dim is 5, now it is 6"),
    ],
)
def test_another_note_is_refused(tmp_path, finished, change, said):
    made = writer(tmp_path, 10)
    made.add(numbers(10))
    made.finish() if finished else made.close()
    text = refused(writer, **({"folder": tmp_path, "count": 10} | change))
    assert said in text and "choose another folder" in text


def test_rows_that_do_not_fit_are_an_error_of_ours(tmp_path):
    made = writer(tmp_path, 10)
    for rows in (numbers(11), numbers(3, dim=4), numbers(3)[0]):
        with pytest.raises(ValueError, match="is not some rows of 5, 10 at most"):
            made.add(rows)
    with pytest.raises(ValueError, match="0 of 10 rows"):
        made.finish()


def test_features_that_are_not_finite_are_not_written(tmp_path):
    rows = numbers(4)
    rows[2, 1] = np.nan
    assert "row 2 of the features for" in refused(writer(tmp_path, 10).add, rows, kind=RunError)
    half = writer(tmp_path / "half", 10, note=NOTE | {"dtype": "float16"})
    assert "is not finite as float16" in refused(half.add, numbers(4) * 1e6, kind=RunError)


def test_an_unknown_form(tmp_path):
    assert "are not written as 'csv'; choose from npy, tsv" in refused(writer, tmp_path, 10, "csv")


# Reading


@pytest.fixture
def shards(tmp_path):
    """Three files of 4, 1 and 6 rows, one of them without a sidecar; and all their rows."""
    rows = numbers(11)
    paths = [
        written(tmp_path / "a", rows[:4], "npy", bad=[1]),
        written(tmp_path / "b", rows[4:5], "tsv"),
        tmp_path / "c.npy",
    ]
    np.save(paths[2], rows[5:])
    return paths, rows


def test_files_are_read_end_to_end(shards):
    paths, rows = shards
    features = Features(paths)
    assert len(features) == 11 and features.counts == [4, 1, 6] and features.bad == {1}
    order = [10, 0, 4, 5, 3, 4, 9]
    assert np.array_equal(features.rows(torch.tensor(order)).numpy(), rows[order])
    assert [features.key(row) for row in (3, 4, 5)] == [None, key(0), None]


def test_bad_rows_are_counted_on_from_file_to_file(tmp_path):
    paths = [written(tmp_path / name, numbers(4), bad=[1, 3]) for name in "ab"]
    assert Features(paths).bad == {1, 3, 5, 7}


def test_a_fingerprint_tells_features_apart(shards, tmp_path):
    paths, rows = shards
    assert Features(paths).fingerprint() == Features(paths).fingerprint() != Features(paths[::-1]).fingerprint()
    one = written(tmp_path / "d", rows)
    other = written(tmp_path / "e", rows + 1)
    assert Features([one]).fingerprint() != Features([other]).fingerprint()
    for path in (one, other):
        path.with_suffix(".json").unlink()
    assert Features([one]).fingerprint() != Features([other]).fingerprint()


def test_another_process_reads_on(shards):
    paths, rows = shards
    features = pickle.loads(pickle.dumps(Features(paths)))
    assert np.array_equal(features.rows(range(11)).numpy(), rows)


def test_files_of_several_widths(tmp_path):
    paths = [written(tmp_path / "a", numbers(4)), written(tmp_path / "b", numbers(4, dim=6))]
    assert f"{paths[1]} has 6 numbers a row, and {paths[0]} 5" in refused(Features, paths)


def test_one_record_of_another_width(tmp_path):
    with TsvWriter(tmp_path / "x.tsv") as out:
        for row, dim in enumerate((768, 768, 384)):
            out.add(str(row), vector_payload(np.zeros(dim)))
    features = Features([tmp_path / "x.tsv"])
    text = refused(features.rows, [0, 1, 2])
    assert f"line 3 of {tmp_path / 'x.tsv'} has 384 numbers (as float16 numbers read as float32 have), not 768" in text


def test_numbers_that_are_not_finite_are_named(tmp_path):
    rows = numbers(4)
    rows[2, 0] = np.inf
    np.save(tmp_path / "x.npy", rows)
    features = Features([tmp_path / "x.npy"], "features of the texts")
    assert features.rows([0, 1]).shape == (2, 5)
    assert "row 2 of features of the texts" in refused(features.rows, [0, 1, 2])


def test_a_sidecar_of_another_file(tmp_path):
    path = written(tmp_path, numbers(4))
    np.save(path, numbers(5))
    assert f"{path} has count 5, and its note image_00.feat.json 4" in refused(Features, [path])
    path.with_suffix(".json").write_text("[]")
    assert "is no note on features" in refused(Features, [path])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (numbers(3)[0], "is an array (5,) of float32; features are (count, dim)"),
        (np.zeros((3, 5), dtype=np.int64), "of int64; features are (count, dim) of float32 or float16"),
        (np.array([{"code": "run"}]), "cannot be read"),
    ],
)
def test_arrays_that_are_no_features(tmp_path, content, said):
    np.save(tmp_path / "x.npy", content, allow_pickle=True)
    assert said in refused(Features, [tmp_path / "x.npy"])


def test_files_that_are_no_features(tmp_path):
    assert "no features at" in refused(Features, [tmp_path / "x.npy"])
    assert "no features of the images at" in refused(Features, [tmp_path / "x.tsv"], "features of the images")
    assert "end in neither .npy nor .tsv" in refused(Features, [tmp_path / "x.pt"])
    path = written(tmp_path, numbers(40))
    path.write_bytes(path.read_bytes()[:-8])
    assert "cannot be read" in refused(Features, [path])
    path.write_bytes(b"")
    assert "cannot be read" in refused(Features, [path])


@pytest.mark.parametrize("note", ["[1]", "[0]", "null", '{"bad": 3}', '{"bad": [-1]}', '{"bad": ["x"]}'])
def test_notes_that_are_none(tmp_path, note):
    path = written(tmp_path, numbers(4))
    path.with_suffix(".json").write_text(note)
    assert "is no note on features" in refused(Features, [path])
    assert "is no note on features" in refused(writer, tmp_path, 4)
    path.with_suffix(".json").unlink()
    begun = writer(tmp_path / "new", 4)
    begun.add(numbers(1))
    begun.close()
    (tmp_path / "new" / "image_00.feat.unfinished.json").write_text(note)
    assert "is no note on features" in refused(writer, tmp_path / "new", 4)
