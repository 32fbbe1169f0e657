"""What can be added to learned pairs: blended features, an average over the outer steps, a clamped similarity."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from methods.core.inner import Draw
from methods.pair_blending import blending
from methods.pairs import PairsConfig
from tests.methods.conftest import generator, pairs
from utils.errors import UserError


class TestBlending:
    def test_by_hand(self, monkeypatch):
        """λ = ¼, and the partners of the three rows are the third, the first and the second."""
        asked = []
        chance = SimpleNamespace(
            beta=lambda a, b: asked.append((a, b)) or 0.25,
            permutation=lambda count: asked.append(count) or np.array([2, 0, 1]),
        )
        monkeypatch.setattr(np.random, "default_rng", lambda seed: chance)
        blend = blending(Draw(torch.tensor([5, 0, 3]), 11), 0.7)
        assert asked == [(0.7, 0.7), 3]
        rows = torch.tensor([[8.0, -8], [4, 0], [0, 4]])
        expected = [[0.25 * 8, -0.25 * 8 + 0.75 * 4], [0.25 * 4 + 0.75 * 8, -0.75 * 8], [0.75 * 4, 0.25 * 4]]
        assert blend(rows).tolist() == expected

    def test_images_and_texts_are_mixed_alike(self):
        """One λ and one order: features of one width and embeddings of another, mark for mark."""
        for seed in range(5):
            blend = blending(Draw(torch.arange(6), seed), 0.5)
            images, texts = torch.arange(6.0)[:, None].repeat(1, 8), torch.arange(6.0)[:, None]
            torch.testing.assert_close(blend(images)[:, :1], blend(texts))

    def test_the_draw_decides_and_nothing_else(self):
        rows = torch.arange(6.0)[:, None]
        found = [blending(Draw(torch.arange(6), seed), 1.0)(rows) for seed in (3, 3, 4)]
        torch.manual_seed(0)
        again = blending(Draw(torch.tensor([9, 8, 7, 6, 5, 4]), 3), 1.0)(rows)  # whichever pairs are drawn
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], again)
        assert not torch.equal(found[0], found[2])
        state = torch.get_rng_state()
        blending(Draw(torch.arange(6), 3), 1.0)(rows)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("spread", [0.5, 1.0, 4.0])
    def test_weights_are_from_beta(self, spread):
        """Mean ½ and variance 1 / (4 (2 a + 1)), within four standard errors over 4,000 seeds."""
        two = torch.tensor([[1.0], [0.0]])
        mixed = [blending(Draw(torch.arange(2), seed), spread)(two) for seed in range(4000)]
        apart = [rows for rows in mixed if float(rows[0]) != 1.0]  # in the others the order is as it was
        assert abs(len(apart) / 4000 - 0.5) < 4 * 0.5 / 4000**0.5
        weights = torch.stack([rows[0, 0] for rows in apart])  # λ · 1 + (1 − λ) · 0
        variance = 1 / (4 * (2 * spread + 1))
        error = (variance / len(weights)) ** 0.5
        assert float(weights.mean()) == pytest.approx(0.5, abs=4 * error)
        assert float(weights.var()) == pytest.approx(variance, rel=0.1)

    def test_none(self):
        assert blending(Draw(torch.arange(6), 0), 0.0) is None

    def test_gradients_go_to_both(self):
        rows = torch.ones(3, 1, requires_grad=True)
        blending(Draw(torch.arange(3), 1), 1.0)(rows).sum().backward()
        assert rows.grad.flatten().tolist() == pytest.approx([1, 1, 1])  # λ of one, 1 − λ of another


class TestAverage:
    def test_by_hand(self):
        """Decay ¾: the average of 0, then 4, then 8 is 0, 1, 2.75."""
        learned = pairs(sim_type="lowrank", ema_decay=0.75)
        phase, (kept,) = learned.phases[0], learned.average
        start = [tensor.detach().clone() for tensor in phase.tensors]
        for value, mean in ((4.0, 1.0), (8.0, 2.75)):
            with torch.no_grad():
                for tensor, old in zip(phase.tensors, start, strict=True):
                    tensor.copy_(old + value)
            learned.project()
            for tensor, average, old in zip(phase.tensors, kept.tensors, start, strict=True):
                torch.testing.assert_close(average.detach(), old + mean)
                torch.testing.assert_close(tensor.detach(), old + value)  # what learns is not touched by it

    def test_it_is_what_is_judged_and_saved(self, tmp_path):
        learned = pairs(sim_type="full", ema_decay=0.5)
        with torch.no_grad():
            learned.phases[0].images += 2
            learned.phases[0].lr["txt"] += 0.2
            learned.phases[0].similarity.leaves[0] += 0.4
        learned.project()
        saved, (judged,) = learned.published(), learned.pair_sets()
        torch.testing.assert_close(saved["image"], learned.phases[0].images.detach() - 1)
        torch.testing.assert_close(judged.images, saved["image"])
        assert judged.lr == pytest.approx({"img": 0.1, "txt": 0.2}) and float(saved["syn_lr_txt"]) == pytest.approx(0.2)
        torch.testing.assert_close(saved["similarity_mat"], torch.eye(6) + 0.2)
        torch.testing.assert_close(judged.similarity, saved["similarity_mat"])
        state = learned.state_dict()  # the checkpoint has both
        assert torch.equal(state["phases"][0][0], learned.phases[0].images)
        assert torch.equal(state["average"][0][0], saved["image"])
        again = pairs(sim_type="full", ema_decay=0.5, seed=7)
        again.load_state_dict(state)
        assert torch.equal(again.published()["image"], saved["image"])
        assert torch.equal(again.phases[0].images, learned.phases[0].images)

    def test_without_there_is_none(self):
        learned = pairs()
        assert learned.average is None and list(learned.state_dict()) == ["phases"]
        assert learned.shown is learned.phases

    def test_it_starts_as_the_pairs_do_and_shares_nothing_with_them(self):
        learned = pairs(ema_decay=0.9)
        for tensor, average in zip(learned.phases[0].tensors, learned.average[0].tensors, strict=True):
            assert torch.equal(tensor, average) and tensor.data_ptr() != average.data_ptr()
        assert {id(leaf) for leaf in learned.leaves} == {id(leaf) for leaf in learned.phases[0].leaves}

    def test_a_decay_that_never_moves_is_refused(self):
        with pytest.raises(UserError, match=r"--ema_decay 1\.0 would never move; take one below 1"):
            PairsConfig(ema_decay=1.0).check()


class TestClamping:
    def test_full_is_put_back(self):
        learned = pairs(sim_type="full", clamp=True)
        leaf = learned.phases[0].similarity.leaves[0]
        with torch.no_grad():
            leaf[0, 1], leaf[2, 2] = -0.5, 1.5
        learned.project()
        assert torch.equal(leaf.detach(), torch.eye(6))

    def test_low_rank_is_clamped_where_it_is_used(self):
        learned = pairs(sim_type="lowrank", clamp=True)
        similarity = learned.phases[0].similarity
        with torch.no_grad():
            for leaf in similarity.leaves:
                leaf += torch.randn(leaf.shape, generator=generator(3))
        factors = [leaf.detach().clone() for leaf in similarity.leaves]
        learned.project()
        assert all(torch.equal(a, b) for a, b in zip(similarity.leaves, factors, strict=True))
        diag, left, right = factors
        free = torch.diag(diag) + 1.5 * left @ right.T
        assert float(free.max()) > 1 and float(free.min()) < 0
        for matrix in (similarity.matrix(torch.arange(6)).detach(), similarity.saved()[1]):
            torch.testing.assert_close(matrix, free.clamp(0, 1))

    @pytest.mark.parametrize("kind", ["full", "lowrank"])
    def test_the_identity_can_be_left(self, kind):
        """All entries of the start lie on a bound, where clamping must let gradients through to all that can move."""
        similarity = pairs(sim_type=kind, clamp=True).phases[0].similarity
        (similarity.matrix(torch.arange(6)) - 0.5).square().sum().backward()
        gradients = [leaf.grad for leaf in similarity.leaves]
        if kind == "full":  # 1 − ½ and 0 − ½, doubled
            assert torch.equal(gradients[0], 2 * torch.eye(6) - 1)
        else:
            sides = 1.5 * (2 * torch.eye(6) - 1) @ similarity.leaves[1].detach()
            assert torch.equal(gradients[0], torch.ones(6)) and not gradients[1].any()
            torch.testing.assert_close(gradients[2], sides)

    def test_an_entry_beyond_a_bound_stays_there(self):
        similarity = pairs(sim_type="lowrank", clamp=True).phases[0].similarity
        with torch.no_grad():
            similarity.leaves[0][:] = torch.tensor([-0.5, 1.5, 0.5, 0.0, 1.0, 1.25])
        similarity.matrix(torch.arange(6)).diagonal().sum().backward()
        assert similarity.leaves[0].grad.tolist() == [0, 0, 1, 1, 1, 0]

    def test_bounds_to_log(self):
        for kind, clamp, wanted in (
            ("full", False, (-0.5, 1.5)),
            ("full", True, (-0.5, 1.5)),
            ("lowrank", True, (0, 1)),
        ):
            similarity = pairs(sim_type=kind, clamp=clamp).phases[0].similarity
            with torch.no_grad():
                if kind == "full":
                    similarity.leaves[0][0, 1], similarity.leaves[0][2, 2] = -0.5, 1.5
                else:
                    similarity.leaves[0][:] = torch.tensor([-0.5, 1.5, 1, 1, 1, 1])
            found = {name: float(value) for name, value in similarity.bounds().items()}
            assert (found["sim_min"], found["sim_max"]) == wanted
        assert pairs().phases[0].similarity.bounds() == {}
