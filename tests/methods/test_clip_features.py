"""Features extracted from pools: those of the bare tower, the same after any kill, none of an image that is none."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.feature_files import Features
from data.pools import PoolsConfig, check_aligned, open_images, open_texts
from data.tsv import TsvFile
from data.views import normalised, plain_view
from methods.clip_features import FeatureConfig, extract_images, extract_texts
from networks.clip import Clip, load_clip
from tests.conftest import contents
from utils.errors import RunError, UserError

SENTENCES = ["a red circle", "a blue star on white", "", "un café noir", "red " * 200, "a green ring", "x"]
SMALL = FeatureConfig(feature_batch=4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Clip:
    return load_clip("tiny", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of 22 images of several sizes, the third and the last of which are none, and a file of sentences."""
    folder, rng = tmp_path_factory.mktemp("pool"), np.random.default_rng(0)
    for number in range(22):
        size = (24 + number, 60 - number, 3)
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{number:02}.png")
    (folder / "02.png").write_bytes(b"no image")
    (folder / "21.png").write_bytes((folder / "20.png").read_bytes()[:200])
    texts = folder / "texts.json"
    texts.write_text(json.dumps(SENTENCES))
    return folder, texts


def pool_of(places):
    return open_images([str(places[0])], PoolsConfig())


def texts_of(places):
    return open_texts([str(places[1])], PoolsConfig())


def test_features_are_the_bare_towers(clip, places, tmp_path):
    pool, texts = pool_of(places), texts_of(places)
    images = Features([extract_images(clip, pool, tmp_path, "images", SMALL)])
    there = [row for row in range(22) if row not in (2, 21)]
    views = torch.stack([plain_view(pool.image(row), 32) for row in there])
    bare = clip.images(normalised(views, clip.mean, clip.std))
    torch.testing.assert_close(images.rows(there), bare, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(images.rows(there)[1:], bare[:-1], atol=1e-2)
    said = Features([extract_texts(clip, texts, tmp_path, "texts", SMALL)])
    torch.testing.assert_close(said.rows(range(7)), clip.texts(SENTENCES), rtol=1e-4, atol=1e-5)
    for known, features in ((pool, images), (texts, said)):
        check_aligned(known, features)
    assert images.note["layer"] == "projection" and images.note["normalised"] is False
    assert images.note["model"] == "tiny" and images.note["weights"] == clip.fingerprint
    assert images.note["dtype"] == "float32" and images.note["dim"] == said.dim == clip.dim


def test_undecodable_images_are_listed_and_have_no_feature(clip, places, tmp_path, capsys):
    path = extract_images(clip, pool_of(places), tmp_path, "images", SMALL, bad_share=2 / 22)
    features = Features([path])
    assert features.bad == {2, 21} and not features.rows([2, 21]).any()
    assert features.rows([0, 1, 3, 20]).abs().sum(1).min() > 0.1
    assert "note: 2 of 22 images cannot be decoded" in capsys.readouterr().out


def test_too_many_undecodable_images_stop_the_run(clip, places, tmp_path):
    for _ in range(2):  # again where it was resumed
        with pytest.raises(UserError, match=r"2 of 22 images cannot be decoded, such as .*--bad_images"):
            extract_images(clip, pool_of(places), tmp_path, "images", SMALL, bad_share=0.05)
    with pytest.raises(UserError, match=r"1 of 22 images cannot be decoded, such as 02.png"):
        extract_images(clip, pool_of(places), tmp_path / "strict", "images", SMALL, bad_share=0.0)
    assert not list(tmp_path.rglob("images.npy"))
    extract_images(clip, pool_of(places), tmp_path, "images", SMALL, bad_share=0.1)
    assert Features([tmp_path / "images.npy"]).bad == {2, 21}


def test_images_that_are_mended_are_as_if_they_had_never_been_bad(clip, tmp_path):
    """No trace is left of the pool as it was: its features would be those of another."""
    pool, good = tmp_path / "pool", io.BytesIO()
    pool.mkdir()
    Image.new("RGB", (40, 40), "red").save(good, "PNG")
    for name, content in (("a.png", b"no image"), ("b.png", good.getvalue())):
        (pool / name).write_bytes(content)
    with pytest.raises(UserError, match="mend or remove them"):
        extract_images(clip, pool_of([pool]), tmp_path / "mended", "images", SMALL, bad_share=0.0)
    (pool / "a.png").write_bytes(good.getvalue())
    for folder in ("mended", "never bad"):
        extract_images(clip, pool_of([pool]), tmp_path / folder, "images", SMALL, bad_share=0.0)
    assert contents(tmp_path / "mended") == contents(tmp_path / "never bad")


@pytest.mark.parametrize("form", ["npy", "tsv"])
def test_a_killed_run_ends_in_the_same_bytes(clip, places, tmp_path, monkeypatch, form):
    cfg = FeatureConfig(feature_batch=4, feature_format=form)

    def both(folder):
        extract_images(clip, pool_of(places), folder, "images", cfg, workers=3)
        extract_texts(clip, texts_of(places), folder, "texts", cfg)

    both(tmp_path / "whole")

    def dying(after: int):
        calls = iter(range(after))

        def embed(*inputs):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return embed.of(*inputs)

        return embed

    killed = tmp_path / "killed"
    for name, after in (("images", 1), ("images", 2), ("texts", 1), ("texts", 0)):
        embed = dying(after)
        embed.of = getattr(clip, name)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(clip, name, embed, raising=False)
            both(killed)
        for part in killed.glob(f"*.unfinished.{form}"):  # as a crash may leave it
            part.write_bytes(part.read_bytes()[:-70])
    both(killed)
    assert contents(killed) == contents(tmp_path / "whole")
    assert len(Features([killed / f"images.{form}"])) == 22
    if form == "tsv":
        TsvFile(killed / "texts.tsv").check()
    with monkeypatch.context() as patch:  # nothing is done twice
        patch.setattr(clip, "embed_images", None, raising=False)
        patch.setattr(clip, "embed_texts", None, raising=False)
        extract_images(clip, pool_of(places), killed, "images", cfg)
    assert contents(killed) == contents(tmp_path / "whole")


def test_features_of_two_networks_do_not_mix(clip, places, tmp_path):
    with torch.no_grad():
        other = load_clip(clip.name, tmp_path / "cache")
        next(other.net.parameters()).add_(1)
    extract_texts(clip, texts_of(places), tmp_path, "texts", SMALL)
    with pytest.raises(UserError, match="of other features: its weights"):
        extract_texts(other, texts_of(places), tmp_path, "texts", SMALL)
    with pytest.raises(UserError, match=r"of other features: its (keys|count)"):
        extract_texts(clip, pool_of(places), tmp_path, "texts", SMALL)


def test_numbers_that_are_none_are_refused(clip, places, tmp_path, monkeypatch):
    none = torch.full((4, clip.dim), torch.nan)
    monkeypatch.setattr(clip, "texts", lambda sentences: none[: len(sentences)], raising=False)
    with pytest.raises(RunError, match=r"row 0 of the features .* is not finite"):
        extract_texts(clip, texts_of(places), tmp_path, "texts", SMALL)


def test_half_precision_is_close_and_kept_as_float32(places, tmp_path):
    plain = load_clip("tiny", tmp_path / "cache")
    half = load_clip("tiny", tmp_path / "cache", dtype=torch.bfloat16)
    kept = [
        Features([extract_texts(c, texts_of(places), tmp_path / str(i), "t", SMALL)])
        for i, c in enumerate((plain, half))
    ]
    one, two = (features.rows(range(7)) for features in kept)
    assert two.dtype == torch.float32 and not torch.equal(one, two)
    torch.testing.assert_close(one, two, rtol=0.02, atol=0.02)
    assert [features.note["precision"] for features in kept] == ["float32", "bfloat16"]
    assert kept[0].note["weights"] == kept[1].note["weights"]


def test_the_numbers_to_compute_with():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert FeatureConfig().precision(cpu) is torch.float32 and FeatureConfig().precision(cuda) is torch.float16
    assert FeatureConfig(feature_dtype="bfloat16").precision(cuda) is torch.bfloat16
