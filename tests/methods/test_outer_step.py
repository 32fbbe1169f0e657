"""The gradient of an outer step with each ingredient that later papers added, and with all of them together."""

import itertools

import pytest
import torch

from methods import pairs as module
from methods.core.inner import Draw
from tests.methods.conftest import generator
from tests.methods.student import HEADS, STEPS, N, Student, relative, slope

pytestmark = pytest.mark.usefixtures("float64")


class TestSimilarity:
    """Finite differences of a whole outer step by every number of ω, L and R, away from S = I."""

    @pytest.mark.parametrize("clamp", [False, True])
    @pytest.mark.parametrize("loss_type", ["WBCE", "InfoNCE"])
    def test_low_rank_factors(self, loss_type, clamp):
        student = Student(loss_type=loss_type, clamp=clamp)
        exact = student.grads("exact")[1][-3:]
        factors = student.pairs.similarity.leaves
        assert [leaf.shape for leaf in factors] == [(6,), (6, 2), (6, 2)]
        for leaf, grad in zip(factors, exact, strict=True):
            found = torch.tensor([slope(student, leaf, at) for at in range(leaf.numel())])
            assert grad.abs().max() > 1e-4
            torch.testing.assert_close(found, grad.flatten(), rtol=1e-4, atol=1e-8)

    def test_clamping_holds_some_of_these_entries_and_lets_others_go(self):
        """What the test above stands on: entries on both sides of both bounds, and none at a kink or at WBCE's half."""
        clamped, free = (Student(clamp=clamp).pairs.similarity.matrix(torch.arange(N)).detach() for clamp in (1, 0))
        assert torch.equal(clamped, free.clamp(0, 1)) and bool((free < 0).any()) and bool((free > 1).any())
        assert bool(((free > 0) & (free < 1)).any())
        assert min(float((free - kink).abs().min()) for kink in (0, 0.5, 1)) > 1e-4

    def test_full_and_clamped(self):
        student = Student(sim_type="full", loss_type="BCE", clamp=True)
        student.learned.project()
        grad, leaf = student.grads("exact")[1][-1], student.pairs.similarity.leaves[0]
        assert bool(((leaf >= 0) & (leaf <= 1)).all())
        found = torch.tensor([slope(student, leaf, at) for at in range(leaf.numel())])
        torch.testing.assert_close(found, grad.flatten(), rtol=1e-4, atol=1e-8)


class TestAllTogether:
    @pytest.mark.parametrize("heads", [False, True], ids=["trunk", "heads"])
    @pytest.mark.parametrize("blend", [0.0, 1.0])
    @pytest.mark.parametrize("merged", [False, True])
    def test_exact_equals_unroll(self, heads, blend, merged):
        """Every combination, and two phases in turn: pixels, texts, both rates, ω, L and R."""
        towers, seen = HEADS if heads else {}, set()
        for consecutive, apart in itertools.product((False, True), repeat=2):
            options = {"blend": blend, "merged": merged, "consecutive": consecutive, "apart": apart, "batch": 3}
            student = Student(counts=(6, 7), **options, **towers)
            for student.number in (0, 1):
                numbers, exact = student.match("exact")
                oracle, wanted = student.match("unroll")
                assert numbers == pytest.approx(oracle, rel=1e-12) and len(exact) == 7
                for ours, theirs in zip(exact, wanted, strict=True):
                    assert theirs.abs().max() > 0 and relative(ours, theirs) < 1e-10
                seen.add(round(numbers["loss"], 9))
        assert len(seen) == 8  # each ingredient changed what the student met

    @pytest.mark.parametrize("blend, merged, apart", [(1.0, True, True), (0.0, False, False)])
    def test_pixels_and_texts_of_heads_by_finite_differences(self, blend, merged, apart):
        student = Student(blend=blend, merged=merged, apart=apart, consecutive=True, **HEADS)
        loss, grads = student.grads("exact")
        assert float(loss) == pytest.approx(student.value(), rel=1e-12)
        for leaf, grad in zip(student.learned.leaves, grads, strict=True):
            for at in grad.abs().flatten().topk(min(3, grad.numel())).indices.tolist():
                assert slope(student, leaf, at) == pytest.approx(float(grad.view(-1)[at]), rel=1e-4)

    @pytest.mark.parametrize("heads", [False, True], ids=["trunk", "heads"])
    def test_features_and_embeddings_are_mixed_in_front_of_both_heads(self, heads):
        """Behind the trunk, whether it learns or not; the same mix on either side."""
        student = Student(dropout=0.0, **(HEADS if heads else {}))
        towers, phase, draw = student.towers, student.pairs, student.draws[0][0]
        mix = torch.tensor([[0.7, 0, 0.3, 0], [0.3, 0.7, 0, 0], [0, 0, 0.7, 0.3], [0, 0.3, 0, 0.7]])
        images, texts = phase.images[draw.indices], phase.texts[draw.indices]
        u, v = towers.functional(towers.flatten(), towers.encode(images), texts, lambda rows: mix @ rows)
        expected = towers.image.joint(mix @ towers.image.trunk(images)), towers.text(mix @ texts)
        for ours, theirs in zip((u, v), expected, strict=True):
            torch.testing.assert_close(ours, torch.nn.functional.normalize(theirs, dim=1))

    def test_another_phase_gets_no_gradient(self):
        student = Student(counts=(6, 5), **HEADS)
        student.number = 1
        student.match("exact")
        assert all(leaf.grad is None for leaf in student.learned.phases[0].leaves)
        assert all(leaf.grad is not None for leaf in student.learned.phases[1].leaves)


class TestEncodedOnce:
    @pytest.mark.parametrize("mode", ["exact", "unroll", "detached"])
    @pytest.mark.parametrize("blend", [0.0, 0.7])
    def test_the_gradient_is_that_of_encoding_in_every_inner_step(self, mode, blend):
        once, each = (Student(blend=blend, once=once, **HEADS).grads(mode) for once in (True, False))
        assert relative(once[0], each[0]) < 1e-12 and len(once[1]) == len(each[1]) == 7
        for ours, theirs in zip(once[1], each[1], strict=True):
            assert theirs.abs().max() > 0 and relative(ours, theirs) < 1e-10

    @pytest.mark.parametrize("piece", [1, 4, 5])
    def test_so_it_is_for_more_images_than_are_remembered(self, monkeypatch, piece):
        whole = Student(**HEADS).grads("exact")[1]
        monkeypatch.setattr(module, "ENCODED", piece)
        pieces = Student(**HEADS).grads("exact")[1]
        assert all(relative(ours, theirs) < 1e-10 for ours, theirs in zip(pieces, whole, strict=True))

    @pytest.mark.parametrize("piece, images", [(128, [6]), (4, [4, 2, 2, 4])])
    def test_the_trunk_is_asked_once_and_again_only_for_pieces(self, monkeypatch, piece, images):
        """Pieces go through it a second time when the gradient comes back, the last one first."""
        monkeypatch.setattr(module, "ENCODED", piece)
        student, seen = Student(**HEADS), []
        student.towers.image.trunk.register_forward_pre_hook(lambda net, args: seen.append(len(args[0])))
        student.grads("exact")
        assert sorted(seen) == sorted(images)
        student.once = False
        seen.clear()
        student.grads("exact")
        assert seen == [4] * (2 * STEPS - 1)

    def test_what_no_step_draws_is_not_encoded(self):
        student = Student(**HEADS)
        student.draws = [[Draw(torch.tensor(rows), seed) for seed, rows in enumerate(([4, 1], [1, 5]))]]
        seen = []
        student.towers.image.trunk.register_forward_pre_hook(lambda net, args: seen.append(len(args[0])))
        once = student.grads("exact")[1]
        assert seen == [3]
        assert [bool(image.abs().sum()) for image in once[0]] == [False, True, False, False, True, True]
        student.once = False
        assert all(relative(a, b) < 1e-10 for a, b in zip(once, student.grads("exact")[1], strict=True))

    def test_nothing_is_left_behind(self):
        """Outside of a step the pairs are pixels again, also after one that failed."""
        student = Student(**HEADS)
        phase, draw = student.pairs, student.draws[0][0]
        with phase.encoded(student.towers, student.draws[0]):
            assert phase.batch(draw).images.shape == (4, student.towers.image.trunk_width)
            assert phase.leaves[0].shape == (N, student.towers.image.trunk_width) and phase.leaves[0].is_leaf
        assert phase.images.grad is None  # nothing was asked of the features
        with pytest.raises(ZeroDivisionError), phase.encoded(student.towers, student.draws[0]):
            _ = 1 / 0
        assert phase.batch(draw).images.shape == (4, 3, 8, 8) and phase.leaves[0] is phase.images

    def test_a_trunk_that_learns_sees_pixels(self):
        student = Student()
        with student.pairs.encoded(student.towers, student.draws[0]):
            assert student.pairs.leaves[0] is student.pairs.images
        images = torch.randn(2, 3, 8, 8, generator=generator())
        assert student.towers.encode(images) is images

    def test_texts_alone(self):
        """Then the images stand still, and so do their features."""
        student = Student(**HEADS)
        student.pairs.images.requires_grad_(False)
        exact, oracle = (student.grads(mode)[1] for mode in ("exact", "unroll"))
        assert student.pairs.images.grad is None and len(exact) == 6
        assert all(relative(a, b) < 1e-10 for a, b in zip(exact, oracle, strict=True))
