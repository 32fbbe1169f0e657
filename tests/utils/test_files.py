"""Whole files or none, safe loading, unambiguous digests."""

import hashlib
import json
import os
import resource
import signal
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.errors import UserError
from utils.files import (
    atomic,
    atomic_folder,
    digest,
    file_digest,
    load_tensors,
    load_vectors,
    read_json,
    save_tensors,
    save_vectors,
    sweep,
    write_json,
    write_signed,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_makes_parents_and_leaves_only_the_file(tmp_path):
    with atomic(tmp_path / "a/b/file.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a/b/file.txt").exists()
        assert temporary.parent == tmp_path / "a/b"  # a rename is atomic only within one disk
    assert names(tmp_path / "a/b") == ["file.txt"]
    assert (tmp_path / "a/b/file.txt").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_file_and_no_part(tmp_path, error):
    file = tmp_path / "file.txt"
    file.write_text("old")
    with pytest.raises(error), atomic(file) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert names(tmp_path) == ["file.txt"] and file.read_text() == "old"
    with pytest.raises(TypeError):
        write_json(file, {"value": object()})
    assert names(tmp_path) == ["file.txt"] and file.read_text() == "old"


def test_a_failed_save_keeps_the_old_tensors(tmp_path):
    file = tmp_path / "state.pt"
    save_tensors(file, {"x": torch.arange(3)})
    with pytest.raises(Exception, match="pickle"):
        save_tensors(file, {"x": torch.arange(4), "bad": lambda: None})
    assert names(tmp_path) == ["state.pt"]
    assert load_tensors(file, "state")["x"].tolist() == [0, 1, 2]


def test_a_folder_is_written_whole_and_replaces_another(tmp_path):
    target = tmp_path / "deep" / "model"
    for text in ("first", "second"):
        with atomic_folder(target) as folder:
            (folder / "part").mkdir()
            (folder / "part" / text).write_text(text)
            assert not (target / "part" / text).exists()
        assert [path.name for path in target.rglob("*")] == ["part", text]
        assert os.listdir(target.parent) == ["model"]


def test_a_folder_that_is_made_once_is_left_to_whoever_was_first(tmp_path):
    with atomic_folder(tmp_path / "model", once=True) as folder:
        (folder / "late").touch()
        with atomic_folder(tmp_path / "model", once=True) as other:
            (other / "early").touch()
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == ["early"]


def test_a_failure_keeps_the_old_folder_and_sweep_removes_a_killed_one(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as folder:
        (folder / "new").touch()
        raise RuntimeError("no")
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == ["old"]
    (tmp_path / ".model.x.part" / "new").mkdir(parents=True)
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["model"]


def test_sweep_removes_what_a_writer_left_that_was_killed_amid_a_file(tmp_path):
    """The system kills whoever writes on past the largest size, and does so in the library's own write."""
    (tmp_path / "expert").mkdir()
    save_vectors(tmp_path / "expert" / "old", {"x": torch.arange(3)})
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            save_vectors(tmp_path / "expert" / "old", {"x": torch.arange(100_000)})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
    assert len(names(tmp_path / "expert")) > 1
    sweep(tmp_path)
    assert names(tmp_path / "expert") == ["old"]
    assert load_vectors(tmp_path / "expert" / "old", "numbers", "")["x"].tolist() == [0, 1, 2]


def test_vectors_that_are_not_as_they_were_saved_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_vectors(path, {"x": torch.arange(3.0), "y": torch.ones(2, dtype=torch.bfloat16)})
    content = path.read_bytes()
    for place in range(1, 17):  # of the numbers, which are at the end
        path.write_bytes(content[:-place] + bytes([content[-place] ^ 4]) + content[len(content) - place + 1 :])
        with pytest.raises(UserError, match=r"not what its digest says.*; make it again"):
            load_vectors(path, "numbers", "make it again")
    path.write_bytes(content.replace(b'"x"', b'"z"'))
    with pytest.raises(UserError, match="cannot be read"):
        load_vectors(path, "numbers", "make it again")


def test_a_file_and_then_its_name_reach_the_disk(tmp_path, monkeypatch):
    """In this order: data, move, folder; and the names of folders that had to be made."""
    done, sync, replace = [], os.fsync, os.replace

    def note_sync(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    monkeypatch.setattr("utils.files.os.fsync", note_sync)
    monkeypatch.setattr("utils.files.os.replace", lambda old, new: (replace(old, new), done.append("moved")))
    write_text(tmp_path / "new" / "deep" / "file", "x")
    *folders, file, moved, folder = done
    assert sorted(folders) == sorted(["new", tmp_path.name]) and file.startswith(".file.")
    assert (moved, folder) == ("moved", "deep")
    done.clear()
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "weights").touch()
    assert done == ["new", "weights", "moved", tmp_path.name]


def test_a_disk_whose_folders_cannot_be_synced_still_takes_files(tmp_path, monkeypatch):
    sync = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        sync(handle)

    monkeypatch.setattr("utils.files.os.fsync", refuse)
    write_text(tmp_path / "new" / "file", "x")
    assert (tmp_path / "new" / "file").read_text() == "x"


def test_results_are_as_readable_as_other_files(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "ours", "")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_text_and_json_round_trip(tmp_path):
    write_text(tmp_path / "text", "größe ±\n")
    assert (tmp_path / "text").read_bytes() == "größe ±\n".encode()
    value = {"b": [1, 2.5, None], "a": "ü"}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json", "value") == value
    assert list(read_json(tmp_path / "value.json", "value")) == ["b", "a"]


def test_json_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"^no manifest at .*gone\.json$"):
        read_json(tmp_path / "gone.json", "manifest")
    for content in (b'{"half": ', b"\xff\xfe"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UserError, match=r"^manifest .*bad\.json is not valid JSON"):
            read_json(tmp_path / "bad.json", "manifest")


@pytest.mark.parametrize("mmap", [False, True])
def test_tensors_round_trip(tmp_path, mmap):
    state = {"x": torch.randn(3, 4), "steps": 7, "names": ["a", "b"], "nested": {"lr": 0.1, "none": None}}
    save_tensors(tmp_path / "state.pt", state)
    loaded = load_tensors(tmp_path / "state.pt", "state", mmap=mmap)
    assert torch.equal(loaded.pop("x"), state.pop("x")) and loaded == state


class Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_malicious_file_is_refused_and_runs_nothing(tmp_path):
    target = tmp_path / "owned"
    torch.save({"x": Malice(str(target))}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"^distilled data .*evil\.pt cannot be read"):
        load_tensors(tmp_path / "evil.pt", "distilled data")
    assert not target.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)  # the trap does work
    assert target.exists()


def test_damaged_and_missing_tensor_files(tmp_path):
    save_tensors(tmp_path / "state.pt", {"x": torch.randn(100)})
    content = (tmp_path / "state.pt").read_bytes()
    for damaged in (b"", b"hello", content[: len(content) // 2]):
        (tmp_path / "state.pt").write_bytes(damaged)
        with pytest.raises(UserError, match=r"^state .*state\.pt cannot be read .*damaged") as caught:
            load_tensors(tmp_path / "state.pt", "state")
        assert "\n" not in str(caught.value)
    for missing in (tmp_path / "gone.pt", tmp_path):
        with pytest.raises(UserError, match=r"^no state at"):
            load_tensors(missing, "state")


def test_digest_tells_apart_what_differs():
    different = [
        (),
        ("",),
        (b"",),
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (["a", "bc"],),
        (b"abc",),
        (1,),
        ("1",),
        (b"1",),
        (1.5,),
        (None,),
        (True,),
        (np.zeros(2, np.float32),),
        (np.zeros(1, np.float64),),
        (np.zeros((2, 1), np.float32),),
        (np.zeros(1, np.float32), np.zeros(1, np.float32)),
        (bytes(8),),
        (np.zeros(0, np.float32), np.zeros(2, np.float32)),
    ]
    assert len({digest(*parts) for parts in different}) == len(different)
    # A part that spells the header of the next one is still one part.
    assert digest(b"abytes 1;b") != digest(b"a", b"b")


def test_digest_is_of_the_values():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert digest(array) == digest(torch.from_numpy(array)) == digest(np.asfortranarray(array))
    assert (
        digest(array.T) == digest(np.ascontiguousarray(array.T)) == digest(torch.from_numpy(array).T) != digest(array)
    )
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    # Equal on every machine and in every process: the definition, spelled out.
    header = b"json 4;" + json.dumps("ab").encode() + b"array float32 (1,);" + struct.pack("<f", 2.0)
    assert digest("ab", np.full(1, 2, np.float32)) == hashlib.sha256(header).hexdigest()


@pytest.mark.parametrize("size", [0, 10, (1 << 20) + 3])
def test_file_digest(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert file_digest(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_vectors_saved_again_are_the_same_file(tmp_path):
    """Notes of several entries would come in an order of their own each time."""
    for number in range(8):
        save_vectors(tmp_path / f"{number}.safetensors", {"a": torch.ones(3), "b": torch.zeros(2)})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_changed_number_in_a_signed_file_is_told(tmp_path):
    """And the line that tells it may be dropped by whoever means it; what never had one is read as it is."""
    path, tree = tmp_path / "x.json", {"rows": [{"acc": 12.5, "epoch": 3}], "äß": [1, None, True], "format": 1}
    write_signed(path, tree)
    assert read_json(path, "result") == tree
    good = path.read_text()
    for old, new in (("12.5", "12.4"), ('"rows"', '"rowt"'), ("true", "null"), ('"format": 1', '"format": 2')):
        path.write_text(good.replace(old, new))
        with pytest.raises(UserError, match=r"result .*x\.json is damaged \(its checksum is another\); restore it, or"):
            read_json(path, "result")
    lines = good.replace("12.5", "12.4").splitlines()
    path.write_text("\n".join(line for line in lines if "checksum" not in line))
    assert read_json(path, "result")["rows"][0]["acc"] == 12.4
    path.write_text(good.replace(good.split('"checksum": ')[1].split(",")[0], "[3]"))
    with pytest.raises(UserError, match="its checksum is another"):
        read_json(path, "result")


def test_numbers_as_keys_are_signed_as_they_are_read(tmp_path):
    write_signed(tmp_path / "x.json", {"epochs": {10: 1, 9: (2, 3)}})
    assert read_json(tmp_path / "x.json", "manifest") == {"epochs": {"10": 1, "9": [2, 3]}}
