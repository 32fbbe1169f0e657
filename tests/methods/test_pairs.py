"""The learned pairs: how they start, which of them move and how fast, and what a step sees of them."""

from collections import Counter

import pytest
import torch

from methods.core.outer import OuterConfig, outer_loop
from methods.lors import KINDS, Similarity
from methods.pairs import PairsConfig, Phase, start_pairs
from tests.methods.conftest import CPU, everything, generator, pairs
from utils.errors import UserError


def one(**options):
    """The one phase of a set."""
    return pairs(**options).phases[0]


class TestDraws:
    @pytest.mark.parametrize("size, kept", [(6, 6), (4, 4), (100, 6)])
    def test_each_step_draws_different_pairs(self, size, kept):
        draws = one().draws(generator(), 8, size)
        assert len(draws) == 8
        for draw in draws:
            assert len(draw.indices) == kept == len(set(draw.indices.tolist()))
            assert set(draw.indices.tolist()) <= set(range(6))
        assert len({draw.seed for draw in draws}) == 8
        assert len({tuple(draw.indices.tolist()) for draw in draws}) > 4  # a new order each step

    def test_every_pair_is_drawn_as_often(self):
        draws = one().draws(generator(), 3000, 2)
        counts = Counter(i for draw in draws for i in draw.indices.tolist())
        assert all(abs(counts[i] - 1000) < 4 * (1000 * 2 / 3) ** 0.5 for i in range(6))

    def test_an_equal_generator_draws_the_same(self):
        first, again, other = (one().draws(generator(seed), 4, 3) for seed in (1, 1, 2))
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a.indices, b.indices) and a.seed == b.seed
        assert [d.seed for d in first] != [d.seed for d in other]


class TestConsecutive:
    """LoRS: slices of one order, and a new one when the next slice would not fit."""

    def test_slices_cover_before_any_comes_back(self):
        draws = pairs(10).phases[0].draws(generator(), 9, 3, consecutive=True)
        assert [len(draw.indices) for draw in draws] == [3] * 9  # three slices of ten, the tail is dropped
        for first in (0, 3, 6):
            seen = torch.cat([draw.indices for draw in draws[first : first + 3]]).tolist()
            assert len(set(seen)) == 9
        orders = {tuple(draw.indices.tolist()) for draw in draws}
        assert len(orders) > 6 and len({draw.seed for draw in draws}) == 9

    def test_99_pairs_of_20_are_four_slices(self):
        draws = pairs(99, size=1).phases[0].draws(generator(), 8, 20, consecutive=True)
        for first in (0, 4):
            assert len(set(torch.cat([draw.indices for draw in draws[first : first + 4]]).tolist())) == 80

    def test_all_at_once(self):
        for size in (6, 100):
            for draw in one().draws(generator(), 3, size, consecutive=True):
                assert sorted(draw.indices.tolist()) == list(range(6))

    def test_each_outer_step_begins_with_a_new_order(self):
        rng, phase = generator(), pairs(12).phases[0]
        first, second = (phase.draws(rng, 2, 4, consecutive=True) for _ in range(2))
        assert set(torch.cat([draw.indices for draw in (*first, *second)]).tolist()) != set(range(12))
        assert not torch.equal(first[0].indices, second[0].indices)


class TestBatch:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_holds_the_drawn_pairs(self, kind):
        learned = one(sim_type=kind)
        draw = learned.draws(generator(), 1, 4)[0]
        batch = learned.batch(draw)
        for row, pair in enumerate(draw.indices.tolist()):
            assert torch.equal(batch.images[row], learned.images[pair])
            assert torch.equal(batch.texts[row], learned.texts[pair])
        assert batch.similarity is None if kind == "identity" else torch.equal(batch.similarity, torch.eye(4))

    def test_gradients_reach_the_drawn_pairs_alone(self):
        learned = one(sim_type="full")
        draw = learned.draws(generator(), 1, 4)[0]
        batch = learned.batch(draw)
        (batch.images.sum() + batch.texts.sum() + batch.similarity.sum()).backward()
        drawn = torch.zeros(6)
        drawn[draw.indices] = 1
        assert torch.equal(learned.images.grad[:, 0, 0, 0], drawn) and torch.equal(learned.texts.grad[:, 0], drawn)
        assert torch.equal(learned.similarity.leaves[0].grad, drawn[:, None] * drawn)

    def test_the_given_tensors_are_copied(self):
        images, texts = torch.ones(2, 3, 4, 4), torch.ones(2, 5)
        similarity = Similarity("identity", 2, 1, 1.0, generator(), CPU)
        learned = Phase(images, texts, similarity, PairsConfig(num_pairs=(2,)))
        images.zero_(), texts.zero_()
        assert float(learned.images.detach().min()) == float(learned.texts.detach().min()) == 1


class TestRates:
    def test_each_leaf_has_its_own(self):
        learned = pairs(sim_type="lowrank", lr_img=1.0, lr_txt=2.0, lr_lr=3.0, lr_sim=4.0)
        phase = learned.phases[0]
        rates = {id(leaf): group["lr"] for group in learned.param_groups() for leaf in group["params"]}
        assert rates[id(phase.images)] == 1 and rates[id(phase.texts)] == 2
        assert [rates[id(rate)] for rate in phase.lr.values()] == [3, 3]
        assert [rates[id(leaf)] for leaf in phase.similarity.leaves] == [4, 4, 4]
        assert {id(leaf) for leaf in learned.leaves} == set(rates)

    def test_inner_rates_start_as_asked(self):
        learned = one(lr_teacher_img=0.3, lr_teacher_txt=0.2)
        assert {g: float(r.detach()) for g, r in learned.lr.items()} == pytest.approx({"img": 0.3, "txt": 0.2})

    @pytest.mark.parametrize("kept", ["image", "text"])
    def test_one_side_alone(self, open_run, kept):
        """The other stays what it was, bit for bit, whatever the outer loop does."""
        learned = pairs(lr_img=0.1, lr_txt=0.1, **{f"{kept}_only": True})
        before = everything(learned)

        def step(_):
            phase = learned.phases[0]
            batch = phase.batch(phase.draws(generator(), 1, 6)[0])
            loss = batch.images.square().mean() + batch.texts.square().mean() + sum(phase.lr.values())
            loss.backward()
            return {"loss": float(loss.detach())}

        cfg = OuterConfig(iterations=3, eval_it=0)
        outer_loop(step, learned, cfg.plan(), open_run(), lambda step: 0.0, lambda step, best: None)
        images, texts, *rates = (torch.equal(a, b) for a, b in zip(before, everything(learned), strict=True))
        assert (images, texts) == (kept == "text", kept == "image")
        assert rates == [False, False]

    def test_both_switches_are_refused(self):
        with pytest.raises(UserError, match="nothing to learn"):
            PairsConfig(image_only=True, text_only=True).check()

    def test_rates_are_clamped(self):
        for clamp, wanted in ((0.05, [0.05, 0.1]), (0.0, [-0.2, 0.1])):
            learned = pairs(clamp_lr=clamp)
            with torch.no_grad():
                learned.phases[0].lr["img"].fill_(-0.2)
            learned.project()
            assert [float(rate.detach()) for rate in learned.phases[0].lr.values()] == pytest.approx(wanted)

    def test_nothing_else_is_clamped(self):
        learned = pairs(clamp_lr=0.1)
        before = everything(learned)
        learned.project()
        assert all(torch.equal(a, b) for a, b in zip(before, everything(learned), strict=True))

    def test_momentum_of_each(self, open_run):
        """Three equal gradients: with momentum m a tensor has moved by 1, 2 + m and 3 + 2 m + m² of its rate."""
        options = {"momentum_syn": 0.25, "momentum_lr": 0.0, "momentum_sim": 0.75}
        learned = pairs(sim_type="full", lr_img=0.01, lr_txt=0.02, lr_lr=0.001, lr_sim=0.03, **options)
        before = [leaf.detach().clone() for leaf in learned.leaves]

        def step(_):
            loss = sum(leaf.sum() for leaf in learned.leaves)
            loss.backward()
            return {"loss": 0.0}

        cfg = OuterConfig(iterations=3, eval_it=0, momentum=0.5)
        outer_loop(step, learned, cfg.plan(), open_run(), lambda step: 0.0, lambda step, best: None)
        moved = [float((old - new.detach()).max()) for old, new in zip(before, learned.leaves, strict=True)]
        ways = [3 + 2 * m + m**2 for m in (0.25, 0.25, 0, 0, 0.75)]
        rates = (0.01, 0.02, 0.001, 0.001, 0.03)
        assert moved == pytest.approx([rate * way for rate, way in zip(rates, ways, strict=True)], rel=1e-4)

    def test_momentum_where_none_is_given(self):
        groups = pairs(sim_type="full", momentum_sim=0.0).param_groups()
        assert [group.get("momentum") for group in groups] == [None, None, None, 0.0]


class TestTrouble:
    def test_none(self):
        assert pairs(sim_type="lowrank").trouble() is None

    @pytest.mark.parametrize("rate", [0.0, -0.1, float("nan"), float("inf")])
    @pytest.mark.parametrize("group", ["img", "txt"])
    def test_rates(self, group, rate):
        learned = pairs()
        with torch.no_grad():
            learned.phases[0].lr[group].fill_(rate)
        assert f"the learned rate of {group} became" in learned.trouble()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("side", ["image", "text"])
    def test_values(self, side, value):
        learned = pairs()
        with torch.no_grad():
            (learned.phases[0].images if side == "image" else learned.phases[0].texts).view(-1)[7] = value
        assert learned.trouble() == f"a learned {side} is not finite"

    @pytest.mark.parametrize("kind", ["full", "lowrank"])
    def test_similarity(self, kind):
        learned = pairs(sim_type=kind)
        with torch.no_grad():
            learned.phases[0].similarity.leaves[-1][1, 1] = float("nan")
        assert learned.trouble() == "a learned similarity is not finite"


def start(*args):
    """The phase of a set of one."""
    (phase,) = start_pairs(*args).phases
    return phase


class TestStart:
    def test_distinct_real_images_each_with_its_caption(self, corpus, monkeypatch):
        train, chosen = corpus["train"], []
        real = train.train_images
        monkeypatch.setattr(train, "train_images", lambda images, rng: (chosen.append(images), real(images, rng))[1])
        learned = start(corpus, PairsConfig(num_pairs=(30,)), 16, generator())
        images = chosen[0].tolist()
        assert len(set(images)) == 30 and learned.images.shape == (30, 3, 16, 16)
        # The transform of training shifts by a pixel at most, so the plain image is still the nearest one.
        plain = train.eval_images(torch.arange(96)).flatten(1)
        assert torch.cdist(learned.images.detach().flatten(1), plain).argmin(1).tolist() == images
        for pair, image in enumerate(images):
            own = corpus.texts("train", train.captions_of[image])
            assert (own == learned.texts[pair]).all(1).any()

    def test_the_generator_decides(self, corpus):
        first, again, other = (start(corpus, PairsConfig(num_pairs=(5,)), 16, generator(s)) for s in (1, 1, 2))
        assert torch.equal(first.images, again.images) and torch.equal(first.texts, again.texts)
        assert not torch.equal(first.images, other.images)

    def test_noise_has_the_published_mean_and_spread(self, corpus):
        cfg = PairsConfig(num_pairs=(90,), pix_init="noise", txt_init="noise")
        learned = start(corpus, cfg, 16, generator())
        values = learned.images.detach()
        assert values.shape == (90, 3, 16, 16) and learned.texts.shape == (90, 16)
        published = zip((-0.0626, -0.0221, 0.0680), (1.0451, 1.0752, 1.0539), strict=True)
        for channel, (mean, spread) in enumerate(published):  # of 23,040 numbers each
            assert float(values[:, channel].mean()) == pytest.approx(mean, abs=4 * spread / 23040**0.5)
            assert float(values[:, channel].std()) == pytest.approx(spread, rel=0.02)
        texts = learned.texts.detach()
        assert float(texts.mean()) == pytest.approx(-0.0094, abs=4 * 0.5253 / 1440**0.5)
        assert float(texts.std()) == pytest.approx(0.5253, rel=0.08)

    def test_noise_on_one_side(self, corpus):
        real = start(corpus, PairsConfig(num_pairs=(8,)), 16, generator())
        mixed = start(corpus, PairsConfig(num_pairs=(8,), pix_init="noise"), 16, generator())
        assert torch.equal(real.texts, mixed.texts) and not torch.equal(real.images, mixed.images)
        mixed = start(corpus, PairsConfig(num_pairs=(8,), txt_init="noise"), 16, generator())
        assert torch.equal(real.images, mixed.images) and not torch.equal(real.texts, mixed.texts)

    def test_kmeans_takes_one_image_of_each_cluster(self, corpus, monkeypatch):
        """Twelve tight clusters of eight images each: one of every cluster, with that image's first caption."""
        train, chosen = corpus["train"], []
        real = train.train_images
        monkeypatch.setattr(train, "train_images", lambda images, rng: (chosen.append(images), real(images, rng))[1])
        features = 100 * torch.eye(12).repeat_interleave(8, 0) + 0.1 * torch.randn(96, 12, generator=generator(4))
        cfg = PairsConfig(num_pairs=(12,), pair_init="kmeans")
        learned = start(corpus, cfg, 16, generator(), lambda: features)
        images = chosen[0].tolist()
        assert sorted(image // 8 for image in images) == list(range(12))
        firsts = corpus.texts("train", [train.captions_of[image][0] for image in images])
        assert torch.equal(learned.texts.detach(), firsts)

    @pytest.mark.filterwarnings("ignore:Number of distinct clusters")
    def test_kmeans_never_takes_an_image_twice(self, corpus):
        features = torch.zeros(96, 4)  # all alike
        features[:3] = torch.randn(3, 4, generator=generator(5))
        learned = start(
            corpus, PairsConfig(num_pairs=(50,), pair_init="kmeans"), 16, generator(), lambda: features
        ).images.detach()
        assert len({image.numpy().tobytes() for image in learned}) == 50

    def test_features_are_asked_for_only_when_needed(self, corpus):
        start(corpus, PairsConfig(num_pairs=(2,)), 16, generator(), lambda: pytest.fail("not needed"))

    def test_more_pairs_than_images(self, corpus):
        with pytest.raises(UserError, match="num_pairs is 97"):
            start(corpus, PairsConfig(num_pairs=(97,)), 16, generator())
