"""The learned set of PoDD: how a poster starts, what networks see of it, how its gradient is cut, and what resumes."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import build_images
from data.images import ImageData, ImagesConfig
from methods.poster import Poster, PosterConfig, PosterSet, continue_poster, noise_canvas, real_canvas, start_poster
from methods.poster_files import LoadedPoster, load_poster
from methods.poster_labels import fixed_labels, start_map
from tests.methods.posters import laid, published, toy
from utils.errors import UserError

COLOUR = SimpleNamespace(channels=3, device=torch.device("cpu"))  # all that noise asks of a data set


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def poster(seed=1, shape=None, layout=None, **options):
    """A random poster of the toy layout; with a label map of `shape`, if one is given."""
    layout, rng = layout or toy(), generator(seed)
    canvas = torch.randn(3, *layout.patches.canvas, generator=rng)
    label_map = None if shape is None else torch.rand(layout.classes, *shape, generator=rng)
    return Poster(canvas, label_map, layout, PosterConfig(train_y=shape is not None, **options))


class TestNoise:
    def test_of_the_published_cifar10(self):
        """Plain noise of deviation 1/√3072, a little less where areas fade into each other."""
        canvas = noise_canvas(COLOUR, published("CIFAR10"), generator())
        assert canvas.shape == (3, 60, 153)
        assert float(canvas.std()) == pytest.approx(0.0179, abs=1e-4)
        assert abs(float(canvas.mean())) < 3e-4

    def test_areas_have_length_one(self):
        layout = laid(96, 64, 3, 2, 3, 2, 32)  # side by side
        canvas = noise_canvas(COLOUR, layout, generator())
        areas = layout.areas.cut(canvas).flatten(1)
        torch.testing.assert_close(areas.norm(dim=1), torch.ones(6))
        assert float(areas.std()) == pytest.approx(1 / math.sqrt(3072), rel=0.01)
        alike = (areas @ areas.T).fill_diagonal_(0)
        assert float(alike.abs().max()) < 0.1  # each class has a mean of its own

    def test_around_a_mean_within_a_quarter_of_the_least_distance(self):
        """With few numbers an area, and so means that are near each other, areas stay near their means."""
        layout = laid(4, 2, 2, 1, 2, 1, 2, class_area_width=2, class_area_height=2)
        gray = SimpleNamespace(channels=1)
        for seed in range(20):
            means = torch.randn(2, 4, generator=(rng := generator(seed)))
            spread = (means[0] - means[1]).norm() / 4
            wanted = torch.nn.functional.normalize(means + spread * torch.randn(2, 4, generator=rng))
            found = layout.areas.cut(noise_canvas(gray, layout, generator(seed))).flatten(1)
            torch.testing.assert_close(found, wanted)

    def test_chance_is_the_generators(self):
        first, same, other = (noise_canvas(COLOUR, toy(), generator(seed)) for seed in (3, 3, 4))
        assert torch.equal(first, same) and not torch.equal(first, other)

    def test_a_single_class(self):
        assert torch.isfinite(noise_canvas(COLOUR, laid(6, 6, 2, 2, 1, 1, 4), generator())).all()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five pictures of 4 x 4 for each of four classes: all of class k have tones within [40 k, 40 k + 10)."""
    folder, rng = tmp_path_factory.mktemp("npz"), np.random.default_rng(0)
    labels = np.tile(np.arange(4), 5)
    images = (rng.integers(0, 10, (20, 4, 4, 3)) + 40 * labels[:, None, None, None]).astype(np.uint8)
    test = {"test_images": images[:4], "test_labels": labels[:4], "classes": np.array(list("abcd"))}
    np.savez(folder / "set.npz", train_images=images, train_labels=labels, **test)
    cfg = ImagesConfig(dataset="npz", data_path=str(folder / "set.npz"), holdout=0, cache_dir=str(folder / "cache"))
    return build_images(cfg, "cpu")


class TestReal:
    def test_each_area_is_an_image_of_its_class(self, data):
        layout = laid(8, 8, 2, 2, 2, 2, 4, order=[[2, 0], [3, 1]])
        train, drawn = data["train"], set()
        for seed in range(8):
            areas = layout.areas.cut(real_canvas(data, layout, generator(seed)))
            for area, label in zip(areas, layout.owners().tolist(), strict=True):
                own = train.images(train.indices_of(label))
                (which,) = (own == area).flatten(1).all(1).nonzero()
                drawn.add((label, int(which)))
        assert {label for label, _ in drawn} == {0, 1, 2, 3} and len(drawn) > 8

    def test_areas_of_another_size(self, data):
        layout = laid(12, 9, 3, 3, 2, 2, 4, class_area_width=6, class_area_height=5)
        canvas = real_canvas(data, layout, generator())
        assert canvas.shape == (3, 9, 12) and torch.isfinite(canvas).all()
        tones = layout.areas.cut(canvas).mean((1, 2, 3))[[0, 2, 1, 3]]  # row by row
        assert torch.equal(tones.argsort(), torch.arange(4))


class TestStart:
    @pytest.mark.parametrize("init", ["noise", "real"])
    def test_fixed_labels(self, data, init):
        draw = {"noise": noise_canvas, "real": real_canvas}[init]
        found = start_poster(data, toy(), PosterConfig(poster_init=init, label_mode="area"), generator(5))
        assert torch.equal(found.poster, draw(data, toy(), generator(5)))
        assert found.label_map is None and torch.equal(found.cut()[1], fixed_labels(toy(), "area"))

    @pytest.mark.parametrize("rule, shape", [("exact", (3, 4)), ("reference", (3, 3))])
    def test_learned_labels(self, data, rule, shape):
        """Three cells a class; 12 cells on 6 x 7 pixels: 3.21 rows of 3.74 columns, and 3 x 4 wastes nothing."""
        layout = laid(7, 6, 3, 3, 2, 2, 4)
        found = start_poster(data, layout, PosterConfig(train_y=True, comp_ipc=3, label_shape=rule), generator())
        assert torch.equal(found.label_map, start_map(layout, shape))

    def test_going_on_from_a_file(self, data, tmp_path):
        canvas, label_map = torch.randn(3, 6, 6), torch.rand(4, 2, 3)
        torch.save(canvas[None], tmp_path / "run_poster.pt")
        learned = PosterConfig(train_y=True)
        for cfg in (PosterConfig(), learned):
            found = going_on(tmp_path / "run_poster.pt", data, cfg)
            assert torch.equal(found.poster, canvas)
        assert torch.equal(found.label_map, start_map(toy(), (2, 2)))  # a new one
        torch.save(label_map[None], tmp_path / "run_label.pt")
        assert torch.equal(going_on(tmp_path / "run_poster.pt", data, learned).label_map, label_map)
        with pytest.raises(UserError, match=r"has learned labels, .*; give --train_y$"):
            going_on(tmp_path / "run_poster.pt", data, PosterConfig())
        torch.save(label_map[None, :3], tmp_path / "run_label.pt")
        with pytest.raises(UserError, match=r"has labels of 3 classes, .* has 4"):
            going_on(tmp_path / "run_poster.pt", data, learned)

    @pytest.mark.parametrize("learned, rate", [(True, 0.02), (False, 0.001)])
    def test_a_learned_rate_goes_on(self, data, learned, rate):
        file = LoadedPoster(torch.randn(3, 6, 6), None, 0.02)
        found = continue_poster("file", file, data, toy(), PosterConfig(train_lr=learned))
        assert float(found.lr.detach()) == pytest.approx(rate, rel=1e-6)

    @pytest.mark.parametrize(
        "shape, words",
        [
            ((3, 6, 7), "is of 7 x 6 pixels .width x height., the plan of 6 x 6"),
            ((1, 6, 6), "has 1 channels, .* have 3"),
        ],
    )
    def test_a_file_of_another_poster(self, data, tmp_path, shape, words):
        torch.save(torch.rand(1, *shape), tmp_path / "run_poster.pt")
        with pytest.raises(UserError, match=words):
            going_on(tmp_path / "run_poster.pt", data, PosterConfig())


def going_on(file: Path, data: ImageData, cfg: PosterConfig) -> Poster:
    return continue_poster(file, load_poster(file), data, toy(), cfg)


def clipped(found: Poster, norm: float, keep: bool = True) -> float:
    """The norm that a gradient of this one is cut to."""
    direction = torch.randn(found.poster.shape, generator=generator(7))
    found.poster.grad = direction * (norm / direction.norm())
    assert float(found.clip()) == pytest.approx(norm, rel=1e-5, nan_ok=True)
    after = found.poster.grad
    if math.isfinite(norm):
        torch.testing.assert_close(after / after.norm(), direction / direction.norm())
    if keep:
        found.project()
    return float(after.norm())


class TestClip:
    # Norm of each step, what it is cut to, and the mean that it leaves.
    STEPS = ((1, 1, 1), (1, 1, 1), (4, 2.6, 1.3), (100, 22.34, 11.17), (1, 1, 10.153), (1, 1, 9.2377))

    def test_known_figures(self):
        found = poster(clip_coef=0.9)
        for norm, cut, mean in self.STEPS:
            assert clipped(found, norm) == pytest.approx(cut, rel=1e-4)
            assert float(found.norm) == pytest.approx(mean, rel=1e-4)

    @pytest.mark.parametrize("skipped", [1000.0, float("nan"), float("inf")])
    def test_a_skipped_step_leaves_no_trace(self, skipped):
        found = poster()
        for norm, cut, mean in self.STEPS:
            before = float(found.norm)
            clipped(found, skipped, keep=False)
            assert float(found.norm) == before
            assert clipped(found, norm) == pytest.approx(cut, rel=1e-4)
            assert float(found.norm) == pytest.approx(mean, rel=1e-4)

    def test_a_step_computed_twice_counts_once(self):
        found = poster()
        for norm, cut, mean in self.STEPS:
            assert clipped(found, norm, keep=False) == clipped(found, norm) == pytest.approx(cut, rel=1e-4)
            found.project()  # nothing is left to count
            assert float(found.norm) == pytest.approx(mean, rel=1e-4)

    def test_the_share_that_is_kept(self):
        found = poster(clip_coef=0.5)
        clipped(found, 1)
        assert clipped(found, 9) == pytest.approx(9)  # twice (1 + 9) / 2 is more
        assert float(found.norm) == pytest.approx(5)
        without = poster(clip_coef=0.0)
        clipped(without, 1)
        assert clipped(without, 9) == pytest.approx(9) and float(without.norm) == pytest.approx(9)

    def test_without_a_gradient(self):
        found = poster()
        assert clipped_zero(found) == 0 and float(found.norm) == 0

    def test_only_the_posters_gradient_is_cut(self):
        found = poster(shape=(2, 2), train_lr=True)
        clipped(found, 1)
        found.label_map.grad, found.log_lr.grad = torch.full((4, 2, 2), 1e6), torch.tensor(1e6)
        clipped(found, 100)
        assert (found.label_map.grad == 1e6).all() and found.log_lr.grad == 1e6


def clipped_zero(found: Poster) -> float:
    found.poster.grad = torch.zeros_like(found.poster)
    found.clip()
    found.project()
    return float(found.poster.grad.norm())


class TestDraws:
    def test_distinct_and_in_order(self):
        draws = poster(distill_batch_size=4).draws(generator(), 300)
        assert len(draws) == 300
        for draw in draws:
            assert len(draw.indices) == 4 and (draw.indices.diff() > 0).all()
        counts = Counter(torch.cat([draw.indices for draw in draws]).tolist())
        assert set(counts) == set(range(9)) and min(counts.values()) > 0.75 * 300 * 4 / 9
        assert len({draw.seed for draw in draws}) == 300

    @pytest.mark.parametrize("size", [0, 9])
    def test_all_patches(self, size):
        found = poster(distill_batch_size=size)
        assert all(torch.equal(draw.indices, torch.arange(9)) for draw in found.draws(generator(), 3))

    def test_chance_is_the_generators(self):
        first, same, other = (
            [(draw.indices.tolist(), draw.seed) for draw in poster(distill_batch_size=4).draws(generator(seed), 5)]
            for seed in (1, 1, 2)
        )
        assert first == same and first != other

    def test_more_than_there_are(self):
        with pytest.raises(UserError, match="--distill_batch_size 10 is more than the 9 patches; lower it"):
            poster(distill_batch_size=10)


class TestPatches:
    def test_all_of_them_with_a_graph(self):
        found = poster(shape=(2, 2))
        patches, labels = found.cut()
        assert patches.shape == (9, 3, 4, 4) and labels.shape == (9, 4)
        assert torch.equal(patches[1], found.poster[:, 1:5, 0:4])  # down first
        for value, leaf in ((patches, found.poster), (labels, found.label_map)):
            (grad,) = torch.autograd.grad((value * torch.rand(value.shape)).sum(), leaf)
            assert (grad != 0).any()

    def test_fixed_labels_have_no_graph(self):
        _, labels = poster(label_mode="area").cut()
        assert not labels.requires_grad and torch.equal(labels, fixed_labels(toy(), "area"))

    @pytest.mark.parametrize("shape", [None, (2, 2)])
    def test_a_set_to_judge_is_a_copy(self, shape):
        found = poster(shape=shape, inner_lr=0.25)
        judged, (patches, labels) = found.poster_set(None), found.cut()
        assert torch.equal(judged.patches, patches) and torch.equal(judged.labels, labels)
        assert judged.lr == 0.25 and len(judged) == 9
        assert not judged.patches.requires_grad and not judged.labels.requires_grad
        before = judged.patches.clone(), judged.labels.clone()
        with torch.no_grad():
            for leaf in found.leaves:
                leaf.mul_(2).add_(leaf.roll(1))
        assert torch.equal(judged.patches, before[0]) and torch.equal(judged.labels, before[1])

    def test_batches(self):
        patches, labels = torch.randn(5, 3, 4, 4), torch.rand(5, 2)
        rows, rng = torch.tensor([0, 3]), generator(9)
        images, targets = PosterSet(patches, labels, 0.1).batch(rows, rng)
        assert torch.equal(images, patches[rows]) and torch.equal(targets, labels[rows])
        assert rng.initial_seed() == 9 and torch.equal(rng.get_state(), generator(9).get_state())

        def moved(images, rng):
            return images + torch.rand(len(images), 1, 1, 1, generator=rng)

        images, targets = PosterSet(patches, labels, 0.1, moved).batch(rows, rng)
        assert torch.equal(images, moved(patches[rows], generator(9))) and torch.equal(targets, labels[rows])

    def test_augmentation_is_the_configs(self):
        patches = torch.randn(64, 3, 4, 4)
        assert PosterConfig(syn_strategy="none").augment() is None
        flipped = PosterConfig(syn_strategy="flip").augment()(patches, generator())
        same, mirrored = ((flipped == side).flatten(1).all(1) for side in (patches, patches.flip(3)))
        assert (same | mirrored).all() and 10 < int(same.sum()) < 54
        composed = PosterConfig(syn_strategy="flip_cutout", comp_aug=True).augment()(patches, generator())
        assert ((composed == 0).flatten(1).any(1)).all()  # cutout is never left out


class TestLearning:
    def test_labels_never_become_negative(self):
        found = poster(shape=(2, 2))
        with torch.no_grad():
            found.label_map[0] = -0.5
        kept = found.label_map.detach()[1:].clone()
        found.project()
        assert (found.label_map[0] == 0).all() and torch.equal(found.label_map[1:], kept)
        assert found.label_map.is_leaf and found.label_map.requires_grad

    def test_rates(self):
        def rates(found):
            return [(group["params"][0], group["lr"], group.get("weight_decay")) for group in found.param_groups()]

        found = poster(lr=0.02, label_lr_scale=10.0)
        assert rates(found) == [(found.poster, 0.02, None)]
        found = poster(shape=(2, 2), lr=0.02, label_lr_scale=10.0, train_lr=True, lr_lr=0.3)
        groups = found.param_groups()
        assert [group["params"] for group in groups] == [[found.poster], [found.label_map], [found.log_lr]]
        assert [group["lr"] for group in groups] == [0.02, pytest.approx(0.002), 0.3]
        # The outer decay is meant for pixels and labels; it would draw the rate towards 1.
        adam = torch.optim.Adam(groups, weight_decay=0.1)
        assert [group["weight_decay"] for group in adam.param_groups] == [0.1, 0.1, 0.0]

    def test_what_is_learned(self):
        fixed, both = poster(), poster(shape=(2, 2), train_lr=True)
        assert [leaf is part for leaf, part in zip(fixed.leaves, [fixed.poster], strict=True)] == [True]
        wanted = [both.poster, both.label_map, both.log_lr]
        assert all(leaf is part for leaf, part in zip(both.leaves, wanted, strict=True))
        assert all(leaf.is_leaf and leaf.requires_grad for leaf in both.leaves)

    def test_the_inner_rate(self):
        """Its value as given; by its logarithm, the gradient of the rate is the rate."""
        assert not poster(inner_lr=0.003).lr.requires_grad and poster(inner_lr=0.003).lr == torch.tensor(0.003)
        found = poster(inner_lr=0.003, train_lr=True)
        assert found.lr.item() == pytest.approx(0.003, rel=1e-6)
        (5 * found.lr).backward()
        assert float(found.log_lr.grad) == pytest.approx(5 * 0.003, rel=1e-6)
        torch.optim.SGD(found.param_groups()[-1:], lr=0.0).step()
        assert found.lr.item() == pytest.approx(0.003 * math.exp(-0.001 * 0.015), rel=1e-6)
        assert float(found.poster_set(None).lr) == float(found.product()["lr"]) == found.lr.item()

    @pytest.mark.parametrize("part", ["poster", "label_map", "log_lr"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_cannot_go_on(self, part, value):
        found = poster(shape=(2, 2), train_lr=True)
        assert found.trouble() is None
        with torch.no_grad():
            getattr(found, part).view(-1)[-1] = value
        assert "not finite" in found.trouble()


class TestState:
    @pytest.mark.parametrize("shape", [None, (2, 2)])
    @pytest.mark.parametrize("train_lr", [False, True])
    def test_round_trip(self, tmp_path, shape, train_lr):
        """Through a file, into a poster that was drawn otherwise; both then go on alike."""
        first, second = (poster(seed, shape, train_lr=train_lr) for seed in (1, 2))
        clipped(first, 3)
        with torch.no_grad():
            first.log_lr += 0.5
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for name, value in first.state_dict().items():
            assert torch.equal(second.state_dict()[name], value), name
        assert all(leaf.is_leaf and leaf.requires_grad for leaf in second.leaves)
        assert clipped(first, 50) == clipped(second, 50) and float(first.norm) == float(second.norm)
        assert all(torch.equal(a, b) for a, b in zip(first.cut(), second.cut(), strict=True))

    def test_the_state_is_a_copy(self):
        found = poster(shape=(2, 2))
        state = found.state_dict()
        before = {name: value.clone() for name, value in state.items()}
        with torch.no_grad():
            found.poster += 1
            found.label_map += 1
        clipped(found, 2)
        assert all(torch.equal(state[name], before[name]) for name in state)

    def test_the_product(self):
        assert set(poster().product()) == {"poster", "lr"}
        found = poster(shape=(2, 2))
        assert set(found.product()) == {"poster", "label_map", "lr"}
        assert not any(value.requires_grad for value in found.product().values())


class TestConfig:
    def test_options_that_nothing_reads(self):
        assert PosterConfig(train_y=True, train_lr=True, syn_strategy="none").idle()["comp_aug"] == "a --syn_strategy"
        fixed = PosterConfig().idle()
        assert fixed == {
            **dict.fromkeys(("comp_ipc", "label_shape", "label_lr_scale"), "--train_y"),
            "lr_lr": "--train_lr",
        }
        assert PosterConfig(train_y=True, train_lr=True).idle() == {"label_mode": "fixed labels (no --train_y)"}

    @pytest.mark.parametrize(
        "options, says",
        [
            ({"clip_coef": 1.0}, "--clip_coef 1 would never move; take one below 1"),
            ({"syn_strategy": "flip_rotat"}, "unknown augmentation .rotat. in .flip_rotat."),
        ],
    )
    def test_what_cannot_be(self, options, says):
        with pytest.raises(UserError, match=says):
            PosterConfig(**options).check()

    def test_the_defaults_can(self):
        PosterConfig().check()
