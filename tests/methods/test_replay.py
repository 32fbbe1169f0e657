"""What a step costs, how many graphs a budget holds, and the way through a step by reverse over forward."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from methods.core.inner import Draw, InnerAdam, InnerSGD, hypergradient, second_derivative
from methods.core.meter import Meter, flops, memory
from methods.core.pull import Forward, checked
from methods.core.replay import GIB, Replay, ReplayConfig, StepCost
from networks import build_network
from networks.flat import FlatModule

CPU = torch.device("cpu")
DRAW = Draw(torch.arange(4), 7)


class Pictures:
    """A network that learns six random pictures, in float64 unless told otherwise."""

    def __init__(self, net, size=16, dtype=torch.float64, rows=6):
        torch.manual_seed(0)
        self.flat = FlatModule(net.to(dtype))
        for part in net.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = False
        self.images = torch.randn(rows, 3, size, size, dtype=dtype).requires_grad_()
        self.rate = torch.tensor(0.05, dtype=dtype).requires_grad_()
        self.labels = torch.arange(rows) % 5
        self.start = {"net": self.flat.flatten()}
        self.target = self.start["net"] + 0.01 * torch.randn_like(self.start["net"])
        self.leaves = [self.images, self.rate]

    def step_loss(self, params, draw):
        return F.cross_entropy(self.flat(params["net"], self.images[draw.indices]), self.labels[draw.indices])

    def objective(self, final):
        return (final["net"] - self.target).square().sum()

    def grads(self, steps, inner=InnerSGD, **how):
        for leaf in self.leaves:
            leaf.grad = None
        draws = [Draw(torch.randperm(len(self.images))[:4], step) for step in range(steps)]
        hypergradient(self.step_loss, self.start, draws, inner(self.rate), self.objective, self.leaves, **how)
        return [leaf.grad for leaf in self.leaves]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.heads, self.head = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.norm(self.patch(x).flatten(2).mT)
        q, k, v = self.heads(tokens).chunk(3, -1)
        return self.head((tokens + (q @ k.mT / 8**0.5).softmax(-1) @ v).mean(1))


NETWORKS = {
    "group norm": lambda: build_network("ConvNetD2W8", 16, 5, 3),
    "layer norm and attention": Attention,
    "standardised weights": lambda: timm.create_model("test_nfnet", num_classes=5),
    "no norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.GELU(), nn.Linear(8, 5)),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_reverse_over_forward_is_the_second_derivative(kind):
    """torch's own forward derivatives of normalisation are wrong when differentiated once more: by 13 % and by 22 %
    for layer norm and standardised weights."""
    task = Pictures(NETWORKS[kind](), 32 if "weights" in kind else 16)
    vector = {"net": torch.randn_like(task.start["net"])}
    ours = Forward(task.step_loss).pull(task.start, vector, DRAW, task.leaves)
    plain = second_derivative(task.step_loss, task.start, vector, DRAW, task.leaves)
    for one, other in ((ours[0]["net"], plain[0]["net"]), (ours[1][0], plain[1][0])):
        assert other.norm() > 0
        assert (one - other).norm() < 1e-10 * other.norm()
    assert ours[1][1] is None and plain[1][1] is None  # the rate plays no part in the loss


def test_an_engine_that_cannot_is_told_apart_from_one_that_can():
    task = Pictures(NETWORKS["group norm"]())
    good = Forward(task.step_loss)
    assert checked(good, task.step_loss, task.start, DRAW, task.leaves) is None

    class Wrong(Forward):
        def pull(self, *args):
            bent, through = super().pull(*args)
            return {"net": bent["net"] * 1.01}, through

    assert "not those" in checked(Wrong(task.step_loss), task.step_loss, task.start, DRAW, task.leaves)
    counting = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    batch = Pictures(counting)
    assert checked(Forward(batch.step_loss), batch.step_loss, batch.start, DRAW, batch.leaves)


def test_the_meter_counts_products_and_bytes():
    a, b = torch.randn(10, 20), torch.randn(20, 30)
    assert flops(lambda: a @ b) == 2 * 10 * 20 * 30
    with Meter() as meter:
        c = a @ b
        d = c + 1
        del c
        assert meter.live == d.nbytes
    assert meter.peak == 2 * d.nbytes
    held, peak = memory(lambda: (a @ b).exp(), CPU)
    assert (held, peak) == (4 * 300, 8 * 300)


def test_a_budget_is_filled_and_not_passed():
    cost = StepCost(flops=0, graph=100, pull=150, state=10, gradient=1.0, back=3.0)
    assert [cost.steps_kept(8, budget) for budget in (0, 230, 329, 330, 430, 10_000)] == [1, 1, 1, 2, 3, 8]
    for kept in range(1, 9):
        needed = cost.bytes(8, kept)
        assert needed == (8 - kept) * 10 + (kept - 1) * 100 + 150
        assert cost.steps_kept(8, needed + 10 * kept) >= kept
    assert cost.seconds(2, 8, 3) == 2 + 5 + 8 * 3
    assert cost.seconds(0, 8, 8) == 24


@pytest.mark.parametrize("inner", [InnerSGD, InnerAdam])
@pytest.mark.parametrize("kept", [1, 3, 6])
def test_what_was_foretold_is_what_is_used(inner, kept):
    task = Pictures(NETWORKS["group norm"](), dtype=torch.float32)
    cost = StepCost.measured(task.step_loss, task.start, DRAW, inner(task.rate), task.leaves)
    _, used = memory(lambda: task.grads(6, inner, keep=kept), CPU)
    assert used == pytest.approx(cost.bytes(6, kept), rel=0.2)
    assert cost.flops == flops(lambda: task.step_loss(task.start, DRAW))


def test_measuring_a_step_changes_nothing():
    task = Pictures(NETWORKS["group norm"]())
    before, chance = [leaf.detach().clone() for leaf in task.leaves], torch.get_rng_state()
    StepCost.measured(task.step_loss, task.start, DRAW, InnerSGD(task.rate), task.leaves)
    assert torch.equal(chance, torch.get_rng_state())
    assert all(leaf.grad is None and torch.equal(leaf, was) for leaf, was in zip(task.leaves, before, strict=True))


def plan(task, cfg, mode="exact", window=None, steps=5, outer_steps=1000):
    replay = Replay(cfg, mode, CPU)
    draws = [DRAW] * steps
    told = replay.plan(task.step_loss, task.start, draws, InnerSGD(task.rate), task.leaves, outer_steps, window)
    return replay, told


def test_a_plan_keeps_what_fits_and_says_so():
    task = Pictures(NETWORKS["group norm"](), dtype=torch.float32)
    replay, told = plan(task, ReplayConfig())
    assert replay.keep == 5 and "the graphs of 5 kept" in told and "5 steps of" in told and "for 1,000" in told
    cost = StepCost.measured(task.step_loss, task.start, DRAW, InnerSGD(task.rate), task.leaves)
    two = (cost.pull + 5 * cost.state + 1.5 * cost.graph) / GIB
    replay, told = plan(task, ReplayConfig(memory_budget=two))
    assert replay.keep == 2 and "the graphs of 2 kept" in told and "more than" not in told
    replay, told = plan(task, ReplayConfig(memory_budget=1e-6))
    assert replay.keep == 1 and "more than --memory_budget" in told and "--mode exact takes less" not in told
    _, told = plan(task, ReplayConfig(memory_budget=1e-6), "unroll")
    assert "the graphs of 5 kept" in told and "--mode exact takes less" in told
    assert plan(task, ReplayConfig(), window=3)[0].keep == 3
    assert plan(task, ReplayConfig(), "detached")[0].keep == 1


def test_a_plan_falls_back_where_the_network_counts():
    task = Pictures(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replay, told = plan(task, ReplayConfig(pull="forward"))
    assert "--pull forward is not possible" in told and replay.engine(task.step_loss) is None
    good, told = plan(Pictures(NETWORKS["no norm"]()), ReplayConfig(pull="forward"))
    assert isinstance(good.engine(task.step_loss), Forward) and "not possible" not in told
    assert Replay(ReplayConfig(pull="forward"), "unroll", CPU).engine(task.step_loss) is None


@pytest.mark.parametrize("inner", [InnerSGD, InnerAdam])
@pytest.mark.parametrize("mode", ["exact", "detached"])
def test_every_way_gives_the_gradient_of_plain_unrolling(inner, mode):
    if mode == "detached" and inner is InnerAdam:
        pytest.skip("TESLA's gradient is for plain SGD")
    task = Pictures(NETWORKS["layer norm and attention"]())

    def grads(**how):
        torch.manual_seed(1)
        return task.grads(5, inner, **how)

    wanted = grads(mode="unroll" if mode == "exact" else mode)
    for keep in (0, 1, 2, 5):
        for engine in (None, Forward(task.step_loss)):
            for ours, plain in zip(grads(mode=mode, keep=keep, engine=engine), wanted, strict=True):
                assert (ours - plain).norm() < 1e-9 * plain.norm()


def test_idle_options_are_told():
    given = ReplayConfig(memory_budget=2.0, pull="forward")
    assert set(given.idle_with("unroll")) == {"memory_budget", "pull"}
    assert set(given.idle_with("detached")) == {"memory_budget"}
    assert not given.idle_with("exact") and not ReplayConfig().idle_with("unroll")


def test_budgets_come_from_the_device(monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 * GIB // 4096}.get)
    assert ReplayConfig().budget(CPU) == GIB
    assert ReplayConfig(memory_budget=0.5).budget(CPU) == GIB // 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ReplayConfig().budget(CPU) == GIB // 2
