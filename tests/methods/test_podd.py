"""One outer step of PoDD against slow twins; its real batches, its budget, and when it looks up."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data import build_images
from data.dsa import poster_augment
from data.images import ImagesConfig
from methods import poster_gallery
from methods.command import command
from methods.core.inner import InnerAdam, InnerSGD
from methods.core.replay import ReplayConfig
from methods.core.stack import Stack
from methods.core.stepping import StepJudge
from methods.podd import Buffer, Distill, PosterStep, ShowConfig, _order, soft_cross_entropy
from methods.poster import PosterConfig, start_poster
from methods.poster_files import load_poster
from methods.poster_layout import GridConfig, plan
from methods.poster_order import Order
from methods.poster_outer import PosterOuterConfig, RealBatches
from methods.poster_window import WindowConfig, Windows
from networks import build_network
from utils.config import parse
from utils.errors import UserError
from utils.rng import generator
from utils.run import read_log

GRID = GridConfig(20, 12, 4, 3, 5, 2)  # 12 patches of 8 px, some of which overlap


class World:
    """A poster of digits, a tiny network, and the outer step on them, all in float64."""

    def __init__(self, network="ConvNetD1W4", mode="exact", chunk=7, **options):
        self.data = build_images(ImagesConfig(dataset="digits", holdout=0.0), "cpu")
        layout = plan(GRID, 8, torch.arange(10).view(2, 5))
        options = {"inner_lr": 0.02, "distill_batch_size": 5} | options
        self.cfg = PosterConfig(**options)
        self.poster = start_poster(self.data, layout, self.cfg, generator(0, "init"))
        for name in ("poster", "label_map", "log_lr"):
            leaf = getattr(self.poster, name)
            if leaf is not None:
                setattr(self.poster, name, leaf.detach().double().requires_grad_(leaf.requires_grad))
        if self.poster.label_map is not None:  # away from its edges, where nothing pulls a label down
            self.poster.label_map.data += 0.2
        torch.manual_seed(0)
        self.stack = Stack(build_network(network, 8, 10, 1).double())
        outer = PosterOuterConfig(real_chunk=chunk, mode=mode)
        # Far more than Adam's own epsilon, which hides nothing but would make differences of steps useless.
        inner = SimpleNamespace(optimiser=lambda rate: InnerAdam(rate, eps=1e-3))
        cfg = SimpleNamespace(poster=self.cfg, inner=inner, outer=outer, replay=ReplayConfig())
        self.step = PosterStep(self.stack, self.poster, cfg)
        train, rows = self.data["train"], torch.arange(20)
        self.batch = train.images(rows).double(), train.labels[rows]

    def go(self, before=2, length=3):
        """The numbers and raw gradients of one outer step, always of the same chance."""
        self.poster.norm.fill_(1e9)  # nothing is cut
        for leaf in self.poster.leaves:
            leaf.grad = None
        rngs = {}
        run = SimpleNamespace(rng=lambda name: rngs.setdefault(name, generator(3, name)))
        numbers = self.step((before, length), *self.batch, run)
        return numbers, [leaf.grad.clone() for leaf in self.poster.leaves]


LEARNED = {"train_y": True, "train_lr": True}


@pytest.mark.parametrize("before, length", [(0, 1), (0, 4), (3, 2)])
@pytest.mark.parametrize("options", [LEARNED, {}, LEARNED | {"syn_strategy": "color_cutout_crop", "comp_aug": True}])
def test_replay_equals_unroll(options, before, length):
    exact, oracle = (World(mode=mode, **options).go(before, length) for mode in ("exact", "unroll"))
    assert exact[0] == pytest.approx(oracle[0], rel=1e-12)
    assert len(exact[1]) == (3 if options else 1)
    for ours, theirs in zip(exact[1], oracle[1], strict=True):
        assert theirs.abs().max() > 0
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-10


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_however_many_graphs_are_kept_the_step_is_the_same(keep):
    plain, world = World(**LEARNED), World(**LEARNED)
    said = world.step.plan((2, 4), 100)
    assert "6 steps of" in said and "the graphs of 4 kept" in said and "for 100" in said
    world.step.replay.keep = keep
    ours, theirs = world.go(2, 4), plain.go(2, 4)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-10


@pytest.mark.parametrize("leaf", [0, 1, 2], ids=["poster", "label map", "rate"])
def test_the_gradient_is_that_of_finite_differences(leaf):
    """The whole outer step without a warm-up, whose part is not differentiated: cut, augment, train, judge."""
    world = World(**LEARNED)
    _, grads = world.go(before=0, length=4)
    values, grad = world.poster.leaves[leaf], grads[leaf]
    largest = grad.flatten().abs().topk(min(3, grad.numel())).indices
    for place in zip(*(part.tolist() for part in torch.unravel_index(largest, grad.shape)), strict=True):
        found = []
        for sign in (1, -1):
            values.data[place] += sign * 1e-5
            found.append(world.go(before=0, length=4)[0]["loss"])
            values.data[place] -= sign * 1e-5
        assert (found[0] - found[1]) / 2e-5 == pytest.approx(float(grad[place]), rel=1e-4)


def test_each_inner_step_has_a_chance_of_its_own(monkeypatch):
    """The same one when it is replayed."""
    world, seen = World(), []
    augment = world.step.augment
    monkeypatch.setattr(
        world.step, "augment", lambda images, rng: seen.append(rng.initial_seed()) or augment(images, rng)
    )
    world.go(before=2, length=3)
    assert seen[5:] == [seen[4], seen[3], seen[2]] and len({*seen}) == 5


def test_what_came_before_the_window_is_not_differentiated():
    world = World(**LEARNED)
    whole, window = world.go(before=0, length=5), world.go(before=3, length=2)
    assert whole[0]["loss"] == pytest.approx(window[0]["loss"], rel=1e-12)  # the same training
    assert float((whole[1][0] - window[1][0]).norm() / whole[1][0].norm()) > 0.01
    assert (window[0]["warmup"], window[0]["window"]) == (3, 2)


@pytest.mark.parametrize("network", ["ConvNetD1W4", "ConvNetD1W4BN"])
def test_the_loss_is_that_of_the_whole_real_batch(network):
    """Whatever the pieces; batch norm sees the batch whole."""
    found = [World(network, chunk=chunk).go()[0]["loss"] for chunk in (3, 20)]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_a_long_gradient_is_cut():
    world = World()
    _, (raw,) = world.go()
    world.poster.norm.fill_(float(raw.norm()) / 10)
    rngs = {}
    world.poster.poster.grad = None
    numbers = world.step((2, 3), *world.batch, SimpleNamespace(rng=lambda n: rngs.setdefault(n, generator(3, n))))
    limit = 2 * (0.9 * float(raw.norm()) / 10 + 0.1 * float(raw.norm()))
    assert numbers["grad_norm"] == pytest.approx(float(raw.norm()), rel=1e-9)
    assert float(world.poster.poster.grad.norm()) == pytest.approx(limit, rel=1e-6)


def test_soft_cross_entropy_is_torchs():
    rng = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(5, 4, generator=rng), torch.rand(5, 4, generator=rng).softmax(1)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), F.cross_entropy(logits, targets))


def test_real_batches_cover_each_epoch_once():
    data = build_images(ImagesConfig(dataset="digits", holdout=0.0), "cpu")
    cfg = PosterOuterConfig(batch_size=600, real_strategy="none")
    real = RealBatches(data, cfg, seed=0, epoch_steps=3)  # 1,438 images: 600, 600 and 238
    parts = [real.batch(step) for step in range(6)]
    assert [len(images) for images, _ in parts] == [600, 600, 238] * 2
    for epoch in (parts[:3], parts[3:]):
        seen = torch.cat([images for images, _ in epoch]).flatten(1)
        assert torch.equal(
            seen.sum(1).sort().values, data["train"].images(torch.arange(1438)).flatten(1).sum(1).sort().values
        )
    assert not torch.equal(parts[0][0], parts[3][0])  # another order
    again = RealBatches(data, cfg, seed=0, epoch_steps=3).batch(4)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(again, parts[4], strict=True)
    )  # as a resumed run has it
    images, labels = parts[0]
    own = data["train"].images(data["train"].indices_of(int(labels[0])))
    assert (own == images[0]).flatten(1).all(1).any()  # labels stay with their images


def test_real_images_are_augmented_anew_each_step():
    data = build_images(ImagesConfig(dataset="digits", holdout=0.0), "cpu")
    cfg = PosterOuterConfig(batch_size=600, real_strategy="flip_scale", comp_aug_real=True)
    real, plain = (RealBatches(data, each, seed=0, epoch_steps=3) for each in (cfg, replace(cfg, real_strategy="none")))
    expected = poster_augment("flip_scale", True)(plain.batch(4)[0], generator(0, "real augmentation", 4))
    assert torch.equal(real.batch(4)[0], expected)
    seen = []
    real.augment = lambda images, rng: seen.append(rng.initial_seed()) or images
    for step in (0, 1, 3, 0):
        real.batch(step)
    assert len({*seen}) == 3 and seen[0] == seen[3]


def epochs(cfg, steps=1):
    found = cfg.plan(steps, Windows(WindowConfig(), 0, steps, {}))
    return [step for step in range(found.iterations + 1) if found.due(step)]


@pytest.mark.parametrize("often, evaluations", [(10, 360), (25, 240), (5, 560)])
def test_evaluations_grow_rare_as_released(often, evaluations):
    found = epochs(PosterOuterConfig(test_freq=often))
    assert len(found) == evaluations and found[:2] == [often, 2 * often] and found[-2:] == [9950, 10000]


def test_update_steps_change_when():
    assert epochs(PosterOuterConfig(test_freq=100, update_steps=5, epochs=430))[-4:] == [400, 410, 420, 430]


def test_epochs_and_steps_bound_a_run():
    assert epochs(PosterOuterConfig(epochs=4, test_freq=2), steps=3) == [6, 12]
    assert epochs(PosterOuterConfig(epochs=4, test_freq=2, max_outer_steps=8), steps=3) == [6, 8]
    assert epochs(PosterOuterConfig(epochs=4, test_freq=0), steps=3) == [12]
    assert epochs(PosterOuterConfig(epochs=0), steps=3) == [0]


def test_the_outer_optimiser():
    plan = PosterOuterConfig(eps=1e-3, wd=0.5).plan(1, Windows(WindowConfig(), 0, 1, {}))
    optimiser = plan.optimizer([{"params": [torch.ones(1, requires_grad=True)], "lr": 0.1}])
    (group,) = optimiser.param_groups
    assert type(optimiser) is torch.optim.Adam
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.9, 0.999), 1e-3, 0.5)


@pytest.mark.parametrize(
    "there, given, found",
    [
        (["a.pt"], "a.pt", "a.pt"),
        ([], "a.pt", "a.pt"),
        ([], "a1b2", "checkpoints/a1b2_poster.pt"),
        (["checkpoints/a1b2_poster.pt"], "a1b2", "checkpoints/a1b2_poster.pt"),
        (["checkpoints/v1.0_poster.pt"], "v1.0", "checkpoints/v1.0_poster.pt"),
        (["checkpoints/a1b2_poster.pt", "a1b2"], "a1b2", "a1b2"),
    ],
)
def test_where_a_start_is_looked_for(there, given, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    for name in there:
        Path(name).touch()
    assert ShowConfig(init_from=given).start == Path(found)


def test_options_that_cannot_be():
    with pytest.raises(UserError, match="--update_steps 6 leaves no epochs between evaluations"):
        PosterOuterConfig(update_steps=6).check()
    with pytest.raises(UserError, match="unknown augmentation 'flap' in 'flap_rotate'"):
        PosterOuterConfig(real_strategy="flap_rotate").check()


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--holdout 0", "--select val needs held-out images"),
        ("--holdout 0 --select train --select_step val", "--select_step val needs held-out images"),
        ("--cctype 1 --test_freq 0", "--cctype 1 moves the window by the loss of evaluations; give --test_freq"),
    ],
)
def test_options_that_do_not_go_together(flags, says):
    with pytest.raises(UserError, match=says):
        parse(Distill, "distill", flags.split())


def test_what_does_nothing():
    idle = PosterOuterConfig(real_strategy="none", test_freq=0).idle()
    assert idle == {"comp_aug_real": "a --real_strategy", "update_steps": "--test_freq"}
    assert PosterOuterConfig().idle() == {}


@pytest.fixture
def distilled(tmp_path, monkeypatch):
    """The folder that distill.py fills with a tiny poster; there is no page, whose charts take most of the time."""
    monkeypatch.setattr(poster_gallery, "refresh_page", lambda folder: None)
    flags = "--dataset digits --train_limit 10 --model ConvNetD1W4 --order table --device cpu --draw false"
    flags += " --poster_width 20 --poster_height 12 --patch_num_x 4 --patch_num_y 3 --window 2 --totwindow 4"
    flags += " --batch_size 100 --test_freq 1 --num_eval 1 --eval_steps 9 --lr 0.05 --inner_lr 0.01"
    places = ["--save_dir", str(tmp_path / "o"), "--cache_dir", str(tmp_path / "cache")]

    def call(more):
        assert command("distill", ["--method", "podd", *flags.split(), *more.split(), *places]) == 0
        return tmp_path / "o"

    return call


@pytest.mark.parametrize(
    "select, best",
    [("val", ("val_acc", max)), ("test", ("test_acc", max)), ("train", ("train_loss", min)), ("last", ("step", max))],
)
def test_which_step_is_the_best(select, best, distilled):
    folder, (key, choose) = distilled(f"--max_outer_steps 6 --select {select}"), best
    rows = [row for row in read_log(folder) if any(name.endswith("_acc") for name in row)]
    assert len(rows) == 6 and len({row[key] for row in rows}) > 2
    first = choose(rows, key=lambda row: row[key])["step"]
    assert load_poster(folder / "distilled_best.pt").meta["step"] == first


def test_networks_are_judged_as_the_inner_loop_trains_them(distilled, monkeypatch):
    """But for the step at which their rate falls."""
    seen, sets = [], StepJudge.sets
    monkeypatch.setattr(StepJudge, "sets", lambda *args: seen.append(args[1:]) or sets(*args))
    distilled("--epochs 0 --inner_optim SGD --decay --distill_batch_size 5 --syn_strategy scale --select test")
    ((source, network, inner, batch, split, _, augmentation),) = seen
    assert (network, batch, split, augmentation) == ("ConvNetD1W4", 5, "test", "scale")
    assert source(0).lr == pytest.approx(0.01) and source(0).augment is not None and len(source(0)) == 12
    assert isinstance(inner(0.1), InnerSGD) and tuple(inner(0.1).milestones) == (600,)


def test_an_order_found_by_buffer_is_taken_up_and_told(tmp_path, monkeypatch, capsys):
    """By distill.py alone, and only where the order is left open: buffer.py finds its own."""
    monkeypatch.chdir(tmp_path)
    data, run = build_images(ImagesConfig(dataset="digits"), "cpu"), SimpleNamespace(resumed=False, folder=tmp_path)
    told = Order(torch.arange(10).flip(0).view(2, 5), "me", "")
    told.save("runs/podd/digits/buffers/order.json", data.classes)
    flags = "--dataset digits --order_encoder words"
    taken = _order(parse(Distill, "distill", flags.split())[0], data, run)
    assert torch.equal(taken.grid, told.grid)
    assert "placed as in runs/podd/digits/buffers/order.json, by me; --order text" in capsys.readouterr().out
    for config, verb, more in ((Buffer, "buffer", ""), (Distill, "distill", " --order text")):
        assert _order(parse(config, verb, (flags + more).split())[0], data, run).encoder == "words"
