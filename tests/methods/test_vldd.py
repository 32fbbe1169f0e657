"""One whole outer step of VLDD and LoRS, with real towers: the gradient of each thing that is learned."""

import pytest
import torch

from methods import vldd
from methods.command import command
from methods.core.inner import InnerAdam, InnerSGD, hypergradient, unroll
from methods.core.trajectories import Segment, matching_loss
from methods.lors import LossConfig, Similarity, contrastive_loss, judged_loss
from methods.pairs import PairsConfig, Phase
from networks.towers import TowerConfig, Towers, build_towers

N, SIZE, WIDTH, STEPS = 6, 8, 5, 4


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Student:
    """Six pairs, a ConvNet and a head with dropout, an expert's segment; four inner steps on four pairs each."""

    def __init__(self, encoder="ConvNetD2W4", sim_type="lowrank", loss_type="WBCE", kind="sgd", **towers):
        settings = {"image_encoder": encoder, "joint_width": 6, "dropout": 0.2} | towers
        self.towers = build_towers(TowerConfig(**settings), WIDTH, SIZE, 0).to(torch.get_default_dtype()).train()
        rng = torch.Generator().manual_seed(1)
        images, texts = torch.randn(N, 3, SIZE, SIZE, generator=rng), torch.randn(N, WIDTH, generator=rng)
        similarity = Similarity(sim_type, N, 2, 3.0, rng, "cpu")
        cfg = PairsConfig(num_pairs=(N,), lr_teacher_img=0.05, lr_teacher_txt=0.03)
        self.pairs, self.loss_type = Phase(images, texts, similarity, cfg), loss_type
        with torch.no_grad():
            for leaf in similarity.leaves:  # at the identity some of these gradients are zero
                leaf += 0.3 * torch.randn(leaf.shape, generator=rng)
        start = self.towers.flatten()
        target = {group: vector + 0.1 * torch.randn(vector.shape, generator=rng) for group, vector in start.items()}
        self.segment = Segment(start, target, 0, 0)
        self.draws = self.pairs.draws(rng, STEPS, 4)
        self.inner = InnerSGD(self.pairs.lr) if kind == "sgd" else InnerAdam(self.pairs.lr, eps=1e-3)

    def step_loss(self, params, draw):
        batch = self.pairs.batch(draw)
        u, v = self.towers.functional(params, self.towers.encode(batch.images), batch.texts)
        return contrastive_loss(u @ v.T / 0.2, batch.similarity, self.loss_type)

    def objective(self, final):
        return matching_loss(final, self.segment)[0]

    def grads(self, mode, window=None):
        for leaf in self.pairs.leaves:
            leaf.grad = None
        args = (self.step_loss, self.segment.start, self.draws, self.inner, self.objective, self.pairs.leaves)
        loss = hypergradient(*args, mode, window)
        return loss, [leaf.grad.clone() for leaf in self.pairs.leaves]


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("encoder", ["ConvNetD2W4", "ConvNetD2W4BN", "ConvNetD2W4NN"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize(
    "sim_type, loss_type, leaves", [("identity", "InfoNCE", 4), ("full", "InfoNCE", 5), ("lowrank", "WBCE", 7)]
)
def test_exact_equals_unroll(encoder, kind, sim_type, loss_type, leaves):
    """Pixels, texts, both rates and the similarity's factors; BatchNorm's running statistics play no part."""
    student = Student(encoder, sim_type, loss_type, kind)
    loss, exact = student.grads("exact")
    oracle_loss, oracle = student.grads("unroll")
    assert relative(loss, oracle_loss) < 1e-12 and len(exact) == leaves
    for ours, theirs in zip(exact, oracle, strict=True):
        assert theirs.abs().max() > 0
        assert relative(ours, theirs) < 1e-10
    again = student.grads("exact")[1]
    assert all(torch.equal(a, b) for a, b in zip(again, exact, strict=True))


def test_a_normaliser_free_network_of_timm():
    """The papers' family of image towers: scaled weight standardisation, gated activations."""
    student = Student("test_nfnet", image_pretrained=False)
    exact, oracle = (student.grads(mode)[1] for mode in ("exact", "unroll"))
    assert all(relative(a, b) < 1e-10 for a, b in zip(exact, oracle, strict=True))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("window", [1, 2, STEPS, STEPS + 3])
def test_a_window_of_the_last_steps(kind, window):
    student = Student(kind=kind)
    exact, oracle = (student.grads(mode, window)[1] for mode in ("exact", "unroll"))
    assert all(relative(a, b) < 1e-10 for a, b in zip(exact, oracle, strict=True))
    whole = student.grads("exact")[1]
    assert (relative(exact[0], whole[0]) < 1e-10) == (window >= STEPS)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_exact_equals_finite_differences(kind):
    student = Student(kind=kind)
    leaves, grads = student.pairs.leaves, student.grads("exact")[1]
    for leaf, grad in zip(leaves, grads, strict=True):
        at, step, values = int(grad.abs().argmax()), 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                leaf.view(-1)[at] += sign * step
            final = unroll(student.step_loss, student.segment.start, student.draws, student.inner)
            values.append(float(student.objective(final).detach()))
            with torch.no_grad():
                leaf.view(-1)[at] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(grad.view(-1)[at]), rel=1e-4)


def test_detached_is_an_approximation():
    """Without the Hessian terms the direction is about right, the gradient is not."""
    student = Student()
    detached, oracle = (student.grads(mode)[1] for mode in ("detached", "unroll"))
    assert 0.1 < relative(detached[0], oracle[0]) < 1
    cosine = torch.nn.functional.cosine_similarity(detached[0].flatten(), oracle[0].flatten(), 0)
    assert float(cosine) > 0.6


def test_in_single_precision_too():
    torch.set_default_dtype(torch.float32)
    student = Student()
    exact, oracle = (student.grads(mode)[1] for mode in ("exact", "unroll"))
    assert all(relative(a, b) < 1e-4 for a, b in zip(exact, oracle, strict=True))


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_side_that_stays_real_gets_no_gradient(side):
    student = Student()
    frozen = student.pairs.images if side == "text" else student.pairs.texts
    frozen.requires_grad_(False)
    exact, oracle = (student.grads(mode)[1] for mode in ("exact", "unroll"))
    assert frozen.grad is None and all(relative(a, b) < 1e-10 for a, b in zip(exact, oracle, strict=True))


def test_a_frozen_image_tower_leaves_the_head_to_match():
    """Then `img` has no trajectory, and its rate no gradient."""
    student = Student(image_trainable=False)
    assert list(student.segment.start) == ["txt"]
    args = (student.step_loss, student.segment.start, student.draws, student.inner, student.objective)
    found = []
    for mode in ("exact", "unroll"):
        for leaf in student.pairs.leaves:
            leaf.grad = None
        hypergradient(*args, student.pairs.leaves, mode)
        assert student.pairs.lr["img"].grad is None
        found.append([leaf.grad.clone() for leaf in student.pairs.leaves if leaf.grad is not None])
    assert len(found[0]) == 6 and all(relative(a, b) < 1e-10 for a, b in zip(*found, strict=True))


def test_following_the_gradient_brings_the_student_closer():
    student = Student(sim_type="identity", loss_type="InfoNCE")
    pairs = student.pairs
    data = {"params": [pairs.images, pairs.texts], "lr": 10.0}
    optimizer = torch.optim.SGD([data, {"params": list(pairs.lr.values()), "lr": 1e-3}], lr=0.0)
    losses = []
    for _ in range(15):
        loss, _ = student.grads("exact")
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    "flags, scale",
    [
        ((), 14.285714),
        (("--student_logit_scale", "log"), 2.659260),
        (("--temperature", "0.1"), 10.0),
        (("--temperature", "0.1", "--student_logit_scale", "log"), 2.302585),
    ],
)
def test_the_scale_of_the_students_logits(tiny_run, tmp_path, monkeypatch, flags, scale):
    """1/τ, or with the released code's forgotten exp its logarithm; the command itself is asked."""
    torch.set_default_dtype(torch.float32)
    cosines, logits = [], []
    functional, loss = Towers.functional, vldd.contrastive_loss

    def spy(self, params, *rest):
        u, v = functional(self, params, *rest)
        cosines.append((u @ v.T).detach())
        return u, v

    monkeypatch.setattr(Towers, "functional", spy)
    monkeypatch.setattr(vldd, "contrastive_loss", lambda z, *rest: (logits.append(z.detach()), loss(z, *rest))[1])
    monkeypatch.chdir(tiny_run.root)
    short = ("--num_pairs", "4", "--syn_steps", "2", "--iterations", "1", "--eval_it", "0", "--draw", "false")
    places = ("--buffer_path", str(tiny_run.buffers), "--save_dir", str(tmp_path / "run"), "--device", "cpu")
    gentle = ("--lr_lr", "1e-6")
    assert command("distill", [*map(str, tiny_run.flags), *short, *places, *gentle, *flags]) == 0
    assert len(cosines) == len(logits) >= 2
    for cosine, logit in zip(cosines, logits, strict=True):
        torch.testing.assert_close(logit, scale * cosine, rtol=1e-4, atol=1e-5)


def test_judged_networks_always_have_the_true_scale():
    """InfoNCE of the specification's cosines at 1/0.07."""
    cosines = torch.tensor([[0.5, 0.1, 0], [0.2, 0.4, 0.1], [0, 0.3, 0.6]])
    found = judged_loss(LossConfig())(cosines, torch.eye(3), None)
    assert float(found) == pytest.approx(0.054669, abs=1e-6)
