"""The tiny models on disk: as they were made, or made anew."""

import json
import shutil

import pytest

from networks.diffusion import load_model, open_model
from networks.tiny import tiny_clip, tiny_diffusion, tiny_llava
from tests.conftest import contents
from utils.errors import UserError


def flip(path, at=-30):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "file"),
    [
        (tiny_clip, "model.safetensors"),
        (tiny_diffusion, "tokenizer/special_tokens_map.json"),
        (tiny_llava, "config.json"),
    ],
)
def test_a_damaged_file_is_named_and_its_model_made_anew(make, file, tmp_path, capsys):
    folder = make(tmp_path)
    good = contents(tmp_path)
    said = ""
    for damage in (lambda: flip(folder / file), lambda: (folder / file).unlink()):
        damage()
        assert make(tmp_path) == folder and contents(tmp_path) == good
        said += capsys.readouterr().out
    assert f"note: {folder / file} is damaged (its digest is another); the model is made anew" in said
    assert f"note: {folder / file} is gone; the model is made anew" in said
    before = (folder / file).stat().st_mtime_ns
    assert make(tmp_path) == folder and (folder / file).stat().st_mtime_ns == before
    assert "note" not in capsys.readouterr().out


def test_damaged_digests(tmp_path, capsys):
    folder = tiny_clip(tmp_path)
    good, told = contents(tmp_path), tmp_path / f"digests_of_{folder.name}.json"
    for damaged in ("[]", "nonsense", json.dumps(dict.fromkeys(json.loads(told.read_text()), "0" * 64))):
        told.write_text(damaged)
        tiny_clip(tmp_path)
        assert "note: " in (said := capsys.readouterr().out) and (told.name in said or "is damaged" in said)
        assert contents(tmp_path) == good
    told.unlink()  # as of a model that was made when there were none
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_clip(tmp_path) == folder and (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("file", ["tokenizer/tokenizer_config.json", "unet/diffusion_pytorch_model.safetensors"])
def test_a_damaged_file_of_a_users_model_is_named(file, tmp_path):
    shutil.copytree(tiny_diffusion(tmp_path), tmp_path / "own")
    path = tmp_path / "own" / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError) as caught:
        load_model(open_model(str(tmp_path / "own"), tmp_path))
    line = str(caught.value)
    assert f"model folder {tmp_path / 'own'} cannot be loaded (its {file} is damaged: " in line and "\n" not in line
