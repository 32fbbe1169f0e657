"""Damaged and deceitful `torch.save` files: none gives a wrong number, none fills the memory."""

import zipfile

import pytest
import torch

from utils.errors import UserError
from utils.files import load_tensors, save_tensors

STATE = {"x": torch.arange(40.0), "nested": {"parts": [torch.ones(3)], "lr": 0.1}}


def told(path):
    with pytest.raises(UserError) as caught:
        load_tensors(path, "state", remedy="restore it")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_a_byte_flipped_anywhere_is_told_or_harmless(tmp_path):
    path = tmp_path / "state.pt"
    save_tensors(path, STATE)
    content, refused = path.read_bytes(), 0
    with zipfile.ZipFile(path) as archive:
        places = [*range(0, archive.start_dir, 4), *range(archive.start_dir, len(content))]
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            found = load_tensors(path, "state")
        except UserError:
            refused += 1
            continue
        assert torch.equal(found["x"], STATE["x"]) and found["nested"]["lr"] == 0.1  # padding, dates, rights
        assert torch.equal(found["nested"]["parts"][0], STATE["nested"]["parts"][0])
    assert refused > len(places) / 3


def test_a_file_without_checksums_is_read(tmp_path):
    """Torch can be told to write none, and older files are no archives."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "none.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(STATE, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("none.pt", "legacy.pt"):
        assert torch.equal(load_tensors(tmp_path / name, "state")["x"], STATE["x"])


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(1).expand(10**13), "claims to be [10000000000000] but has only 4 bytes"),
        (torch.empty(10**15, device="meta"), "is no plain tensor"),
        (torch.eye(3).to_sparse(), "is no plain tensor"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "is no plain tensor"),
    ],
    ids=["expanded", "meta", "sparse", "quantized"],
)
def test_tensors_that_are_none(tmp_path, tensor, why, mmap):
    torch.save({"a": [torch.ones(2), {"b": tensor}]}, tmp_path / "state.pt")
    with pytest.raises(UserError) as caught:
        load_tensors(tmp_path / "state.pt", "state", mmap=mmap)
    assert f"state.pt cannot be read (its a.1.b {why})" in str(caught.value)


def test_small_expanded_tensors_and_what_holds_itself_are_read(tmp_path):
    state = {"x": torch.zeros(1).expand(10)}
    state["self"] = state
    torch.save(state, tmp_path / "state.pt")
    assert load_tensors(tmp_path / "state.pt", "state")["x"].shape == (10,)


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path):
    save_tensors(tmp_path / "state.pt", STATE)
    with zipfile.ZipFile(tmp_path / "state.pt") as had, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as archive:
        for record in had.infolist():
            archive.writestr(record.filename, had.read(record), zipfile.ZIP_DEFLATED)
    assert "is compressed, which torch.save never does" in told(tmp_path / "bomb.pt")
