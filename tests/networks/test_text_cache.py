"""Caption embeddings on disk: computed once, computed again where they are damaged, and those that were published."""

import numpy as np
import pytest

from networks import text_cache
from networks.text_cache import cached_embeddings, published_cache, read_published_embeddings
from networks.towers import TowerConfig
from utils.errors import UserError


class Counting:
    width, fingerprint = 4, "one"

    def __init__(self):
        self.calls = 0

    def encode(self, captions):
        self.calls += 1
        return np.arange(4 * len(captions), dtype=np.float32).reshape(-1, 4)


def test_embeddings_are_computed_once(tmp_path):
    net = Counting()
    first = cached_embeddings(net, ["a", "b"], tmp_path)
    again = cached_embeddings(net, ["a", "b"], tmp_path)
    assert net.calls == 1 and isinstance(again, np.memmap) and np.array_equal(first, again)
    assert len(list((tmp_path / "texts").iterdir())) == 1
    cached_embeddings(net, ["b", "a"], tmp_path)
    cached_embeddings(net, ["ab"], tmp_path)
    net.fingerprint = "two"
    cached_embeddings(net, ["a", "b"], tmp_path)
    assert net.calls == 4


@pytest.mark.parametrize("damage", [b"", b"not an array", 20, -4])
def test_damaged_cache_is_computed_again(tmp_path, damage):
    net = Counting()
    good = np.array(cached_embeddings(net, ["a", "b"], tmp_path))
    (path,) = (tmp_path / "texts").iterdir()
    path.write_bytes(damage if isinstance(damage, bytes) else path.read_bytes()[:damage])
    assert np.array_equal(cached_embeddings(net, ["a", "b"], tmp_path), good) and net.calls == 2


def test_published_embeddings(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    path = tmp_path / "flickr_bert_text_embed.npz"
    np.savez(path, bert_test_embed=values)
    assert np.array_equal(read_published_embeddings(path, 3, 5), values)
    cfg = TowerConfig(text_cache=str(tmp_path))
    assert published_cache(cfg, "flickr", "test") == path
    assert published_cache(cfg, "flickr", "val") is None and published_cache(TowerConfig(), "flickr", "test") is None
    net = Counting()
    assert np.array_equal(cached_embeddings(net, ["a", "b", "c"], tmp_path, published=path), values) and net.calls == 0
    with pytest.raises(UserError, match=r"no train embeddings at .*flickr_bert_train_text_embed\.npz"):
        published_cache(cfg, "flickr", "train")


def test_published_embeddings_that_do_not_fit(tmp_path):
    path = tmp_path / "x.npz"

    def says(count=3, width=5, **arrays):
        if arrays:
            np.savez(path, **arrays)
        with pytest.raises(UserError) as caught:
            read_published_embeddings(path, count, width)
        return str(caught.value)

    assert "no text embeddings at" in says()
    values = np.zeros((3, 5), np.float32)
    assert "shape (3, 5), not (4, 5)" in says(count=4, bert_test_embed=values)
    assert "shape (3, 5), not (3, 6)" in says(width=6, bert_test_embed=values)
    assert "cannot be read" in says(other=values)
    assert "cannot be read" in says(bert_test_embed=np.array([{"a": 1}], dtype=object))
    assert "not finite" in says(bert_test_embed=values + np.nan)
    path.write_bytes(b"PK nonsense")
    assert "cannot be read" in says()


def test_a_flipped_byte_in_the_cache_is_computed_again(tmp_path):
    net = Counting()
    good = np.array(cached_embeddings(net, ["a", "b"], tmp_path))
    (path,) = (tmp_path / "texts").glob("*.npy")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for _ in range(2):
        assert np.array_equal(cached_embeddings(net, ["a", "b"], tmp_path), good) and net.calls == 2


def test_no_file_is_ever_without_its_digest(tmp_path, monkeypatch):
    """Killed between the two, a cache that nobody could check was left for good."""

    def killed(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(text_cache, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        cached_embeddings(Counting(), ["a", "b"], tmp_path)
    assert not list((tmp_path / "texts").glob("*.npy"))
