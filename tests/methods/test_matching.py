"""An outer step of matching: branches apart and merged, and LoRS's two passes to the letter."""

import pytest
import torch

from methods.core.inner import Draw
from methods.core.matching import match
from methods.core.trajectories import Segment, matching_loss
from tests.methods.student import HEADS, Student, relative

# img goes from (0, 0) to (3, 4), txt from 0 to 1: ways of 25 and 1.
SEGMENT = Segment(
    {"img": torch.tensor([0.0, 0]), "txt": torch.tensor([0.0])},
    {"img": torch.tensor([3.0, 4]), "txt": torch.tensor([1.0])},
    0,
    0,
)


class TestMergedLoss:
    def test_by_hand(self):
        """img misses by (0, 2), txt by ½: 4/25 + ¼ apart, 4.25 / 26 merged."""
        final = {"img": torch.tensor([3.0, 2], requires_grad=True), "txt": torch.tensor([0.5], requires_grad=True)}
        apart, branches = matching_loss(final, SEGMENT)
        merged, same = matching_loss(final, SEGMENT, merged=True)
        assert float(apart.detach()) == pytest.approx(0.41)
        assert float(merged.detach()) == pytest.approx(4.25 / 26)
        for parts in (branches, same):  # the branches are logged as they are either way
            assert {group: float(part.detach()) for group, part in parts.items()} == pytest.approx(
                {"img": 0.16, "txt": 0.25}
            )
        merged.backward()
        assert final["img"].grad.tolist() == pytest.approx([0, -4 / 26])
        assert final["txt"].grad.tolist() == pytest.approx([-1 / 26])

    def test_it_begins_at_one(self):
        assert float(matching_loss(SEGMENT.start, SEGMENT, merged=True)[0]) == 1

    def test_one_group_is_not_changed_by_it(self):
        segment = Segment({"net": torch.zeros(2)}, {"net": torch.tensor([3.0, 4])}, 0, 0)
        final = {"net": torch.tensor([1.0, 1])}
        assert float(matching_loss(final, segment, True)[0]) == pytest.approx(float(matching_loss(final, segment)[0]))


class Line:
    """Learned are one number a group and the rates; a step draws each weight towards its number: all by hand.

    The loss ½ |θ_img − x|² + ½ |θ_txt − y|² has θ = 0 as its start, so that one step ends at β_img x and β_txt y.
    """

    def __init__(self):
        self.x, self.y = torch.tensor([2.0, 4]).requires_grad_(), torch.tensor([3.0]).requires_grad_()
        self.lr = {"img": torch.tensor(0.5, requires_grad=True), "txt": torch.tensor(0.1, requires_grad=True)}
        self.leaves = [self.x, self.y, *self.lr.values()]

    def step_loss(self, params, draw):
        return ((params["img"] - self.x).square().sum() + (params["txt"] - self.y).square().sum()) / 2

    def match(self, merged, mode="exact"):
        return match(self.step_loss, self, SEGMENT, [Draw(torch.tensor([0]), 0)], mode, merged)


class TestMatch:
    @pytest.mark.parametrize("mode", ["exact", "unroll", "detached"])
    def test_by_hand(self, mode):
        """img ends at (1, 2), (2, 2) short: 8/25; txt at 0.3, 0.7 short: 0.49."""
        line = Line()
        numbers = line.match(False, mode)
        assert numbers == pytest.approx(
            {
                **{"loss": 0.32 + 0.49, "loss_img": 0.32, "loss_txt": 0.49, "lr_img": 0.5, "lr_txt": 0.1},
                **{"start_epoch": 0, "expert": 0},
            }
        )
        assert line.x.grad.tolist() == pytest.approx([2 * -2 * 0.5 / 25] * 2)
        assert line.y.grad.tolist() == pytest.approx([2 * -0.7 * 0.1])
        assert float(line.lr["img"].grad) == pytest.approx(2 * (-2 * 2 - 2 * 4) / 25)
        assert float(line.lr["txt"].grad) == pytest.approx(2 * -0.7 * 3)

    @pytest.mark.parametrize("mode", ["exact", "unroll", "detached"])
    def test_merged_by_hand(self, mode):
        """Pixels and texts by one way of 26, the rates each by their own, as without."""
        line = Line()
        numbers = line.match(True, mode)
        assert numbers["loss"] == pytest.approx(8.49 / 26)
        assert (numbers["loss_img"], numbers["loss_txt"]) == pytest.approx((0.32, 0.49))
        assert line.x.grad.tolist() == pytest.approx([2 * -2 * 0.5 / 26] * 2)
        assert line.y.grad.tolist() == pytest.approx([2 * -0.7 * 0.1 / 26])
        assert float(line.lr["img"].grad) == pytest.approx(2 * (-2 * 2 - 2 * 4) / 25)
        assert float(line.lr["txt"].grad) == pytest.approx(2 * -0.7 * 3)

    def test_starts_apart_are_logged(self):
        segment = Segment(SEGMENT.start, SEGMENT.target, 2, 5, {"img": 2, "txt": 0})
        line = Line()
        numbers = match(line.step_loss, line, segment, [Draw(torch.tensor([0]), 0)], "exact")
        assert {name: numbers[name] for name in ("start_epoch", "start_epoch_img", "start_epoch_txt", "expert")} == {
            **{"start_epoch": 2, "start_epoch_img": 2, "start_epoch_txt": 0, "expert": 5}
        }


def two_passes(student):
    """LoRS as released, from the formulas of TESLA: what each leaf and each rate gets; and the loss and its branches.

    First the steps without a graph: every θ_t is kept, G = Σ g_t. Then, with the residual β (θ* − θ_0) + β² G of each
    branch over its way D, the gradient of Σ_branches 2 residual · g_t by the data, one step at a time. The rates have
    −2 G · (θ_0 − β G − θ*) / D. With `merge`, D of the data is the sum of both.
    """
    segment, phase, groups = student.segment, student.pairs, ("img", "txt")
    theta, kept, total = dict(segment.start), [], {group: 0.0 for group in groups}

    def slopes(weights, draw, graph):
        torch.manual_seed(draw.seed)
        return torch.autograd.grad(student.step_loss(weights, draw), list(weights.values()), create_graph=graph)

    for draw in student.draws[0]:
        weights = {group: theta[group].detach().requires_grad_() for group in groups}
        kept.append(weights)
        for group, slope in zip(groups, slopes(weights, draw, False), strict=True):
            total[group] = total[group] + slope
            theta[group] = theta[group] - phase.lr[group].detach() * slope

    beta = {group: phase.lr[group].detach() for group in groups}
    start, target = segment.start, segment.target
    way = {group: (start[group] - target[group]).square().sum() for group in groups}
    short = {group: start[group] - beta[group] * total[group] - target[group] for group in groups}
    branch = {group: short[group].square().sum() / way[group] for group in groups}
    residual = {
        group: beta[group] * (target[group] - start[group]) + beta[group] ** 2 * total[group] for group in groups
    }
    scale = {group: sum(way.values()) if student.merged else way[group] for group in groups}
    data = [leaf for leaf in phase.leaves if leaf.dim()]
    found = [torch.zeros_like(leaf) for leaf in data]
    for draw, weights in zip(student.draws[0], kept, strict=True):
        pulled = sum(
            (2 * residual[group] * slope).sum() / scale[group]
            for group, slope in zip(groups, slopes(weights, draw, True), strict=True)
        )
        for so_far, part in zip(found, torch.autograd.grad(pulled, data), strict=True):
            so_far += part
    rates = [-2 * (total[group] * short[group]).sum() / way[group] for group in groups]
    return found, rates, branch


@pytest.mark.usefixtures("float64")
class TestLors:
    @pytest.mark.parametrize("merged", [False, True])
    @pytest.mark.parametrize("apart", [False, True])
    @pytest.mark.parametrize("loss_type, clamp", [("WBCE", False), ("WBCE", True), ("InfoNCE", False)])
    def test_detached_is_lors_to_the_letter(self, merged, apart, loss_type, clamp):
        """Pixels, texts, ω, L, R and both rates, four steps; students without dropout, whose masks LoRS redraws."""
        student = Student(
            loss_type=loss_type, clamp=clamp, merged=merged, apart=apart, consecutive=True, batch=3, dropout=0.0
        )
        data, rates, branch = two_passes(student)
        numbers, _ = student.match("detached")
        assert [numbers[f"loss_{group}"] for group in branch] == pytest.approx(
            [float(part) for part in branch.values()]
        )
        ours = [leaf for leaf in student.pairs.leaves if leaf.dim()]
        assert [tuple(leaf.shape) for leaf in ours] == [(6, 3, 8, 8), (6, 5), (6,), (6, 2), (6, 2)]
        for leaf, wanted in zip(ours, data, strict=True):
            assert wanted.abs().max() > 0 and relative(leaf.grad, wanted) < 1e-10
        for rate, wanted in zip(student.pairs.lr.values(), rates, strict=True):
            assert float(rate.grad) == pytest.approx(float(wanted), rel=1e-10)

    @pytest.mark.parametrize("mode", ["exact", "detached"])
    def test_merging_weighs_the_branches_by_their_ways(self, mode):
        """Pixels, texts and similarity: the parts of the branches, weighed by D; the rates keep what each had."""
        merged = Student(merged=True)
        _, found = merged.match(mode)
        way = merged.segment.travelled()
        shares = {group: float(length / sum(way.values())) for group, length in way.items()}
        assert min(shares.values()) < 0.4  # else all this would show nothing
        parts = {}
        for group in way:
            alone = Student()
            weights = {other: float(other == group) for other in way}
            alone.objective = lambda final, student=alone, weights=weights: sum(
                weights[group] * part for group, part in matching_loss(final, student.segment)[1].items()
            )
            parts[group] = alone.grads(mode)[1]
        for at, (leaf, grad) in enumerate(zip(merged.pairs.leaves, found, strict=True)):
            expected = sum(shares[group] * parts[group][at] for group in way)
            for group, rate in merged.pairs.lr.items():
                expected = expected / shares[group] if leaf is rate else expected
            assert relative(grad, expected) < 1e-10

    def test_one_step_and_merged_is_exact(self):
        exact, detached = (Student(merged=True, dropout=0.3) for _ in range(2))
        for student in (exact, detached):
            student.draws[0] = student.draws[0][:1]
        for ours, theirs in zip(detached.match("detached")[1], exact.match("exact")[1], strict=True):
            assert theirs.abs().max() > 0 and relative(ours, theirs) < 1e-12

    @pytest.mark.parametrize("merged", [False, True])
    def test_a_frozen_image_tower_without_a_head(self, merged):
        """One branch is left; its rate learns, the other's has nothing to learn from."""
        student = Student(image_trainable=False, merged=merged)
        numbers, grads = student.match("exact")
        assert "loss_img" not in numbers and len(grads) == 6 and student.pairs.lr["img"].grad is None
        assert all(
            relative(a, b) < 1e-12 for a, b in zip(grads, Student(image_trainable=False).match("exact")[1], strict=True)
        )

    def test_two_heads_are_matched(self):
        numbers, grads = Student(**HEADS).match("exact")
        assert {"loss_img", "loss_txt"} <= set(numbers) and len(grads) == 7
