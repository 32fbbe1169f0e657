"""Compiled inner steps: the gradients are those of the plain way; what cannot be compiled runs as ever, and says so."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.command import command
from methods.core.compiled import MOST, Kernels, Parts
from methods.core.inner import Draw, InnerSGD, hypergradient
from methods.core.replay import Replay, ReplayConfig
from methods.lors import contrastive_loss
from methods.pair_blending import Blending, blending
from networks import build_network
from networks.flat import FlatModule
from networks.towers import TowerConfig, build_towers
from tests.waiting import no_waiting
from utils.errors import UserError
from utils.run import read_log

needs_compiler = pytest.mark.skipif(
    not (torch.cuda.is_available() or shutil.which("g++") or shutil.which("c++")), reason="nothing compiles here"
)
RUNS = {"plain": (), "compiled": ("--compile",)}
NOTE = "note: --compile: inner steps are not compiled, and run as ever: "


class Images:
    """A small network on twelve images, drawn whole and in part."""

    def __init__(self, net: str | nn.Module = "ConvNetD1W4") -> None:
        torch.manual_seed(0)
        self.flat = FlatModule(build_network(net, 8, 3) if isinstance(net, str) else net)
        self.pixels, self.labels = torch.randn(12, 3, 8, 8, requires_grad=True), torch.arange(3).repeat(4)
        self.start = {"net": self.flat.flatten()}
        self.leaves = [self.pixels, torch.tensor(0.05, requires_grad=True)]

    def batch(self, draw):
        strength = torch.rand(len(draw.indices), generator=torch.Generator().manual_seed(draw.seed))
        return self.pixels[draw.indices] * strength[:, None, None, None], None, self.labels[draw.indices]

    def loss(self, params, pixels, nothing, labels):
        assert nothing is None
        return F.cross_entropy(self.flat(params["net"], pixels), labels)


class Pairs:
    """Two heads with dropout, on features that are mixed (RepBlend)."""

    def __init__(self) -> None:
        cfg = TowerConfig(image_encoder="ConvNetD1W4", text_encoder="tfidf", image_trainable=False, joint_width=8)
        self.towers = build_towers(TowerConfig(**vars(cfg) | {"image_projection": True, "dropout": 0.2}), 6, 8, 0)
        torch.manual_seed(1)
        features = self.towers.encode(torch.randn(12, 3, 8, 8)).detach()
        self.features, self.texts = features.requires_grad_(), torch.randn(12, 6, requires_grad=True)
        self.start = self.towers.flatten()
        self.leaves = [self.features, self.texts, torch.tensor(0.1, requires_grad=True)]

    def batch(self, draw):
        blend = blending(draw, 1.0)
        return self.features[draw.indices], self.texts[draw.indices], blend.shares, blend.order

    def loss(self, params, features, texts, *mixed):
        u, v = self.towers.functional(params, features, texts, Blending(*mixed))
        return contrastive_loss(u @ v.T / 0.07)


# The second step draws fewer; the last two have shapes that are known by then.
DRAWS = [Draw(torch.arange(size), seed) for seed, size in enumerate((6, 4, 6, 4))]


def hyper(world, engine=None, mode="exact", draws=DRAWS):
    """The objective, and what it adds to `.grad`."""
    for leaf in world.leaves:
        leaf.grad = None
    loss = hypergradient(
        Parts(world.batch, Kernels(world.loss)),
        *(world.start, draws, InnerSGD(world.leaves[-1]), lambda final: sum(w.square().sum() for w in final.values())),
        *(world.leaves, mode),
        keep=0,
        engine=engine,
    )
    return loss, [leaf.grad for leaf in world.leaves]


def same(world, engine, mode="exact"):
    loss, found = hyper(world, engine, mode)
    plain_loss, plain = hyper(world, None, mode)
    torch.testing.assert_close(loss, plain_loss)
    for ours, theirs in zip(found, plain, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


@pytest.fixture
def quickly(monkeypatch):
    """All but the code that a compiler writes, which takes it half a minute a network."""
    compiling = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda traced, mode, **options: compiling(traced, backend="aot_eager", **options)
    )


@needs_compiler
def test_code_that_a_compiler_wrote(capsys):
    world = Images(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    engine = Parts(world.batch, Kernels(world.loss))
    draw = Draw(torch.arange(6), 0)
    plain, ours = (hyper(world, how, draws=[draw] * 3)[1] for how in (None, engine))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert not engine.kernels.why and capsys.readouterr().out == ""


@pytest.mark.parametrize("world", [Images, Pairs])
def test_compiled_steps_give_the_same_gradients(world, quickly, capsys):
    """Whatever varies from step to step is an input; each shape is compiled once, and none is a surprise later."""
    world = world()
    kernels = Kernels(world.loss)
    engine = Parts(world.batch, kernels)
    same(world, engine)
    assert not kernels.why and len(kernels._found) == 4  # two shapes, there and back
    same(world, engine, "detached")
    with torch.no_grad():
        for leaf in world.leaves[:-1]:
            leaf.add_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(5)))
    same(world, engine)
    assert len(kernels._found) == 4 and capsys.readouterr().out == ""


def test_dropout_follows_the_draw(quickly):
    world = Pairs()
    engine = Parts(world.batch, Kernels(world.loss))
    ours = [engine.gradient(world.start, Draw(torch.arange(6), seed)) for seed in (3, 3, 4)]
    assert torch.equal(ours[0]["txt"], ours[1]["txt"])
    assert not torch.allclose(ours[0]["txt"], ours[2]["txt"], rtol=0.1)


class Noisy(nn.Linear):
    def forward(self, images):
        return super().forward(images.flatten(1) + torch.randn(len(images), 1))


class Asking(nn.Linear):
    def forward(self, images):
        return super().forward(images.flatten(1) * (2 if float(images.detach().sum()) > 0 else 3))


@pytest.mark.parametrize(
    "net, why",
    [("ConvNetD1W4BN", "the network counts"), (Noisy(192, 3), "the network draws by chance"), (Asking(192, 3), "")],
)
def test_what_cannot_be_compiled_runs_as_ever(net, why, capsys):
    world = Images(net)
    kernels = Kernels(world.loss)
    hyper(world, Parts(world.batch, kernels))
    said = capsys.readouterr().out
    assert said.startswith(NOTE + why) and said.count("\n") == 1
    if not isinstance(net, Noisy):
        same(world, Parts(world.batch, kernels))
    assert capsys.readouterr().out == ""


def test_a_machine_without_a_compiler(monkeypatch, capsys):
    def none(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", none)
    world = Images()
    same(world, Parts(world.batch, Kernels(world.loss)))
    assert capsys.readouterr().out == NOTE + "No working C++ compiler found\n"


def test_code_that_computes_something_else_is_not_believed(monkeypatch, capsys):
    def wrong(traced, **options):
        return lambda *inputs: [1.2 * part for part in traced(*inputs)]

    monkeypatch.setattr(torch, "compile", wrong)
    world = Images()
    engine = Parts(world.batch, Kernels(world.loss))
    same(world, engine)
    assert capsys.readouterr().out == f"{NOTE}what came of it is not the same\n"


def test_a_plan_of_compiled_steps_keeps_no_graph(quickly):
    """Compiled steps are all replayed, and are what the plan says they are."""
    world = Images()
    engine = Parts(world.batch, Kernels(world.loss))
    replay = Replay(ReplayConfig(compile=True), "exact", torch.device("cpu"))
    said = replay.plan(engine, world.start, DRAWS, InnerSGD(world.leaves[-1]), world.leaves, 1)
    assert replay.engine(engine) is engine and replay.keep == 0 and ", compiled, " in said


def test_shapes_that_never_end_are_not_compiled(monkeypatch, capsys):
    monkeypatch.setattr("methods.core.compiled._compiled", lambda function, inputs: function)
    world = Images()
    engine = Parts(world.batch, Kernels(world.loss))
    for size in (*range(1, 9), 1, 9):
        draw = Draw(torch.arange(size), 0)
        engine.pull(world.start, engine.gradient(world.start, draw), draw, world.leaves)
    assert len(engine.kernels._found) == MOST
    assert capsys.readouterr().out == NOTE + "its batches have too many shapes\n"


def test_the_flag_is_for_one_way_of_going_back():
    with pytest.raises(UserError, match="--compile differentiates by --pull reverse, not forward"):
        ReplayConfig(compile=True, pull="forward").check()
    told = ReplayConfig(compile=True, memory_budget=1.0)
    assert "compile" in told.idle_with("unroll") and told.idle_with("exact") == {"memory_budget": "--compile false"}


COMMON = ("--device", "cpu", "--syn_steps", 2, "--iterations", 2, "--eval_it", 0)
EXPERTS = ("--device", "cpu", "--num_experts", 1, "--train_epochs", 1, "--batch_size_train", 32, "--eval_freq", 0)
METHODS = {
    "mtt": (
        ("--dataset", "digits", "--model", "ConvNetD2W8", "--train_limit", 64),
        (*COMMON, "--ipc", 1, "--max_start_epoch", 1, "--expert_epochs", 1),
    ),
    "vldd": (
        (
            *("--dataset", "toy", "--toy_images", 64, "--image_size", 16, "--image_encoder", "ConvNetD2W8"),
            *("--text_encoder", "tfidf"),
        ),
        (*COMMON, "--num_pairs", 4, "--max_start_epoch", 1, "--sim_type", "lowrank", "--sim_rank", 2, "--blend", 1),
    ),
    "podd": (
        (
            *("--dataset", "digits", "--model", "ConvNetD2W8", "--poster_width", 30, "--poster_height", 10),
            *("--patch_num_x", 12, "--patch_num_y", 3, "--order_encoder", "words"),
        ),
        (
            *("--device", "cpu", "--window", 3, "--totwindow", 5, "--max_outer_steps", 2, "--test_freq", 0),
            # Adam's first steps make much of rounding: see podd.py.
            *("--inner_optim", "SGD", "--inner_lr", 0.01, "--num_eval", 1, "--eval_steps", 2, "--batch_size", 64),
        ),
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_distillation_takes_the_same_steps(method, quickly, tmp_path, monkeypatch, capsys):
    """Every method that has the flag, its dropout too; the log is the same, up to rounding."""
    monkeypatch.chdir(tmp_path)
    data, learn = METHODS[method]
    data = ("--method", method, *data)
    commands = [("buffer", (*data, *(EXPERTS if method != "podd" else ("--device", "cpu"))))]
    commands += [("distill", (*data, *learn, "--save_dir", name, *flags)) for name, flags in RUNS.items()]
    for verb, words in commands:
        assert command(verb, [str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert said.count(", compiled, about ") == 1 and NOTE not in said
    plain, compiled = (read_log(tmp_path / name) for name in RUNS)
    assert len(plain) == len(compiled) > 0
    for one, other in zip(plain, compiled, strict=True):
        assert one.keys() == other.keys()
        assert all(other[name] == pytest.approx(value, rel=2e-3, abs=1e-6) for name, value in one.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs are CUDA's")
def test_a_cuda_graph_keeps_what_it_gave_and_never_waits():
    world = Images()
    world.flat.net.cuda()
    world.pixels, world.labels = world.pixels.detach().cuda().requires_grad_(), world.labels.cuda()
    world.start = {"net": world.start["net"].cuda()}
    world.batch = lambda draw: (world.pixels[:6] * (1 + draw.seed), None, world.labels[:6])
    engine = Parts(world.batch, Kernels(world.loss))
    draws = [Draw(torch.arange(6, device="cuda"), seed) for seed in range(3)]
    for _ in range(4):  # it warms up, records and replays
        found = [engine.gradient(world.start, draw)["net"] for draw in draws]
    with no_waiting("cuda"):
        found = [engine.gradient(world.start, draw)["net"] for draw in draws]
    for gradient, draw in zip(found, draws, strict=True):
        head = world.start["net"].detach().requires_grad_()
        plain = torch.autograd.grad(world.loss({"net": head}, *world.batch(draw)), head)[0]
        torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
