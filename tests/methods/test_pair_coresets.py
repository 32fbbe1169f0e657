"""Coresets of pairs on the drawn toy set: from what they are chosen, and what they say of it."""

import pytest
import torch
import torch.nn.functional as F

from methods import pair_coresets
from methods.core.coresets import herding, k_center
from methods.core.store import TrajectoryStore
from methods.pair_coresets import CoresetConfig, PairCoresets, joint_features
from utils.errors import UserError

KINDS = ("herding", "kcenter", "forgetting")


@pytest.fixture
def towers(corpus):
    return corpus.towers(16, seed=0)


@pytest.fixture
def experts(towers, tmp_path):
    """Two experts that were never trained: other weights at each epoch."""
    shapes = {group: part.shapes for group, part in towers.flat.items()}
    store = TrajectoryStore.create(tmp_path / "experts", shapes, "float32", {})
    for expert in range(2):
        for epoch in range(4):
            store.add(expert, epoch, towers.renew(10 * expert + epoch).flatten(), 0, {})
    return store


def embedded(corpus, towers, images):
    """The obvious way: one image after another."""
    train, rows = corpus["train"], []
    towers.eval()
    with torch.no_grad():
        for image in images:
            caption = train.captions_of[image][0]
            u = towers.embed_images(train.eval_images(torch.tensor([image])))
            rows.append((u[0], towers.embed_texts(corpus.texts("train", [caption]))[0]))
    return rows


def test_features_are_of_the_first_expert_at_its_end(corpus, towers, experts):
    found = joint_features(corpus, towers, experts)
    assert found.shape == (96, 64)
    oracle = embedded(corpus, corpus.towers(16, seed=0).renew(3), range(96))
    assert torch.allclose(found, torch.stack([torch.cat(pair) for pair in oracle]), atol=1e-5)
    assert torch.allclose(found.norm(dim=1), torch.full((96,), 2**0.5))


def test_raw_features_are_of_a_trunk_before_any_training(corpus, towers):
    train = corpus["train"]
    found = joint_features(corpus, corpus.towers(16, seed=7), None)  # whichever towers are lent
    trunk, texts = found.split([found.shape[1] - corpus.text_width, corpus.text_width], dim=1)
    with torch.no_grad():
        own = towers.image.trunk.eval()(train.eval_images(torch.arange(96)))
    assert torch.allclose(trunk, F.normalize(own), atol=1e-5)
    first = [captions[0] for captions in train.captions_of]
    assert torch.allclose(texts, F.normalize(corpus.texts("train", first)), atol=1e-6)


@pytest.mark.parametrize("features", ["expert", "raw"])
@pytest.mark.parametrize("kind, choose", [("herding", herding), ("kcenter", k_center)])
def test_pairs(corpus, towers, experts, kind, choose, features):
    known = experts if features == "expert" else None
    coresets = PairCoresets(corpus, towers, known, CoresetConfig(coreset_features=features))
    images, captions = coresets.pairs(kind, 20)
    assert torch.equal(images, choose(joint_features(corpus, corpus.towers(16, seed=0), known), 20))
    assert len(set(images.tolist())) == 20
    assert captions.tolist() == [corpus["train"].captions_of[image][0] for image in images.tolist()]


def right_by_counting(corpus, towers, order, batches):
    """Whose own caption scores higher than each other one of its batch."""
    right = torch.zeros(len(order), dtype=torch.bool)
    for batch in order.tensor_split(batches):
        rows = embedded(corpus, towers, batch.tolist())
        for image, (u, own) in zip(batch.tolist(), rows, strict=True):
            right[image] = sum(bool(u @ v >= u @ own) for _, v in rows) == 1
    return right


def test_forgetting(corpus, towers, experts, monkeypatch):
    # Six batches of 16: after five of 19 the last image would be right by having no rival.
    monkeypatch.setattr(pair_coresets, "BATCH", 19)
    coresets = PairCoresets(corpus, towers, experts, CoresetConfig(never_learned="drop"))
    order = torch.randperm(96, generator=pair_coresets.generator(0, "forgetting batches"))
    fresh = corpus.towers(16, seed=0)
    right = torch.stack([right_by_counting(corpus, fresh.renew(epoch), order, 6) for epoch in (1, 2, 3)])
    assert torch.equal(coresets._correct, right)  # epoch 0 is no part of it, nor is the second expert
    flips = (right[:2] & ~right[1:]).sum(0)
    ever = int(right.any(0).sum())
    assert int(flips.sum()) > 3 and ever < 96
    images, _ = coresets.pairs("forgetting", ever)
    assert flips[images].tolist() == sorted(flips[right.any(0)].tolist(), reverse=True)
    with pytest.raises(UserError, match=f"cannot choose {ever + 1} of {ever} samples that were ever right"):
        coresets.pairs("forgetting", ever + 1)
    never = PairCoresets(corpus, towers, experts, CoresetConfig()).pairs("forgetting", 96 - ever)[0]
    assert not right[:, never].any()


def test_a_caption_that_is_as_good_as_another_is_not_right(corpus, towers, experts, monkeypatch):
    monkeypatch.setattr(towers, "embed_texts", lambda texts: torch.ones(len(texts), 32))
    assert not PairCoresets(corpus, towers, experts, CoresetConfig())._correct.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_on_every_call_and_fewer_are_the_beginning_of_more(corpus, towers, experts, kind):
    first = PairCoresets(corpus, towers, experts, CoresetConfig())
    images, captions = first.pairs(kind, 30)
    towers.renew(99).train()  # whatever was done to the towers since
    again = PairCoresets(corpus, towers, experts, CoresetConfig()).pairs(kind, 10)
    assert torch.equal(images[:10], again[0]) and torch.equal(captions[:10], again[1])
    assert sorted(first.pairs(kind, 96)[0].tolist()) == list(range(96))


def test_features_are_computed_once(corpus, towers, experts, monkeypatch):
    calls = []
    monkeypatch.setattr(pair_coresets, "joint_features", lambda *args: calls.append(args) or torch.randn(96, 4))
    coresets = PairCoresets(corpus, towers, experts, CoresetConfig())
    assert not calls
    for kind in ("herding", "kcenter", "herding"):
        coresets.pairs(kind, 5)
    assert len(calls) == 1


class TestRefusals:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("count", [0, 97])
    def test_numbers(self, corpus, towers, experts, kind, count):
        with pytest.raises(UserError, match=f"{kind} cannot choose {count} pairs: there are 96 training images"):
            PairCoresets(corpus, towers, experts, CoresetConfig()).check(kind, count)

    def test_no_experts(self, corpus, towers):
        raw = PairCoresets(corpus, towers, None, CoresetConfig(coreset_features="raw"))
        raw.check("herding", 5)
        with pytest.raises(UserError, match=r"forgetting asks experts; run buffer.py first, or name their folder"):
            raw.pairs("forgetting", 5)
        with pytest.raises(UserError, match="kcenter asks experts"):
            PairCoresets(corpus, towers, None, CoresetConfig()).pairs("kcenter", 5)

    def test_experts_of_other_towers(self, corpus, towers, tmp_path):
        store = TrajectoryStore.create(tmp_path / "other", {"img": [], "txt": [("w", [3])]}, "float32", {})
        with pytest.raises(UserError, match=r"no expert in .*other has begun"):
            PairCoresets(corpus, towers, store, CoresetConfig()).check("herding", 5)
        store.add(0, 0, {"img": torch.zeros(1), "txt": torch.zeros(3)}, 0, {})
        with pytest.raises(UserError, match="other is of another network"):
            PairCoresets(corpus, towers, store, CoresetConfig()).check("herding", 5)

    def test_one_epoch(self, corpus, towers, tmp_path):
        shapes = {group: part.shapes for group, part in towers.flat.items()}
        store = TrajectoryStore.create(tmp_path / "short", shapes, "float32", {})
        for epoch in (0, 3):
            store.add(0, epoch, towers.flatten(), 0, {})
        with pytest.raises(UserError, match=r"the first expert in .*short keeps \[3\] after epoch 0; train longer"):
            PairCoresets(corpus, towers, store, CoresetConfig()).pairs("forgetting", 5)


def test_reports_say_what_was_chosen_by_what(corpus, towers, experts):
    coresets = PairCoresets(corpus, towers, experts, CoresetConfig())
    assert coresets.about("herding").endswith(
        "(Welling, ICML 2009); one pair an image, its first caption, test transform; features: image and text "
        "embeddings of the first expert after its last epoch, each of length one, side by side"
    )
    assert "sentence embeddings" in PairCoresets(corpus, towers, None, CoresetConfig("", "raw")).about("kcenter")
    said = coresets.about("forgetting")
    assert "after epochs 1, 2, 3; those it never got right count as most forgotten" in said
    dropped = PairCoresets(corpus, towers, experts, CoresetConfig(never_learned="drop")).about("forgetting")
    assert "those it never got right are left out" in dropped
