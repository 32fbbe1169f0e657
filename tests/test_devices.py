"""Nothing that a step of MTT, PoDD or VLDD computes mixes the CPU with another device.

`meta` stands in for a GPU: it computes shapes only, and like a GPU refuses to add tensors of the CPU to its own.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data.dsa import OPS, STRATEGY, augment, crop_scale_rotate, parse_strategy, poster_augment
from data.zca import ZCA
from methods import podd
from methods.core.inner import MODES, InnerAdam, InnerSGD, hypergradient
from methods.core.replay import ReplayConfig
from methods.core.stack import Ascent, Stack, StackTrainer
from methods.core.stepping import some_rows
from methods.core.training import Recipe
from methods.core.trajectories import Segment, matching_loss
from methods.images import SyntheticConfig, SyntheticImages
from methods.lors import Similarity, contrastive_loss
from methods.pair_blending import blending
from methods.pairs import PairsConfig, Phase, SyntheticPairs
from methods.poster import Poster, PosterConfig, PosterSet
from methods.poster_judging import InnerConfig
from methods.poster_layout import GridConfig, plan
from methods.poster_outer import PosterOuterConfig
from networks import build_network
from networks.flat import FlatModule
from networks.towers import TowerConfig, build_towers
from tests.waiting import Waiting, no_waiting
from utils.devices import moved

GPU = torch.device("meta")


def there(*shape: int, **options) -> torch.Tensor:
    return torch.empty(*shape, device=GPU, **options)


@pytest.fixture(scope="module")
def net():
    return build_network("ConvNetD2W8", 16, 10).to(GPU)


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3).to(GPU),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_what_waits_for_a_device_is_found(asks):
    with pytest.raises(Waiting), no_waiting():
        asks(there(3))
    with no_waiting():
        assert (there(3) * moved(torch.ones(3), GPU)).device == GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch tells it of CUDA alone")
def test_nothing_waits_for_a_real_gpu():
    flat, ops = FlatModule(build_network("ConvNetD2W8", 16, 10).cuda()), parse_strategy(STRATEGY)
    images, labels = torch.randn(10, 3, 16, 16, device="cuda"), torch.arange(10, device="cuda")
    learned = SyntheticImages(images, labels, 16, SyntheticConfig(), lambda batch, rng: augment(batch, ops, rng))
    segment = Segment({"net": flat.flatten()}, {"net": flat.flatten() + 1}, 0, 0)

    def step_loss(params, draw):
        images, labels = learned.batch(draw)
        return F.cross_entropy(flat(params["net"], images), labels)

    def outer_step():
        loss = lambda final: matching_loss(final, segment)[0]  # noqa: E731
        draws = learned.draws(torch.Generator(), 12)
        hypergradient(step_loss, segment.start, draws, InnerSGD(learned.lr), loss, learned.leaves)

    outer_step()  # libraries look around when they are first used
    with no_waiting("cuda"):
        outer_step()


def test_the_device_that_stands_in_is_strict():
    with pytest.raises(RuntimeError, match="device"):
        there(3) + torch.ones(3)


@pytest.mark.parametrize("change", [*OPS, crop_scale_rotate], ids=[*OPS, "crop_scale_rotate"])
def test_augmentation(change):
    images, rng = there(4, 3, 16, 16, requires_grad=True), torch.Generator()
    with no_waiting():
        seen = augment(images, (change,), rng) if change in OPS else change(images, rng)
    assert seen.device == GPU and seen.shape == images.shape
    assert torch.autograd.grad(seen.sum(), images)[0].device == GPU


@pytest.mark.parametrize("composed", [False, True])
def test_augmentation_as_podd_has_it(composed):
    change = poster_augment("flip_color_cutout_rotate", composed)
    images = there(4, 3, 16, 16, requires_grad=True)
    for seed in range(4):
        with no_waiting():
            seen = change(images, torch.Generator().manual_seed(seed))
        assert torch.autograd.grad(seen.sum(), images)[0].device == seen.device == GPU


@pytest.mark.parametrize("unit", [False, True])
def test_whitening(unit):
    zca = ZCA(there(48), there(48, 48), there(48, 48), unit)
    assert zca.unwhiten(zca.whiten(there(5, 3, 4, 4))).device == zca.visible(there(5, 3, 4, 4)).device == GPU


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labels": "learned", "batch_syn": 3, "ema_decay": 0.9},
        {"labels": "teacher"},
        {"texture": True, "canvas_samples": 2},
    ],
    ids=str,
)
def test_an_outer_step(net, mode, options):
    cfg, flat, ops = SyntheticConfig(**options), FlatModule(net), parse_strategy(STRATEGY)
    labels = there(10, 10) if "labels" in options else torch.arange(10, device=GPU)
    side = 32 if cfg.texture else 16
    learned = SyntheticImages(there(10, 3, side, side), labels, 16, cfg, lambda images, rng: augment(images, ops, rng))
    if cfg.labels == "teacher":
        learned.relabel(there(10, 10))
    segment = Segment({"net": there(flat.size)}, {"net": there(flat.size)}, 0, 0)

    def step_loss(params, draw):
        images, labels = learned.batch(draw)
        return F.cross_entropy(flat(params["net"], images), labels)

    with no_waiting():
        draws = learned.draws(torch.Generator(), 6)
        hypergradient(
            step_loss,
            segment.start,
            draws,
            InnerSGD(learned.lr),
            lambda final: matching_loss(final, segment)[0],
            learned.leaves,
            mode,
        )
    assert all(leaf.grad.device == GPU for leaf in learned.leaves)
    torch.optim.SGD(learned.param_groups(), lr=0.0, momentum=0.5).step()
    learned.project()
    assert {value.device for value in (*learned.leaves, learned.labels)} == {GPU}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("kind, clamp", [("identity", False), ("full", True), ("lowrank", True)])
def test_an_outer_step_on_pairs(mode, heads, kind, clamp):
    options = {"image_trainable": False, "image_projection": True} if heads else {}
    towers = build_towers(TowerConfig(image_encoder="ConvNetD2W8", joint_width=6, **options), 5, 16, 0).to(GPU)
    cfg = PairsConfig(num_pairs=(6,), sim_type=kind, ema_decay=0.9)
    similarity = Similarity(kind, 6, 2, 1.0, torch.Generator(), GPU, clamp)
    learned = SyntheticPairs([Phase(there(6, 3, 16, 16), there(6, 5), similarity, cfg)], cfg)
    (phase,) = learned.phases
    shapes = {group: part.size for group, part in towers.flat.items()}
    segment = Segment(*({group: there(size) for group, size in shapes.items()} for _ in range(2)), 0, 0)

    def step_loss(params, draw):
        batch = phase.batch(draw)
        u, v = towers.functional(params, batch.images, batch.texts, blending(draw, 1.0))
        return contrastive_loss(u @ v.T, batch.similarity, "WBCE")

    with no_waiting():
        draws = phase.draws(torch.Generator(), 3, 4, consecutive=True)
    with phase.encoded(towers, draws), no_waiting():
        hypergradient(
            step_loss,
            segment.start,
            draws,
            InnerSGD(phase.lr),
            lambda final: matching_loss(final, segment, merged=True)[0],
            phase.leaves,
            mode,
        )
    assert all(leaf.grad.device == GPU for leaf in phase.leaves)
    torch.optim.SGD(learned.param_groups(), lr=0.0, momentum=0.5).step()
    learned.project()
    assert {tensor.device for tensor in (*phase.tensors, *learned.average[0].tensors)} == {GPU}
    assert all(bound.device == GPU for bound in similarity.bounds().values())


@pytest.mark.parametrize("network", ["ConvNetD1W4", "ConvNetD1W4BN"])
@pytest.mark.parametrize("optimiser", ["Adam", "SGD"])
@pytest.mark.parametrize("mode", ["exact", "unroll"])
def test_an_outer_step_of_podd(monkeypatch, network, optimiser, mode):
    """Nor does it wait for the device before all is computed: from `meta` no number can be had."""
    monkeypatch.setattr(podd, "on_host", dict)
    cfg = PosterConfig(train_y=True, train_lr=True, distill_batch_size=4)
    layout = plan(GridConfig(20, 12, 4, 3, 5, 2), 8, torch.arange(10).view(2, 5))
    poster = Poster(there(1, 12, 20), there(10, 2, 5), layout, cfg)
    stack = Stack(build_network(network, 8, 10, 1).to(GPU))
    monkeypatch.setattr(stack, "draw", lambda seeds: there(1, stack.flat.size))  # drawn on the CPU, and then moved
    inner = InnerConfig(inner_optim=optimiser, decay=optimiser == "SGD")
    outer = PosterOuterConfig(real_chunk=3, mode=mode)
    sections = SimpleNamespace(poster=cfg, inner=inner, outer=outer, replay=ReplayConfig())
    rngs = defaultdict(torch.Generator)
    step = podd.PosterStep(stack, poster, sections)
    with no_waiting():
        numbers = step((2, 3), there(8, 1, 8, 8), there(8, dtype=torch.long), SimpleNamespace(rng=rngs.__getitem__))
    assert {leaf.grad.device for leaf in poster.leaves} == {numbers["loss"].device, numbers["lr"].device} == {GPU}
    torch.optim.Adam(poster.param_groups()).step()
    poster.project()
    assert {part.device for part in (*poster.leaves, poster.norm)} == {GPU}


@pytest.mark.parametrize("inner", [InnerAdam(0.01), InnerSGD(0.01, 0.9, 5e-4)], ids=["adam", "sgd"])
def test_a_step_of_networks_on_a_poster(net, inner):
    stack, rng = Stack(net), torch.Generator()
    known = PosterSet(there(12, 3, 16, 16), there(12, 10), 0.01, poster_augment("flip_rotate", False))
    own = [known.batch(some_rows(12, 5, rng), rng) for _ in range(3)]
    state = inner.start({"net": there(3, stack.flat.size)})
    _, grads = stack.gradient(state["net"], *map(torch.stack, zip(*own, strict=True)))
    state = inner.step(0, state, {"net": grads})
    assert {value.device for value in state.values()} == {GPU}


@pytest.mark.parametrize("vectorised", [True, False])
def test_a_step_of_networks_side_by_side(net, vectorised):
    stack = Stack(net, vectorised)
    recipe = Recipe({"net": 0.1}, 2, 0.9, 5e-4, (1,))
    trainer = StackTrainer(stack, there(3, stack.flat.size), recipe, [0, 1, 2], Ascent(0.01, 0.3))
    with no_waiting():
        loss = trainer._step((there(3, 4, 3, 16, 16), there(3, 4, dtype=torch.long)))
    assert loss.device == trainer.weights.device == trainer._momentum.device == GPU
