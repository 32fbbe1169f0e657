"""Lower precision: where it acts and where not, how near it stays to float32, and what a device is refused."""

import contextlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.command import command
from methods.core.inner import Draw, InnerSGD, hypergradient
from methods.core.precision import Speed, SpeedConfig, numbers
from methods.core.stack import Stack, StackTrainer
from methods.core.training import Recipe
from methods.lors import contrastive_loss
from networks import build_network
from networks.flat import FlatModule
from networks.layers import wide
from networks.towers import TowerConfig, build_towers
from utils.errors import UserError
from utils.run import read_log

STEPS = 5


def allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def cosine(a, b) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("inside", ["float32", "tf32"])
def test_nothing_of_it_stays_behind(inside):
    before = allowed()
    with numbers(inside):
        assert allowed() == (inside == "tf32",) * 2
        with numbers("float32"):  # as a score within training
            assert allowed() == (False, False)
        assert allowed() == (inside == "tf32",) * 2
    with pytest.raises(KeyError), numbers(inside):
        raise KeyError
    assert allowed() == before
    with Speed("bf16").numbers(), Speed("bf16").forward():
        assert allowed() == (False, False) and torch.is_autocast_enabled("cpu")
    assert allowed() == before and not torch.is_autocast_enabled("cpu")


def test_what_a_device_lacks_is_told():
    with pytest.raises(UserError, match="--precision tf32 needs a CUDA GPU, and this run is on cpu; give"):
        SpeedConfig(precision="tf32").on(torch.device("cpu"))
    with pytest.raises(UserError, match="--precision bf16 is for CPUs and CUDA GPUs, not for mps"):
        SpeedConfig(precision="bf16").on(torch.device("mps"))


class Images:
    """A ConvNet that trains on ten images, and where it should end."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.flat = FlatModule(build_network("ConvNetD3W32", 32, 10))
        self.leaves = [torch.randn(10, 3, 32, 32, requires_grad=True)]
        self.start = {"net": self.flat.flatten()}
        self.seen = set()

    def loss(self, forward, params, draw):
        with forward():
            logits = self.flat(params["net"], self.leaves[0])
        self.seen.add(logits.dtype)
        return F.cross_entropy(wide(logits), draw.indices)


class Pairs:
    """Both towers on eight pairs."""

    def __init__(self) -> None:
        cfg = TowerConfig(image_encoder="ConvNetD3W32", text_encoder="tfidf", dropout=0.1)
        self.towers = build_towers(cfg, 64, 32, 0)
        torch.manual_seed(1)
        self.leaves = [torch.randn(8, 3, 32, 32, requires_grad=True), torch.randn(8, 64, requires_grad=True)]
        self.start = self.towers.flatten()
        self.seen = set()

    def loss(self, forward, params, draw):
        with forward():
            self.seen.add(self.towers.image.joint(self.towers.text(self.leaves[1])).dtype)
            u, v = self.towers.functional(params, *self.leaves)
        assert u.dtype == v.dtype == torch.float32
        return contrastive_loss(u @ v.T / 0.07)


def hyper(world, forward) -> tuple[float, list[torch.Tensor]]:
    """The objective, and its gradient in the leaves and in the inner rate, which stay float32."""
    rng, device = torch.Generator().manual_seed(2), world.leaves[0].device
    rate = torch.tensor(0.02, device=device, requires_grad=True)
    target = {g: w + 0.01 * torch.randn(w.shape, generator=rng).to(device) for g, w in world.start.items()}
    leaves = [*world.leaves, rate]
    for leaf in leaves:
        leaf.grad = None

    def objective(final):
        return sum((final[g] - target[g]).square().sum() / (final[g] - target[g]).numel() for g in final) * 1e4

    draws = [Draw(torch.arange(10, device=device), seed) for seed in range(STEPS)]
    loss = hypergradient(
        lambda params, draw: world.loss(forward, params, draw), world.start, draws, InnerSGD(rate), objective, leaves
    )
    assert loss.dtype == torch.float32 and all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    return float(loss), [leaf.grad.clone() for leaf in leaves]


# Measured: ConvNets of 1 to 50 images and 1 to 20 steps 0.996 to 0.999, heads 0.983 to 0.991, ViT-tiny 0.996, NFNet-l0
# 0.9997; ResNet18 with instance norm 0.67, which says for which networks bf16 is no choice.
@pytest.mark.parametrize("world, least", [(Images, 0.99), (Pairs, 0.97)])
def test_bf16_gives_nearly_the_hypergradient_of_float32(world, least):
    world = world()
    loss, exact = hyper(world, Speed("float32").forward)
    assert world.seen == {torch.float32}
    plain_loss, plain = hyper(world, contextlib.nullcontext)
    assert loss == plain_loss and all(torch.equal(a, b) for a, b in zip(exact, plain, strict=True))
    half_loss, half = hyper(world, Speed("bf16").forward)
    assert torch.bfloat16 in world.seen
    assert half_loss == pytest.approx(loss, rel=5e-3) and half_loss != loss
    for a, b in zip(half[:-1], exact[:-1], strict=True):
        assert cosine(a, b) > least
    assert float(half[-1]) == pytest.approx(float(exact[-1]), rel=0.05)


@pytest.mark.parametrize("together, vectorised", [(1, None), (2, True), (2, False)])
def test_bf16_experts_end_near_those_of_float32(together, vectorised):
    """Twelve steps: the same loss to a hundredth; weights and momentum stay float32."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(together, 8)
    images = torch.randn(3, 3, 8, 8, generator=rng)[labels] + torch.randn(together, 24, 3, 8, 8, generator=rng)
    ends = {"float32": [], "bf16": []}
    for precision in ends:
        stack = Stack(build_network("ConvNetD2W8", 8, 3), vectorised, Speed(precision).forward)
        recipe = Recipe({"net": 0.1}, 3, momentum=0.9)
        trainer, losses = StackTrainer(stack, stack.draw(range(together)), recipe, range(together)), ends[precision]
        trainer.fit(lambda epoch: [(images, labels)] * 4, lambda _, loss, losses=losses: losses.append(loss))
        assert trainer.weights.dtype == torch.float32
    assert (ends["float32"][-1] < 0.6 * ends["float32"][0]).all()
    for a, b in zip(ends["bf16"], ends["float32"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    assert not torch.equal(ends["bf16"][-1], ends["float32"][-1])


# The least that both methods can learn; nothing is judged.
COMMON = ("--device", "cpu", "--syn_steps", 2, "--max_start_epoch", 1, "--expert_epochs", 1, "--eval_it", 0)
EXPERTS = ("--device", "cpu", "--num_experts", 1, "--train_epochs", 1, "--batch_size_train", 32)
METHODS = {
    "mtt": ("--dataset", "digits", "--model", "ConvNetD2W8", "--train_limit", 64),
    "vldd": (
        *("--dataset", "toy", "--toy_images", 64, "--image_size", 16, "--image_encoder", "ConvNetD2W8"),
        *("--text_encoder", "tfidf"),
    ),
}


HEADS = ("--image_trainable", "false", "--image_projection")  # on a frozen trunk, whose features are computed ahead
METHODS["heads"] = (*METHODS["vldd"], *HEADS)
FEW = {"mtt": ("--ipc", 1, "--iterations", 1), "vldd": ("--num_pairs", 4, "--iterations", 1)}
FEW["heads"] = FEW["vldd"]


@pytest.mark.parametrize("method", METHODS)
def test_the_flags_act_on_experts_and_on_the_inner_loop(method, tmp_path, monkeypatch):
    """Both verbs log another loss in bf16, and nearly the same; convolutions are computed in what the flags say, and
    cross-entropies in float32."""
    monkeypatch.chdir(tmp_path)
    seen = set()
    monkeypatch.setattr(F, "conv2d", noting(F.conv2d, lambda found: seen.add((found.dtype, laid_out(found)))))
    monkeypatch.setattr(F, "cross_entropy", in_float32(F.cross_entropy))
    found = {"buffer": [], "distill": []}
    for precision in ("float32", "bf16"):
        speed = ("--method", "mtt" if method == "mtt" else "vldd", *METHODS[method], "--precision", precision)
        speed += ("--channels_last",) if precision == "bf16" else ()
        # Both learn from the same experts.
        for verb, flags in (
            ("buffer", (*EXPERTS, "--buffer_path", f"{precision}/experts")),
            ("distill", (*COMMON, *FEW[method], "--buffer_path", "float32/experts", "--save_dir", f"{precision}/set")),
        ):
            seen.clear()
            assert command(verb, [str(word) for word in (*speed, *flags)]) == 0
            low = {laid for dtype, laid in seen if dtype == torch.bfloat16}
            assert (low == {True}) if precision == "bf16" else (seen == {(torch.float32, False)})
            assert verb == "buffer" or (torch.float32, True) not in seen, "of an inner loop nothing is left out"
            logs = list(Path(precision, "experts" if verb == "buffer" else "set").rglob("log.jsonl"))
            (loss,) = (row["loss"] for log in logs for row in read_log(log.parent) if "loss" in row)
            found[verb].append(loss)
    for exact, half in found.values():
        assert half != exact and half == pytest.approx(exact, rel=0.02)


def noting(function, note):
    """The function, of which each result is shown to `note`."""

    def noted(*args, **kwargs):
        result = function(*args, **kwargs)
        note(result)
        return result

    return noted


def laid_out(images) -> bool:
    """Whether images are channels last, and nothing else as well."""
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def in_float32(cross_entropy):
    def checked(logits, *args, **kwargs):
        assert logits.dtype == torch.float32
        return cross_entropy(logits, *args, **kwargs)

    return checked


@pytest.mark.parametrize("world", [Images, Pairs])
def test_channels_last_is_the_same_to_rounding(world):
    world = world()
    loss, plain = hyper(world, contextlib.nullcontext)
    net = world.flat.net if isinstance(world, Images) else world.towers.image.trunk
    seen, convolutions = [], [part for part in net.modules() if isinstance(part, nn.Conv2d)]
    SpeedConfig(channels_last=True).lay_out(net, "ConvNet")
    for part in convolutions:
        part.register_forward_hook(
            lambda part, inputs, output: seen.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    laid_loss, laid = hyper(world, contextlib.nullcontext)
    assert seen and all(seen)
    assert laid_loss == pytest.approx(loss, rel=1e-5)
    for a, b in zip(laid, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_channels_last_where_there_are_none(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ("--method", "mtt", "--dataset", "digits", "--device", "cpu", "--channels_last")
    said = "--channels_last is for convolutions, and MLP has none; leave it out"
    assert refused("buffer", *data, "--model", "MLP") == said
    assert refused("buffer", *data, "--together", 2).startswith("--channels_last is for experts one by one")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("verb", ["buffer", "distill"])
def test_tf32_on_a_cpu_is_refused(verb, method, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = (
        "--method",
        "vldd" if method == "heads" else method,
        *METHODS[method],
        "--device",
        "cpu",
        "--precision",
        "tf32",
    )
    assert refused(verb, *flags).startswith("--precision tf32 needs a CUDA GPU, and this run is on cpu;")


@pytest.mark.parametrize("world", ["float32", "bf16"])
def test_a_poster_learns_in_it(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ("--method", "podd", "--dataset", "digits", "--model", "ConvNetD2W8", "--device", "cpu")
    poster = ("--poster_width", 30, "--poster_height", 10, "--patch_num_x", 12, "--patch_num_y", 3)
    few = ("--window", 2, "--totwindow", 3, "--max_outer_steps", 1, "--batch_size", 64, "--test_freq", 0)
    judged = ("--num_eval", 1, "--eval_steps", 2, "--order_encoder", "words", "--save_dir", "run")
    seen = set()
    kept = Stack.alone

    def alone(stack, weights, images):
        with stack.forward():
            seen.add(stack.flat(weights, images).dtype)
        return kept(stack, weights, images)

    monkeypatch.setattr(Stack, "alone", alone)
    laid = set()
    monkeypatch.setattr(F, "conv2d", noting(F.conv2d, lambda found: laid.add(laid_out(found))))
    words = (*data, *poster, *few, *judged, "--precision", world, *(("--channels_last",) if world == "bf16" else ()))
    assert command("distill", [str(word) for word in words]) == 0
    assert (torch.bfloat16 in seen) == (True in laid) == (world == "bf16") and len(read_log(tmp_path / "run")) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is a number of CUDA GPUs")
def test_tf32_gives_nearly_the_hypergradient_of_float32():
    world = Images()
    world.flat.net.cuda()
    world.leaves = [world.leaves[0].detach().cuda().requires_grad_()]
    world.start = {"net": world.start["net"].cuda()}
    ends = []
    for precision in ("float32", "tf32"):
        with Speed(precision, "cuda").numbers():
            ends.append(hyper(world, Speed(precision, "cuda").forward)[1][0])
    assert cosine(*ends) > 0.999 and not torch.equal(*ends)
