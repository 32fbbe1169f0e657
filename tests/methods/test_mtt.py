"""The mathematics of MTT against figures worked out by hand, and one whole outer step with a real network."""

import pytest
import torch
import torch.nn.functional as F

from data.dsa import STRATEGY, augment, parse_strategy
from methods.core.inner import Draw, InnerSGD, hypergradient
from methods.core.matching import match
from methods.core.trajectories import Segment, gaps, matching_loss
from methods.images import SyntheticConfig, SyntheticImages
from methods.mtt import ClassMatchConfig
from networks import build_network
from networks.flat import FlatModule
from utils.errors import UserError

# A linear classifier of two classes without bias, two points, one expert's segment.
POINTS = [[1.0, 0.5], [-0.5, 1.0]]
START, TARGET = [0.1, -0.2, 0.0, 0.3], [0.5, -0.4, -0.3, 0.6]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def linear_toy(steps: int, mode: str, rate: float = 0.5):
    """Loss, ∂L/∂X (4,) and ∂L/∂α of the linear classifier after `steps` inner steps."""
    points = torch.tensor(POINTS, requires_grad=True)
    alpha = torch.tensor(rate, requires_grad=True)
    labels = torch.tensor([0, 1])
    segment = Segment({"net": torch.tensor(START)}, {"net": torch.tensor(TARGET)}, 0, 0)

    def step_loss(params, draw):
        return F.cross_entropy(points @ params["net"].view(2, 2).T, labels)

    draws = [Draw(torch.arange(2), seed) for seed in range(steps)]
    loss = hypergradient(
        step_loss,
        segment.start,
        draws,
        InnerSGD(alpha),
        lambda final: matching_loss(final, segment)[0],
        [points, alpha],
        mode,
    )
    return float(loss), points.grad.flatten(), float(alpha.grad)


def test_the_matching_loss():
    start, target = torch.zeros(4), torch.tensor([1.0, 2.0, -2.0, 0.0])
    final = torch.tensor([0.5, 1.0, -1.0, 0.5])
    segment = Segment({"net": start}, {"net": target}, 0, 0)
    assert float(gaps({"net": final}, segment)["net"]) == pytest.approx(0.2777778, abs=1e-7)
    assert float(gaps({"net": start}, segment)["net"]) == 1


@pytest.mark.parametrize("mode", ["exact", "unroll"])
@pytest.mark.parametrize(
    "steps, loss, pixels, rate",
    [
        (1, 0.4463969715, (-0.2365686688, 0.3005605839, 0.1446213520, -0.1224779341), -0.7596011191),
        (2, 0.2464012896, (-0.0735468403, 0.5453802515, -0.0368386242, -0.2156023007), -0.3006393842),
    ],
)
def test_gradient_through_the_inner_loop(mode, steps, loss, pixels, rate):
    found = linear_toy(steps, mode)
    assert found[0] == pytest.approx(loss, abs=1e-9)
    torch.testing.assert_close(found[1], torch.tensor(pixels), atol=2e-9, rtol=0)
    assert found[2] == pytest.approx(rate, abs=1e-9)


def test_tesla_is_an_approximation_of_it():
    _, pixels, rate = linear_toy(2, "detached")
    known = torch.tensor((-0.0757473662, 0.5894766114, -0.0376723223, -0.2339629242))
    torch.testing.assert_close(pixels, known, atol=2e-9, rtol=0)
    assert rate == pytest.approx(-0.3186273692, abs=1e-9)


@pytest.mark.parametrize(
    "rate, steps, error",
    [
        *((0.5, 1, 0), (0.5, 2, 0.081), (0.5, 5, 0.399), (0.5, 20, 1.071)),
        *((0.05, 20, 0.142), (0.05, 50, 0.440), (0.01, 20, 0.028), (0.01, 50, 0.073)),
    ],
)
def test_how_far_tesla_is_off(rate, steps, error):
    exact, unrolled, detached = (linear_toy(steps, mode, rate)[1] for mode in ("exact", "unroll", "detached"))
    assert float((detached - unrolled).norm() / unrolled.norm()) == pytest.approx(error, abs=6e-4)
    assert float((exact - unrolled).norm() / unrolled.norm()) < 1e-13


class Student:
    """Six images of three classes and a ConvNet behind all of DSA; an expert's segment; five inner steps in chunks."""

    def __init__(self, dtype=torch.float64, **options):
        options = {"lr_teacher": 0.05, "batch_syn": 4} | options
        torch.manual_seed(3)
        cfg = SyntheticConfig(ipc=2, **options)
        net = build_network("ConvNetD2W8", 8, 3).to(dtype).train()
        self.flat = FlatModule(net)
        side = 8 * (cfg.canvas_size if cfg.texture else 1)
        labels = torch.arange(3).repeat_interleave(2)
        if cfg.label_kind == "learned":
            labels = torch.randn(6, 3)
        ops = parse_strategy(STRATEGY)
        pixels = torch.randn(6, 3, side, side, dtype=dtype)
        self.images = SyntheticImages(pixels, labels, 8, cfg, lambda batch, rng: augment(batch, ops, rng))
        start = self.flat.flatten()
        self.segment = Segment({"net": start}, {"net": start + 0.05 * torch.randn_like(start)}, 4, 2)
        self.draws = self.images.draws(torch.Generator().manual_seed(5), 5)

    def step_loss(self, params, draw):
        pixels, labels = self.images.batch(draw)
        return F.cross_entropy(self.flat(params["net"], pixels), labels)

    def match(self, mode):
        for leaf in self.images.leaves:
            leaf.grad = None
        numbers = match(self.step_loss, self.images, self.segment, self.draws, mode)
        return numbers, [leaf.grad.clone() for leaf in self.images.leaves]


@pytest.mark.parametrize(
    "options, leaves",
    [({}, 2), ({"labels": "learned"}, 3), ({"texture": True, "canvas_samples": 2}, 2), ({"no_aug": True}, 2)],
    ids=["hard", "learned", "texture", "plain"],
)
def test_exact_equals_unroll_through_augmentation(options, leaves):
    student = Student(**options)
    numbers, exact = student.match("exact")
    again, unrolled = student.match("unroll")
    assert numbers == pytest.approx(again, rel=1e-12) and len(exact) == leaves
    assert (numbers["start_epoch"], numbers["expert"], numbers["lr_net"]) == (4, 2, pytest.approx(0.05))
    for ours, theirs in zip(exact, unrolled, strict=True):
        assert float(theirs.abs().max()) > 0
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-10


@pytest.mark.parametrize("leaf, place", [(0, (4, 1, 3, 5)), (1, ()), (2, (3, 1))], ids=["pixel", "rate", "label"])
def test_gradients_are_those_of_finite_differences(leaf, place):
    """DSA's crops and flips, DATM's labels and the rate, through five replayed steps."""
    student, step = Student(labels="learned"), 1e-5
    _, grads = student.match("exact")
    losses = []
    order = {0: student.images.images, 1: student.images.labels, 2: student.images.lr["net"]}
    target = order[{0: 0, 1: 2, 2: 1}[leaf]]
    for sign in (1, -1):
        with torch.no_grad():
            target[place] += sign * step
        losses.append(student.match("exact")[0]["loss"])
        with torch.no_grad():
            target[place] -= sign * step
    slope = (losses[0] - losses[1]) / (2 * step)
    found = grads[[id(one) for one in student.images.leaves].index(id(target))]
    assert float(found[place]) == pytest.approx(slope, rel=2e-4, abs=1e-9)


def test_float32_is_near_the_oracle():
    torch.set_default_dtype(torch.float32)
    student = Student(torch.float32)
    exact, unrolled = (student.match(mode)[1] for mode in ("exact", "unroll"))
    for ours, theirs in zip(exact, unrolled, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


class TestStartEpochs:
    def test_the_bound_grows_as_datm_has_it(self):
        cfg = ClassMatchConfig(
            max_start_epoch=20, Sequential_Generation=True, current_max_start_epoch=10, expansion_end_epoch=1000
        )
        assert [cfg.starts_below(step) for step in (0, 99, 100, 555, 999, 1000, 5000)] == [10, 10, 11, 15, 19, 20, 20]

    def test_it_is_fixed_otherwise(self):
        cfg = ClassMatchConfig(max_start_epoch=20, current_max_start_epoch=10, expansion_end_epoch=1000)
        assert {cfg.starts_below(step) for step in (0, 10, 2000)} == {20}

    def test_it_is_to_grow_or_not(self):
        growing = {"Sequential_Generation": True, "current_max_start_epoch": 4}
        ClassMatchConfig(max_start_epoch=4, **growing).check()
        with pytest.raises(UserError, match="give the step at which start epochs reach 20"):
            ClassMatchConfig(max_start_epoch=20, **growing).check()

    @pytest.mark.parametrize(
        "options",
        [
            {"min_start_epoch": 5, "max_start_epoch": 5},
            {"Sequential_Generation": True, "current_max_start_epoch": 30, "max_start_epoch": 20},
            {"Sequential_Generation": True, "current_max_start_epoch": 3, "min_start_epoch": 4},
        ],
    )
    def test_an_empty_window_is_refused(self, options):
        with pytest.raises(UserError, match="start epochs from"):
            ClassMatchConfig(**options).check()
