"""The hypergradient against its oracles: hand-worked numbers, plain unrolling, finite differences, torch.optim.Adam."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from methods.core.inner import Draw, InnerAdam, InnerSGD, hypergradient, unroll
from methods.core.pull import Forward

S, N, B, D, E = 6, 8, 5, 4, 3


class Toy:
    """Two small towers under one contrastive loss, with dropout, in float64: VLDD's shape in miniature."""

    def __init__(self, seed: int = 0, dropout: float = 0.3) -> None:
        torch.manual_seed(seed)
        self.nets = {
            "img": nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, E)).double(),
            "txt": nn.Sequential(nn.Linear(D, E), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(E)).double(),
        }
        self.start = {g: nn.utils.parameters_to_vector(net.parameters()).detach() for g, net in self.nets.items()}
        self.target = {g: v + 0.1 * torch.randn_like(v) for g, v in self.start.items()}
        self.images = torch.randn(N, 6, dtype=torch.float64).requires_grad_()
        self.texts = torch.randn(N, D, dtype=torch.float64).requires_grad_()
        self.lr = {g: torch.tensor(r, dtype=torch.float64, requires_grad=True) for g, r in (("img", 0.2), ("txt", 0.1))}
        rng = torch.Generator().manual_seed(1)
        self.draws = [Draw(torch.randperm(N, generator=rng)[:B], 100 + s) for s in range(S)]
        self.leaves = [self.images, self.texts, *self.lr.values()]

    def call(self, group, vector, x):
        named, weights, at = dict(self.nets[group].named_parameters()), {}, 0
        for name, p in named.items():
            weights[name] = vector[at : at + p.numel()].view_as(p)
            at += p.numel()
        return functional_call(self.nets[group], weights, (x,))

    def step_loss(self, params, draw):
        u = nn.functional.normalize(self.call("img", params["img"], self.images[draw.indices]), dim=1)
        v = nn.functional.normalize(self.call("txt", params["txt"], self.texts[draw.indices]), dim=1)
        logits, own = u @ v.T / 0.2, torch.arange(B)
        return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2

    def objective(self, final):
        return sum((final[g] - self.target[g]).square().sum() for g in final)

    def inner(self, kind):
        if kind == "momentum":
            return InnerSGD(self.lr, momentum=0.9, weight_decay=0.05, milestones=(2, 4), gamma=0.2)
        return InnerSGD(self.lr) if kind == "sgd" else InnerAdam(self.lr, eps=1e-4)

    def grads(self, kind="sgd", mode="exact", window=None, draws=None, keep=1, engine=None):
        for leaf in self.leaves:
            leaf.grad = None
        args = (self.step_loss, self.start, draws or self.draws, self.inner(kind), self.objective, self.leaves)
        loss = hypergradient(*args, mode=mode, window=window, keep=keep, engine=engine and engine(self.step_loss))
        return loss, [leaf.grad.clone() for leaf in self.leaves]


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("keep", [0, 1, 2, 4, 9])
@pytest.mark.parametrize("engine", [None, Forward])
def test_exact_equals_unroll_with_dropout(kind, window, keep, engine):
    toy = Toy()
    loss, exact = toy.grads(kind, "exact", window, keep=keep, engine=engine)
    oracle_loss, oracle = toy.grads(kind, "unroll", window)
    assert relative(loss, oracle_loss) < 1e-12
    for ours, theirs in zip(exact, oracle, strict=True):
        assert theirs.abs().max() > 0
        assert relative(ours, theirs) < 1e-10


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("engine", [None, Forward])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_detached_is_the_same_however_steps_are_replayed(window, keep, engine):
    """Each step gives ⟨−η λ, ∇ℓ⟩ at the weights it had, whatever was kept of it."""
    toy = Toy()
    (loss, ours), (plain_loss, plain) = (
        toy.grads("sgd", "detached", window, keep=kept, engine=by) for kept, by in ((keep, engine), (1, None))
    )
    assert relative(loss, plain_loss) < 1e-12
    for one, other in zip(ours, plain, strict=True):
        assert relative(one, other) < 1e-12


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("mode", ["exact", "detached", "unroll"])
def test_an_objective_may_read_what_is_learned(mode, keep):
    """Its own slope in a leaf is added to what comes through the inner loop."""
    toy = Toy()
    _, through = toy.grads(mode=mode)
    plain, toy.objective = toy.objective, lambda final: plain(final) + 3 * toy.images.sum()
    _, both = toy.grads(mode=mode, keep=keep)
    torch.testing.assert_close(both[0], through[0] + 3, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(both[1], through[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_exact_equals_finite_differences(kind):
    toy = Toy()
    _, exact = toy.grads(kind)
    for leaf, grad in zip(toy.leaves, exact, strict=True):
        at, step = int(grad.abs().argmax()), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf.view(-1)[at] += sign * step
            final = unroll(toy.step_loss, toy.start, toy.draws, toy.inner(kind))
            values.append(float(toy.objective(final).detach()))
            with torch.no_grad():
                leaf.view(-1)[at] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(grad.view(-1)[at]), rel=1e-5)


def test_detached_is_exact_for_one_step_and_for_the_rows_of_the_last_step_only():
    toy = Toy()
    one = toy.draws[:1]
    for ours, theirs in zip(
        toy.grads(mode="detached", draws=one)[1], toy.grads(mode="unroll", draws=one)[1], strict=True
    ):
        assert relative(ours, theirs) < 1e-10
    # Items 0 and 1 occur in the last step alone, so no Hessian term reaches them.
    draws = [Draw(torch.tensor([2, 3, 4, 5, 6]), s) for s in range(S - 1)] + [Draw(torch.tensor([0, 1, 2, 3, 4]), 9)]
    detached, oracle = toy.grads(mode="detached", draws=draws)[1], toy.grads(mode="unroll", draws=draws)[1]
    for side in (0, 1):
        assert relative(detached[side][:2], oracle[side][:2]) < 1e-10
        assert relative(detached[side][2:], oracle[side][2:]) > 1e-3


@pytest.mark.parametrize(
    "mode, pixels, rate", [("exact", (-0.1278, -0.1420), -3.976), ("detached", (-0.142, -0.142), -4.118)]
)
def test_hand_worked_scalar(mode, pixels, rate):
    """One weight, loss ½(θ − x)², two steps: the specification's numbers (section 10, item 5)."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = {"w": torch.zeros(1, dtype=torch.float64)}
    draws = [Draw(torch.tensor([0]), 0), Draw(torch.tensor([1]), 0)]

    def step_loss(params, draw):
        return (params["w"] - x[draw.indices]).square().sum() / 2

    loss = hypergradient(step_loss, start, draws, InnerSGD(lr), lambda f: (f["w"] - 1).square().sum(), [x, lr], mode)
    assert float(loss) == pytest.approx(0.5041)
    assert x.grad.tolist() == pytest.approx(pixels)
    assert float(lr.grad) == pytest.approx(rate)
    first, second = (float(unroll(step_loss, start, draws[:steps], InnerSGD(lr))["w"].detach()) for steps in (1, 2))
    assert (first, second) == pytest.approx((0.1, 0.29))
    assert second / -0.1 == pytest.approx(-2.9)  # G, the sum of both slopes
    if mode == "exact":  # what TESLA drops of the first of two steps: a factor of 1 − β
        assert float(x.grad[0] / x.grad[1]) == pytest.approx(1 - 0.1)


def test_gradients_add_up_over_calls():
    toy = Toy()
    _, once = toy.grads()
    args = (toy.step_loss, toy.start, toy.draws, toy.inner("sgd"), toy.objective, toy.leaves)
    hypergradient(*args)
    for leaf, grad in zip(toy.leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad)


def test_global_chance_is_left_alone():
    toy = Toy()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    toy.grads()
    assert torch.equal(torch.rand(3), expected)


def test_inner_adam_is_torch_adam():
    weights = torch.randn(7, dtype=torch.float64)
    theirs = nn.Parameter(weights.clone())
    optimiser = torch.optim.Adam([theirs], lr=0.03)
    inner, state = InnerAdam(torch.tensor(0.03, dtype=torch.float64)), None
    state = inner.start({"w": weights})
    for number in range(5):
        grad = torch.randn(7, dtype=torch.float64)
        theirs.grad = grad.clone()
        optimiser.step()
        state = inner.step(number, state, {"w": grad})
    torch.testing.assert_close(state["w"], theirs.detach(), rtol=1e-12, atol=1e-14)


def test_inner_sgd_is_torch_sgd():
    weights, milestones = torch.randn(7, dtype=torch.float64), [2, 4]
    theirs = nn.Parameter(weights.clone())
    optimiser = torch.optim.SGD([theirs], lr=0.03, momentum=0.9, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, 0.2)
    inner = InnerSGD(torch.tensor(0.03, dtype=torch.float64), 0.9, 0.05, milestones, 0.2)
    state = inner.start({"w": weights})
    for number in range(6):
        grad = torch.randn(7, dtype=torch.float64)
        theirs.grad = grad.clone()
        optimiser.step()
        schedule.step()
        state = inner.step(number, state, {"w": grad})
        torch.testing.assert_close(state["w"], theirs.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["exact", "unroll"])
@pytest.mark.parametrize(
    "before, window, weight, slope",
    [
        (0, 1, 0.299999999231, -4.142e-10),
        (0, 3, 0.498905214930, -5.776254e-4),
        (2, 3, 0.694653624364, -8.088138e-3),
        (4, 1, 0.694653624364, -2.352985e-3),
    ],
)
def test_hand_worked_windows_of_adam(before, window, weight, slope, mode):
    """One weight, loss ½(θ − y)², outer loss ½(θ − 1)²: the figures of the poster specification (section 10, item 6).

    What came before the window is a constant in the central differences, too.
    """
    y = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    inner, draws = InnerAdam(torch.tensor(0.1, dtype=torch.float64)), [Draw(torch.tensor([0]), 0)] * (before + window)
    start = {"w": torch.tensor([0.2], dtype=torch.float64)}

    def step_loss(params, draw, y=y):
        return (params["w"] - y).square().sum() / 2

    loss = hypergradient(
        step_loss, start, draws, inner, lambda f: (f["w"] - 1).square().sum() / 2, [y], mode, window=window
    )
    final = unroll(step_loss, start, draws, inner)["w"]
    assert float(final.detach()) == pytest.approx(weight, abs=1e-12)
    assert float(loss) == pytest.approx((weight - 1) ** 2 / 2, rel=1e-9)
    assert float(y.grad) == pytest.approx(slope, rel=1e-3 if before + window == 1 else 1e-6)


def test_adam_survives_weights_without_gradient():
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64)

    def step_loss(params, draw):
        return (params["w"][:1] - x).square().sum() + 0 * params["w"][1]

    for mode in ("exact", "unroll"):
        x.grad = None
        draws = [Draw(torch.tensor([0]), 0)] * 3
        hypergradient(step_loss, {"w": w.detach()}, draws, InnerAdam(lr), lambda f: f["w"].square().sum(), [x], mode)
        assert torch.isfinite(x.grad).all()


def test_impossible_requests():
    toy = Toy()
    for kind in ("adam", "momentum"):
        with pytest.raises(ValueError, match="use it with plain SGD"):
            toy.grads(kind, "detached")
    with pytest.raises(ValueError, match="window"):
        toy.grads(window=0)
    with pytest.raises(ValueError, match="mode"):
        toy.grads(mode="magic")
