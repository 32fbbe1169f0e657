"""One whole outer step of VLDD and LoRS, with real towers: the gradient of each thing that is learned."""

import pytest
import torch

from methods import vldd
from methods.command import command
from methods.lors import LossConfig, judged_loss
from networks.towers import Towers
from tests.methods.student import STEPS, Student, relative, slope

pytestmark = pytest.mark.usefixtures("float64")


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
        at = int(grad.abs().argmax())
        assert slope(student, leaf, at) == pytest.approx(float(grad.view(-1)[at]), rel=1e-4)


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
    found = []
    for mode in ("exact", "unroll"):
        found.append(student.grads(mode)[1])
        assert student.pairs.lr["img"].grad is None
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
