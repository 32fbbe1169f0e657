"""The learned images: windows of canvases, draws, how a set starts, what of it moves, and what goes wrong with it."""

from collections import Counter

import numpy as np
import pytest
import torch

from data import build_images
from data.images import ImagesConfig
from methods.core.outer import OuterConfig, outer_loop
from methods.images import ImageSet, SyntheticConfig, SyntheticImages, seen, start_images, windows
from utils.errors import UserError

COUNTS = (12, 9, 7)  # training images of each class
KINDS = ("hard", "teacher", "learned")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """28 random pictures of 8 x 8 in three classes that take turns in the file, none held out."""
    folder, rng = tmp_path_factory.mktemp("npz"), np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(3), COUNTS))
    images = rng.integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    test = {"test_images": images[:3], "test_labels": np.arange(3), "classes": np.array(["ant", "bee", "cat"])}
    np.savez(folder / "set.npz", train_images=images, train_labels=labels, **test)
    cfg = ImagesConfig(dataset="npz", data_path=str(folder / "set.npz"), holdout=0, cache_dir=str(folder / "cache"))
    return build_images(cfg, "cpu")


class Table:
    """Experts that look up what they say: `logits[expert][image]`, an image known by its pixels."""

    def __init__(self, data, logits):
        self.known = data["train"].images(torch.arange(len(data["train"])))
        self.table, self.asked = logits, Counter()

    @property
    def count(self):
        return len(self.table)

    def logits(self, expert, images):
        self.asked[expert] += len(images)
        rows = [int((self.known == image).flatten(1).all(1).nonzero()) for image in images]
        return self.table[expert][rows]


class Nobody:
    """Experts that nothing should be asked of."""

    count = 0

    def logits(self, expert, images):
        pytest.fail("not needed")


def knowing(data, *right):
    """Experts of whom the k-th is right about the training images `right[k]` and says the next class of others."""
    labels, tables = data["train"].labels, []
    for rows in right:
        said = (labels + 1) % 3
        said[rows] = labels[rows]
        tables.append(torch.nn.functional.one_hot(said, 3).float())
    return Table(data, torch.stack(tables))


def learned(count=6, size=4, **options):
    """`count` random images of two classes."""
    cfg = SyntheticConfig(**{"ipc": count // 2, "lr_teacher": 0.05} | options)
    side = size * (cfg.canvas_size if cfg.texture else 1)
    labels = torch.arange(2).repeat_interleave(count // 2)
    if cfg.label_kind != "hard":
        labels = torch.eye(2)[labels]
    return SyntheticImages(torch.randn(count, 3, side, side, generator=generator(count)), labels, size, cfg)


def rows_of(data, images):
    """The training image that each of `images` is, pixel by pixel."""
    every = data["train"].images(torch.arange(len(data["train"])))
    found = [(every == image).flatten(1).all(1).nonzero()[:, 0].tolist() for image in images.detach()]
    assert all(len(rows) == 1 for rows in found)
    return [row for (row,) in found]


class TestWindows:
    def test_they_are_rolled_and_cropped(self):
        canvases = torch.randn(3, 2, 10, 10, generator=generator(1))
        found = windows(canvases, 4, 5, generator(2))
        rows, columns = torch.randint(10, (2, 15, 1), generator=generator(2))
        assert found.shape == (15, 2, 4, 4)
        for item, window in enumerate(found):  # all first windows come first
            shifts = (-int(rows[item]), -int(columns[item]))
            assert torch.equal(window, canvases[item % 3].roll(shifts, (1, 2))[:, :4, :4])
        across = (rows[:, 0] > 6) & (columns[:, 0] > 6)
        assert across.any() and ((rows[:, 0] < 7) & (columns[:, 0] < 7)).any()  # with a seam, and without

    def test_across_both_edges(self, monkeypatch):
        canvas = torch.arange(36.0).view(1, 1, 6, 6)
        monkeypatch.setattr(torch, "randint", lambda side, size, generator: torch.tensor([5, 4]).view(2, 1, 1))
        expected = [[34, 35, 30, 31], [4, 5, 0, 1], [10, 11, 6, 7], [16, 17, 12, 13]]
        assert windows(canvas, 4, 1, generator()).tolist() == [[expected]]

    def test_every_offset_is_drawn_as_often(self):
        canvas = torch.arange(16.0).view(1, 1, 4, 4)
        corners = windows(canvas, 2, 8000, generator(3))[:, 0, 0, 0].long().tolist()
        counts = Counter(corners)
        assert len(counts) == 16 and all(abs(count - 500) < 5 * 22 for count in counts.values())

    def test_gradients_reach_every_pixel(self):
        canvas = torch.zeros(1, 1, 8, 8, requires_grad=True)
        windows(canvas, 4, 1, generator(4)).sum().backward()
        assert canvas.grad.sum() == 16 and canvas.grad.unique().tolist() == [0, 1]  # once each, in one window
        windows(canvas, 4, 200, generator(5)).sum().backward()
        assert canvas.grad.min() > 0

    def test_what_a_step_sees_of_canvases(self):
        """Labels are repeated as windows are; the augmentation comes after the cut."""
        canvases, labels = torch.randn(2, 3, 8, 8), torch.tensor([4, 7])
        shapes = []
        images, targets = seen(
            canvases, labels, 4, 3, lambda batch, rng: (shapes.append(batch.shape), batch)[1], generator()
        )
        assert images.shape == (6, 3, 4, 4) == shapes[0] and targets.tolist() == [4, 7] * 3
        soft = seen(canvases, torch.eye(2), 4, 2, None, generator())[1]
        assert torch.equal(soft, torch.eye(2).repeat(2, 1))

    def test_images_that_are_no_canvases_are_seen_whole(self):
        images = torch.randn(2, 3, 4, 4)
        assert seen(images, torch.arange(2), 4, 0, None, generator())[0] is images
        plain = learned(canvas_samples=3)  # without --texture
        batch = plain.batch(plain.draws(generator(), 1)[0])[0]
        assert len(batch) == 6 and plain.image_set(None).samples == 0

    def test_a_canvas_of_one_window_goes_on_too(self):
        canvas = learned(texture=True, canvas_size=1)
        batch, _ = canvas.batch(canvas.draws(generator(), 1)[0])
        assert batch.shape == canvas.images.shape
        assert sorted(batch[0].flatten().tolist()) in [sorted(one.flatten().tolist()) for one in canvas.images.detach()]
        assert not any(torch.equal(batch[0], one) for one in canvas.images)


class TestDraws:
    def test_the_smaller_chunk_comes_first(self):
        draws = learned(10, batch_syn=4).draws(generator(), 6)
        assert [len(draw.indices) for draw in draws] == [2, 4, 4, 2, 4, 4]
        first, second = (sorted(i for draw in part for i in draw.indices.tolist()) for part in (draws[:3], draws[3:]))
        assert first == second == list(range(10))  # every image once a pass
        assert [d.indices.tolist() for d in draws[:3]] != [d.indices.tolist() for d in draws[3:]]
        assert len({draw.seed for draw in draws}) == 6

    def test_chunks_left_over_are_forgotten(self):
        """Every inner loop begins with a pass of its own."""
        images, rng = learned(10, batch_syn=4), generator()
        for _ in range(3):
            draws = images.draws(rng, 2)
            assert [len(draw.indices) for draw in draws] == [2, 4]

    @pytest.mark.parametrize("size", [None, 6, 50])
    def test_all_in_each_step(self, size):
        for draw in learned(batch_syn=size).draws(generator(), 3):
            assert sorted(draw.indices.tolist()) == list(range(6))

    def test_an_equal_generator_draws_the_same(self):
        first, again, other = (learned(10, batch_syn=4).draws(generator(seed), 4) for seed in (1, 1, 2))
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a.indices, b.indices) and a.seed == b.seed
        assert [d.seed for d in first] != [d.seed for d in other]

    def test_a_draw_replayed_sees_the_same(self):
        images = learned(texture=True, canvas_samples=2)
        images.augment = lambda batch, rng: batch + torch.randn(batch.shape, generator=rng)
        one, other = images.draws(generator(), 2)
        assert torch.equal(images.batch(one)[0], images.batch(one)[0])
        assert not torch.equal(images.batch(one)[0], images.batch(other)[0])


class TestStart:
    def test_distinct_real_images_class_by_class(self, data):
        images = start_images(data, SyntheticConfig(ipc=5), generator(), None, Nobody())
        rows = rows_of(data, images.images)
        assert len(set(rows)) == 15
        assert data["train"].labels[rows].tolist() == images.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
        assert images.labels.dtype == torch.long and len(images.leaves) == 2
        again, other = (start_images(data, SyntheticConfig(ipc=5), generator(s), None, Nobody()) for s in (0, 1))
        assert rows == rows_of(data, again.images) != rows_of(data, other.images)

    def test_all_that_a_class_has(self, data):
        images = start_images(data, SyntheticConfig(ipc=7), generator(), None, Nobody())
        assert sorted(rows_of(data, images.images)[14:]) == data["train"].indices_of(2).tolist()

    @pytest.mark.parametrize("options", [{"ipc": 8}, {"ipc": 2, "texture": True, "pix_init": "real"}])
    def test_more_than_a_class_has(self, data, options):
        with pytest.raises(
            UserError, match=r"class cat has 7 training images, 8 are needed to start from; lower --ipc"
        ):
            start_images(data, SyntheticConfig(**options), generator(), None, Nobody())

    @pytest.mark.parametrize("texture, side", [(False, 8), (True, 24)])
    def test_noise(self, data, texture, side):
        cfg = SyntheticConfig(ipc=40, pix_init="noise", texture=texture, canvas_size=3)  # more than a class has
        values = start_images(data, cfg, generator(), None, Nobody()).images.detach()
        assert values.shape == (120, 3, side, side)
        assert float(values.mean()) == pytest.approx(0, abs=5 / values.numel() ** 0.5)
        assert float(values.std()) == pytest.approx(1, abs=5 / (2 * values.numel()) ** 0.5)

    def test_textures_are_noise_unless_asked(self):
        assert SyntheticConfig(texture=True).start == "noise" and SyntheticConfig().start == "real"
        assert SyntheticConfig(texture=True, pix_init="real").start == "real"

    def test_canvases_of_real_images(self, data):
        cfg = SyntheticConfig(ipc=1, texture=True, pix_init="real", canvas_size=2)
        images = start_images(data, cfg, generator(), None, Nobody())
        assert images.images.shape == (3, 3, 16, 16) and images.size == 8
        for label, canvas in enumerate(images.images):
            tiles = [canvas[:, top : top + 8, left : left + 8] for top in (0, 8) for left in (0, 8)]
            rows = rows_of(data, torch.stack(tiles))
            assert len(set(rows)) == 4 and set(rows) <= set(data["train"].indices_of(label).tolist())

    def test_images_that_the_first_expert_knows(self, data):
        known = torch.cat([data["train"].indices_of(label)[:4] for label in range(3)])
        cfg = SyntheticConfig(ipc=3, pix_init="samples_predicted_correctly")
        for seed in range(4):
            experts = knowing(data, known, [])
            images = start_images(data, cfg, generator(seed), None, experts)
            rows = rows_of(data, images.images)
            assert len(set(rows)) == 9 and set(rows) <= set(known.tolist())
            assert data["train"].labels[rows].tolist() == [0] * 3 + [1] * 3 + [2] * 3
            assert experts.asked[1] == 0

    def test_what_the_first_does_not_know_the_next_may(self, data):
        """Two cats of the first, two of the second; of the third none are needed."""
        cats = data["train"].indices_of(2).tolist()
        others = [row for row in range(28) if row not in cats]
        experts = knowing(data, [*others, *cats[:2]], [*others, *cats[1:4]], range(28))
        cfg = SyntheticConfig(ipc=4, pix_init="samples_predicted_correctly")
        rows = rows_of(data, start_images(data, cfg, generator(), None, experts).images)
        assert set(rows[8:]) == set(cats[:4]) and set(rows[8:10]) == set(cats[:2])
        assert experts.asked == {0: 28, 1: 5}

    def test_nobody_knows_enough(self, data):
        cats = data["train"].indices_of(2).tolist()
        others = [row for row in range(28) if row not in cats]
        experts = knowing(data, [*others, cats[0]], others)
        with pytest.raises(UserError, match="the experts know only 1 images of class cat, 2 are needed; train them"):
            cfg = SyntheticConfig(ipc=2, pix_init="samples_predicted_correctly")
            start_images(data, cfg, generator(), None, experts)

    def test_learned_labels_are_the_mean_of_experts_that_are_right(self, data):
        """Two experts that are right of three, then none of them, of all images of a class alike."""
        first, second, third = [2.0, 0.0, -1.0], [3.0, 1.0, 1.0], [0.0, 6.0, 0.0]
        table = torch.tensor([first, second, third])[:, None].repeat(1, 28, 1)
        images = start_images(data, SyntheticConfig(ipc=2, labels="learned"), generator(), None, Table(data, table))
        ant, bee, cat = [2.5, 0.5, 0.0], third, [5 / 3, 7 / 3, 0.0]
        expected = torch.tensor([ant, ant, bee, bee, cat, cat])
        torch.testing.assert_close(images.labels.detach(), expected)
        assert images.labels.requires_grad and len(images.leaves) == 3
        torch.testing.assert_close(images.targets().detach(), expected.softmax(1))

    def test_labels_of_a_teacher_start_as_the_classes(self, data):
        images = start_images(data, SyntheticConfig(ipc=2, teacher_label=True), generator(), None, Nobody())
        assert torch.equal(images.labels, torch.eye(3).repeat_interleave(2, 0)) and len(images.leaves) == 2


class TestOptions:
    @pytest.mark.parametrize(
        "options, says",
        [
            ({"ema_decay": 1.0}, "--ema_decay 1.0 would never move"),
            ({"teacher_label": True, "labels": "learned"}, "exclude each other"),
            ({"texture": True, "labels": "learned"}, "--texture goes with --labels hard"),
            ({"texture": True, "teacher_label": True}, "--texture goes with --labels hard"),
            ({"texture": True, "pix_init": "samples_predicted_correctly"}, "--pix_init real or noise"),
        ],
    )
    def test_what_excludes_each_other(self, options, says):
        with pytest.raises(UserError, match=says):
            SyntheticConfig(**options).check()

    def test_each_leaf_has_its_own_rate(self):
        images = learned(labels="learned", lr_img=1.0, lr_lr=2.0, lr_y=3.0, momentum_y=0.7)
        optimizer = torch.optim.SGD(images.param_groups(), lr=0.0, momentum=0.5)
        groups = {id(leaf): group for group in optimizer.param_groups for leaf in group["params"]}
        assert set(groups) == {id(leaf) for leaf in images.leaves}
        wanted = {id(images.images): (1, 0.5), id(images.lr["net"]): (2, 0.5), id(images.labels): (3, 0.7)}
        assert {name: (group["lr"], group["momentum"]) for name, group in groups.items()} == wanted

    def test_no_augmentation_in_the_inner_loop(self):
        double = lambda batch, rng: 2 * batch  # noqa: E731
        cfg = SyntheticConfig(ipc=1, no_aug=True)
        images = SyntheticImages(torch.ones(2, 3, 4, 4), torch.arange(2), 4, cfg, double)
        assert float(images.batch(images.draws(generator(), 1)[0])[0].detach().max()) == 1
        assert float(images.image_set(double).batch(torch.arange(2), generator())[0].max()) == 2  # judged with it

    def test_the_given_tensors_are_copied(self):
        pixels, logits = torch.ones(2, 3, 4, 4), torch.eye(2)
        images = SyntheticImages(pixels, logits, 4, SyntheticConfig(labels="learned"))
        pixels.zero_(), logits.zero_()
        assert float(images.images.detach().min()) == 1 and torch.equal(images.labels, torch.eye(2))


class TestAverage:
    def test_it_is_that_of_the_recursion(self):
        """Decay 0.75, images 1, then 5, then −3: 1, 1·0.75 + 5·0.25 = 2, 2·0.75 − 3·0.25 = 0.75."""
        images = SyntheticImages(torch.ones(2, 1, 2, 2), torch.arange(2), 2, SyntheticConfig(ema_decay=0.75))
        found = [float(images.average[0, 0, 0, 0])]
        for value in (5.0, -3.0):
            with torch.no_grad():
                images.images.fill_(value)
            images.project()
            found.append(float(images.average[0, 0, 0, 0]))
        assert found == [1, 2, 0.75]
        assert float(images.image_set(None).images.mean()) == 0.75
        assert float(images.images.detach().mean()) == -3  # what is learned is not what is judged

    def test_none_unless_asked(self):
        images = learned()
        assert images.average is None and "average" not in images.state_dict()
        assert torch.equal(images.image_set(None).images, images.images.detach())

    def test_steps_that_are_skipped_leave_it(self, open_run):
        images = learned(ema_decay=0.5, lr_img=1.0)
        start = images.images.detach().clone()

        def step(number):
            images.images.grad = torch.ones_like(images.images)
            images.lr["net"].grad = torch.zeros(())
            return {"loss": [0.5, 9.0][number]}

        cfg = OuterConfig(iterations=2, eval_it=0, threshold=1.0, momentum=0.0)
        outer_loop(step, images, cfg.plan(), open_run(), lambda step: 0.0, lambda step, best: None)
        torch.testing.assert_close(images.images.detach(), start - 1)
        torch.testing.assert_close(images.average, start - 0.5)


class TestBounds:
    @pytest.mark.parametrize("clamp, found", [(1e-3, 1e-3), (0.0, -0.2)])
    def test_the_rate_is_clamped(self, clamp, found):
        images = learned(clamp_lr=clamp)
        before = images.images.detach().clone()
        with torch.no_grad():
            images.lr["net"].fill_(-0.2)
        images.project()
        assert float(images.lr["net"].detach()) == pytest.approx(found) and torch.equal(images.images, before)
        assert (images.trouble() is None) == (clamp > 0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_trouble(self, kind):
        assert learned(labels=kind).trouble() is None

    @pytest.mark.parametrize("rate", [0.0, -0.1, float("nan"), float("inf")])
    def test_rates(self, rate):
        images = learned()
        with torch.no_grad():
            images.lr["net"].fill_(rate)
        assert images.trouble().startswith("the learned rate became ")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("leaf", ["image", "label"])
    def test_values(self, leaf, value):
        images = learned(labels="learned")
        with torch.no_grad():
            (images.images if leaf == "image" else images.labels).view(-1)[7] = value
        assert images.trouble() == f"a learned {leaf} is not finite"


class TestState:
    @pytest.mark.parametrize("ema", [0.0, 0.9])
    @pytest.mark.parametrize("kind", KINDS)
    def test_round_trip(self, tmp_path, kind, ema):
        images, other = (learned(labels=kind, ema_decay=ema) for _ in range(2))
        if kind == "teacher":
            images.relabel(torch.full((6, 2), 0.5))
        with torch.no_grad():
            for leaf in images.leaves:
                leaf += 0.5
        images.project()
        torch.save(images.state_dict(), tmp_path / "state.pt")
        optimizer = torch.optim.SGD(other.param_groups(), lr=0.0)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(images.labels, other.labels) and images.labels.dtype == other.labels.dtype
        for ours, theirs in zip(images.leaves, other.leaves, strict=True):
            assert torch.equal(ours, theirs) and theirs.requires_grad and theirs.is_leaf
        moved = {id(leaf) for group in optimizer.param_groups for leaf in group["params"]}
        assert moved == {id(leaf) for leaf in other.leaves}  # the optimizer still has them
        a, b = images.image_set(None), other.image_set(None)
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.lr == b.lr

    def test_a_state_is_a_copy(self):
        images = learned(labels="learned", ema_decay=0.9)
        state, judged = images.state_dict(), images.image_set(None)
        parts = [*state.values(), judged.images, judged.labels]
        before = [part.clone() for part in parts]
        with torch.no_grad():
            for leaf in images.leaves:
                leaf += 1
            images.average += 1
        assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))
        assert not any(part.requires_grad for part in parts)


class TestTargets:
    def test_relabelling(self):
        images = learned(labels="teacher")
        probabilities = torch.rand(6, 2, generator=generator(9)).softmax(1).requires_grad_()
        images.relabel(probabilities)
        (draw,) = images.draws(generator(), 1)
        _, labels = images.batch(draw)
        assert torch.equal(labels, probabilities[draw.indices]) and not labels.requires_grad
        classes = torch.eye(2).repeat_interleave(3, 0)
        assert torch.equal(images.state_dict()["labels"], classes)  # as the step found them, until it is done
        images.project()
        assert torch.equal(images.image_set(None).labels, probabilities)
        assert torch.equal(images.state_dict()["labels"], probabilities)

    def test_learned_logits_get_gradients_through_the_softmax(self):
        images = learned(labels="learned")
        (draw,) = images.draws(generator(), 1)
        _, labels = images.batch(draw)
        torch.testing.assert_close(labels.sum(1), torch.ones(6))
        labels[0, 0].backward()
        row, (p, q) = draw.indices[0], labels[0].detach()
        torch.testing.assert_close(images.labels.grad[row], torch.stack([p * q, -p * q]))


def test_a_set_gives_what_networks_see():
    images, labels = torch.randn(3, 1, 4, 4), torch.tensor([2, 0, 1])
    found = ImageSet(images, labels, 0.1, 4, lambda batch, rng: batch + torch.rand((), generator=rng))
    rows = torch.tensor([2, 0])
    batch, wanted = found.batch(rows, generator(1))
    torch.testing.assert_close(batch, images[rows] + torch.rand((), generator=generator(1)))
    assert wanted.tolist() == [1, 2] and len(found) == 3
