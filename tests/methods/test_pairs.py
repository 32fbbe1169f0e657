"""The learned pairs: how they start, which of them move and how fast, and the files that hold them."""

from collections import Counter

import pytest
import torch

from methods.core.outer import OuterConfig, outer_loop
from methods.lors import KINDS, Similarity
from methods.pairs import FORMAT, PairsConfig, SyntheticPairs, load_pairs, start_pairs
from utils.errors import UserError

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs(count=6, size=4, width=5, seed=0, **options):
    rng = generator(seed)
    images, texts = torch.randn(count, 3, size, size, generator=rng), torch.randn(count, width, generator=rng)
    cfg = PairsConfig(**{"num_pairs": count, "sim_rank": 2} | options)
    return SyntheticPairs(images, texts, Similarity(cfg.sim_type, count, cfg.sim_rank, cfg.alpha, rng, CPU), cfg)


def everything(learned):
    return [part.detach().clone() for part in (learned.images, learned.texts, *learned.lr.values())]


class TestDraws:
    @pytest.mark.parametrize("size, kept", [(6, 6), (4, 4), (100, 6)])
    def test_each_step_draws_different_pairs(self, size, kept):
        draws = pairs().draws(generator(), 8, size)
        assert len(draws) == 8
        for draw in draws:
            assert len(draw.indices) == kept == len(set(draw.indices.tolist()))
            assert set(draw.indices.tolist()) <= set(range(6))
        assert len({draw.seed for draw in draws}) == 8
        assert len({tuple(draw.indices.tolist()) for draw in draws}) > 4  # a new order each step

    def test_every_pair_is_drawn_as_often(self):
        draws = pairs().draws(generator(), 3000, 2)
        counts = Counter(i for draw in draws for i in draw.indices.tolist())
        assert all(abs(counts[i] - 1000) < 4 * (1000 * 2 / 3) ** 0.5 for i in range(6))

    def test_an_equal_generator_draws_the_same(self):
        first, again, other = (pairs().draws(generator(seed), 4, 3) for seed in (1, 1, 2))
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a.indices, b.indices) and a.seed == b.seed
        assert [d.seed for d in first] != [d.seed for d in other]


class TestBatch:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_holds_the_drawn_pairs(self, kind):
        learned = pairs(sim_type=kind)
        draw = learned.draws(generator(), 1, 4)[0]
        batch = learned.batch(draw)
        for row, pair in enumerate(draw.indices.tolist()):
            assert torch.equal(batch.images[row], learned.images[pair])
            assert torch.equal(batch.texts[row], learned.texts[pair])
        assert batch.similarity is None if kind == "identity" else torch.equal(batch.similarity, torch.eye(4))

    def test_gradients_reach_the_drawn_pairs_alone(self):
        learned = pairs(sim_type="full")
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
        learned = SyntheticPairs(images, texts, similarity, PairsConfig(num_pairs=2))
        images.zero_(), texts.zero_()
        assert float(learned.images.detach().min()) == float(learned.texts.detach().min()) == 1


class TestRates:
    def test_each_leaf_has_its_own(self):
        learned = pairs(sim_type="lowrank", lr_img=1.0, lr_txt=2.0, lr_lr=3.0, lr_sim=4.0)
        rates = {id(leaf): group["lr"] for group in learned.param_groups() for leaf in group["params"]}
        assert rates[id(learned.images)] == 1 and rates[id(learned.texts)] == 2
        assert [rates[id(rate)] for rate in learned.lr.values()] == [3, 3]
        assert [rates[id(leaf)] for leaf in learned.similarity.leaves] == [4, 4, 4]
        assert {id(leaf) for leaf in learned.leaves} == set(rates)

    def test_inner_rates_start_as_asked(self):
        learned = pairs(lr_teacher_img=0.3, lr_teacher_txt=0.2)
        assert {g: float(r.detach()) for g, r in learned.lr.items()} == pytest.approx({"img": 0.3, "txt": 0.2})

    @pytest.mark.parametrize("kept", ["image", "text"])
    def test_one_side_alone(self, open_run, kept):
        """The other stays what it was, bit for bit, whatever the outer loop does."""
        learned = pairs(lr_img=0.1, lr_txt=0.1, **{f"{kept}_only": True})
        before = everything(learned)

        def step(_):
            batch = learned.batch(learned.draws(generator(), 1, 6)[0])
            loss = batch.images.square().mean() + batch.texts.square().mean() + sum(learned.lr.values())
            loss.backward()
            return {"loss": float(loss.detach())}

        cfg = OuterConfig(iterations=3, eval_it=0)
        outer_loop(step, learned, cfg, open_run(), lambda step: 0.0, lambda step, best: None)
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
                learned.lr["img"].fill_(-0.2)
            learned.project()
            assert [float(rate.detach()) for rate in learned.lr.values()] == pytest.approx(wanted)

    def test_nothing_else_is_clamped(self):
        learned = pairs(clamp_lr=0.1)
        before = everything(learned)
        learned.project()
        assert all(torch.equal(a, b) for a, b in zip(before, everything(learned), strict=True))


class TestTrouble:
    def test_none(self):
        assert pairs(sim_type="lowrank").trouble() is None

    @pytest.mark.parametrize("rate", [0.0, -0.1, float("nan"), float("inf")])
    @pytest.mark.parametrize("group", ["img", "txt"])
    def test_rates(self, group, rate):
        learned = pairs()
        with torch.no_grad():
            learned.lr[group].fill_(rate)
        assert f"the learned rate of {group} became" in learned.trouble()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("side", ["image", "text"])
    def test_values(self, side, value):
        learned = pairs()
        with torch.no_grad():
            (learned.images if side == "image" else learned.texts).view(-1)[7] = value
        assert learned.trouble() == f"a learned {side} is not finite"

    @pytest.mark.parametrize("kind", ["full", "lowrank"])
    def test_similarity(self, kind):
        learned = pairs(sim_type=kind)
        with torch.no_grad():
            learned.similarity.leaves[-1][1, 1] = float("nan")
        assert learned.trouble() == "a learned similarity is not finite"


class TestFiles:
    @pytest.mark.parametrize("kind", KINDS)
    def test_round_trip(self, tmp_path, kind):
        learned, other = pairs(sim_type=kind), pairs(sim_type=kind, seed=5)
        with torch.no_grad():
            for leaf in learned.leaves:
                leaf += 0.5
        torch.save(learned.state_dict(), tmp_path / "state.pt")
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for ours, theirs in zip(learned.leaves, other.leaves, strict=True):
            assert torch.equal(ours, theirs) and theirs.requires_grad and theirs.is_leaf
        a, b = learned.pair_set(), other.pair_set()
        assert torch.equal(a.images, b.images) and a.lr == b.lr
        assert (a.similarity is None) == (kind == "identity")

    def test_a_state_is_a_copy(self):
        learned = pairs(sim_type="lowrank")
        state, judged = learned.state_dict(), learned.pair_set()
        parts = [state["image"], state["text"], state["syn_lr_img"], *state["similarity_params"], judged.images]
        before = [part.clone() for part in parts]
        with torch.no_grad():
            for leaf in learned.leaves:
                leaf += 1
        assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))
        assert not judged.images.requires_grad

    def test_the_layout_is_that_of_lors(self):
        state = pairs(sim_type="lowrank").state_dict()
        assert list(state) == [
            "image",
            "text",
            "similarity_params",
            "similarity_mat",
            "syn_lr_img",
            "syn_lr_txt",
        ]
        assert [tuple(part.shape) for part in state["similarity_params"]] == [(6,), (6, 2), (6, 2)]
        assert state["similarity_mat"].shape == (6, 6) and state["syn_lr_img"].shape == ()
        identity = pairs().state_dict()
        assert torch.equal(identity["similarity_mat"], torch.eye(6))
        assert torch.equal(identity["similarity_params"][0], torch.eye(6))

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_distilled_file_gives_the_judged_pairs(self, tmp_path, kind):
        learned = pairs(sim_type=kind)
        with torch.no_grad():
            for leaf in learned.leaves:
                leaf += 0.25
        torch.save(learned.state_dict() | {"meta": {"format": FORMAT, "step": 3}}, tmp_path / "distilled.pt")
        found, meta = load_pairs(tmp_path / "distilled.pt", CPU)
        judged = learned.pair_set()
        assert meta["step"] == 3 and found.lr == judged.lr
        for ours, theirs in (("images", "images"), ("texts", "texts"), ("similarity", "similarity")):
            a, b = getattr(found, ours), getattr(judged, theirs)
            assert (a is None and b is None) or torch.equal(a, b)


def lors_file(path, **changes):
    """A file as LoRS writes it, by hand: low-rank similarity, rates as parameters, nothing else noted."""
    rng = generator(2)
    diag, left, right = torch.ones(4), torch.randn(4, 2, generator=rng), torch.randn(4, 2, generator=rng)
    state = {
        "image": torch.randn(4, 3, 8, 8, generator=rng),
        "text": torch.randn(4, 5, generator=rng),
        "similarity_params": [diag, left, right],
        "similarity_mat": torch.diag(diag) + 3.0 / 2 * left @ right.T,
        "syn_lr_img": torch.tensor(0.12),
        "syn_lr_txt": torch.tensor(0.34),
    }
    state |= changes
    torch.save({name: value for name, value in state.items() if value is not None}, path)
    return state


class TestLoading:
    def test_a_file_of_lors(self, tmp_path):
        state = lors_file(tmp_path / "lors.pt")
        found, meta = load_pairs(tmp_path / "lors.pt", CPU)
        assert meta == {}
        assert torch.equal(found.images, state["image"]) and torch.equal(found.texts, state["text"])
        assert torch.equal(found.similarity, state["similarity_mat"])
        assert found.lr == pytest.approx({"img": 0.12, "txt": 0.34})

    def test_tensors_that_learned_and_other_precisions(self, tmp_path):
        """LoRS saves what autograd holds: parameters, tensors that ask for a gradient."""
        changes = {
            "image": torch.ones(4, 3, 8, 8, dtype=torch.float64).requires_grad_(),
            "similarity_mat": torch.eye(4, dtype=torch.float64),
            "syn_lr_img": torch.tensor([0.5], requires_grad=True),
        }
        lors_file(tmp_path / "lors.pt", **changes)
        found, _ = load_pairs(tmp_path / "lors.pt", CPU)
        assert found.images.dtype == torch.float32 and not found.images.requires_grad
        assert found.similarity is None and found.lr["img"] == 0.5

    @pytest.mark.parametrize("name", ["image", "text", "similarity_mat"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(self, tmp_path, name, value):
        state = lors_file(tmp_path / "good.pt")
        state[name].view(-1)[3] = value
        torch.save(state, tmp_path / "bad.pt")
        with pytest.raises(UserError, match=f"bad.pt: its {name.split('_')[0]} values are not finite"):
            load_pairs(tmp_path / "bad.pt", CPU)

    @pytest.mark.parametrize(
        "changes",
        [
            {"image": torch.zeros(3, 3, 8, 8)},
            {"image": torch.zeros(4, 3, 8)},
            {"text": torch.zeros(5, 5)},
            {"text": torch.zeros(4, 1, 5)},
            {"similarity_mat": torch.eye(3)},
            {"similarity_mat": torch.ones(4)},
        ],
    )
    def test_shapes_that_do_not_belong_together(self, tmp_path, changes):
        lors_file(tmp_path / "bad.pt", **changes)
        with pytest.raises(UserError, match="do not belong together"):
            load_pairs(tmp_path / "bad.pt", CPU)

    @pytest.mark.parametrize("missing", ["image", "text", "similarity_mat", "syn_lr_img", "syn_lr_txt"])
    def test_parts_that_are_missing(self, tmp_path, missing):
        lors_file(tmp_path / "bad.pt", **{missing: None})
        with pytest.raises(UserError, match=r"bad\.pt is no file of distilled pairs"):
            load_pairs(tmp_path / "bad.pt", CPU)

    @pytest.mark.parametrize("content", [[1, 2], {"image": "text"}, torch.zeros(3), {"meta": 3}])
    def test_files_of_something_else(self, tmp_path, content):
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(UserError, match="is no file of distilled pairs"):
            load_pairs(tmp_path / "bad.pt", CPU)

    def test_a_newer_format(self, tmp_path):
        lors_file(tmp_path / "new.pt", meta={"format": FORMAT + 1})
        with pytest.raises(UserError, match=f"format {FORMAT + 1}, newer than this {FORMAT}; update the toolkit"):
            load_pairs(tmp_path / "new.pt", CPU)

    def test_no_file(self, tmp_path):
        with pytest.raises(UserError, match="no distilled file at"):
            load_pairs(tmp_path / "none.pt", CPU)


class TestStart:
    def test_distinct_real_images_each_with_its_caption(self, corpus, monkeypatch):
        train, chosen = corpus["train"], []
        real = train.train_images
        monkeypatch.setattr(train, "train_images", lambda images, rng: (chosen.append(images), real(images, rng))[1])
        learned = start_pairs(corpus, PairsConfig(num_pairs=30), 16, generator())
        images = chosen[0].tolist()
        assert len(set(images)) == 30 and learned.images.shape == (30, 3, 16, 16)
        # The transform of training shifts by a pixel at most, so the plain image is still the nearest one.
        plain = train.eval_images(torch.arange(96)).flatten(1)
        assert torch.cdist(learned.images.detach().flatten(1), plain).argmin(1).tolist() == images
        for pair, image in enumerate(images):
            own = corpus.texts("train", train.captions_of[image])
            assert (own == learned.texts[pair]).all(1).any()

    def test_the_generator_decides(self, corpus):
        first, again, other = (start_pairs(corpus, PairsConfig(num_pairs=5), 16, generator(s)) for s in (1, 1, 2))
        assert torch.equal(first.images, again.images) and torch.equal(first.texts, again.texts)
        assert not torch.equal(first.images, other.images)

    def test_noise_has_the_published_mean_and_spread(self, corpus):
        cfg = PairsConfig(num_pairs=90, pix_init="noise", txt_init="noise")
        learned = start_pairs(corpus, cfg, 16, generator())
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
        real = start_pairs(corpus, PairsConfig(num_pairs=8), 16, generator())
        mixed = start_pairs(corpus, PairsConfig(num_pairs=8, pix_init="noise"), 16, generator())
        assert torch.equal(real.texts, mixed.texts) and not torch.equal(real.images, mixed.images)
        mixed = start_pairs(corpus, PairsConfig(num_pairs=8, txt_init="noise"), 16, generator())
        assert torch.equal(real.images, mixed.images) and not torch.equal(real.texts, mixed.texts)

    def test_kmeans_takes_one_image_of_each_cluster(self, corpus, monkeypatch):
        """Twelve tight clusters of eight images each: one of every cluster, with that image's first caption."""
        train, chosen = corpus["train"], []
        real = train.train_images
        monkeypatch.setattr(train, "train_images", lambda images, rng: (chosen.append(images), real(images, rng))[1])
        features = 100 * torch.eye(12).repeat_interleave(8, 0) + 0.1 * torch.randn(96, 12, generator=generator(4))
        cfg = PairsConfig(num_pairs=12, pair_init="kmeans")
        learned = start_pairs(corpus, cfg, 16, generator(), lambda: features)
        images = chosen[0].tolist()
        assert sorted(image // 8 for image in images) == list(range(12))
        firsts = corpus.texts("train", [train.captions_of[image][0] for image in images])
        assert torch.equal(learned.texts.detach(), firsts)

    @pytest.mark.filterwarnings("ignore:Number of distinct clusters")
    def test_kmeans_never_takes_an_image_twice(self, corpus):
        features = torch.zeros(96, 4)  # all alike
        features[:3] = torch.randn(3, 4, generator=generator(5))
        learned = start_pairs(
            corpus, PairsConfig(num_pairs=50, pair_init="kmeans"), 16, generator(), lambda: features
        ).images.detach()
        assert len({image.numpy().tobytes() for image in learned}) == 50

    def test_features_are_asked_for_only_when_needed(self, corpus):
        start_pairs(corpus, PairsConfig(num_pairs=2), 16, generator(), lambda: pytest.fail("not needed"))

    def test_more_pairs_than_images(self, corpus):
        with pytest.raises(UserError, match="num_pairs is 97"):
            start_pairs(corpus, PairsConfig(num_pairs=97), 16, generator())
