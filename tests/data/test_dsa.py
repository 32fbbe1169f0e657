"""Differentiable augmentation: figures worked out by hand, what is drawn how often, and gradients."""

import pytest
import torch

from data import dsa
from data.dsa import COLORS, OPS, STRATEGY, augment, crop_scale_rotate, parse_strategy, poster_augment, siamese
from utils.errors import UserError

ALL = parse_strategy(STRATEGY)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def values(*numbers):
    return torch.tensor(numbers)


def ramp(height, width, first=0):
    return torch.arange(first, first + height * width, dtype=torch.float64).view(1, 1, height, width)


# --- the operations ---


def test_colour_of_one_pixel():
    pixel = torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64).view(1, 3, 1, 1)
    brighter = dsa.color(pixel, values(0.75), values(0.5), values(0.5)).flatten()
    assert brighter.tolist() == pytest.approx([0.45, 0.65, 1.15], abs=1e-6)
    duller = dsa.color(pixel, values(0.75), values(0.25), values(0.5)).flatten()
    assert duller.tolist() == pytest.approx([0.60, 0.70, 0.95], abs=1e-6)
    flatter = dsa.color(pixel, values(0.75), values(0.25), values(0.1)).flatten()
    assert flatter.tolist() == pytest.approx([0.66, 0.72, 0.87], abs=1e-6)


def test_contrast_is_about_the_mean_of_the_whole_image():
    images = torch.randn(3, 3, 4, 5, generator=seeded(), dtype=torch.float64)
    changed = dsa.color(images, values(0.5, 0.5, 0.5), values(0.5, 0.5, 0.5), values(0.0, 0.5, 1.0))
    mean = images.mean((1, 2, 3), keepdim=True)
    expected = (images - mean) * torch.tensor([0.5, 1.0, 1.5]).view(3, 1, 1, 1) + mean
    torch.testing.assert_close(changed, expected)


def test_the_three_changes_of_colour_by_themselves():
    pixels = torch.tensor([[0.2, 0.1], [0.4, 0.3], [0.9, 0.5]], dtype=torch.float64).view(1, 3, 1, 2)
    brighter = dsa.brightness(pixels, values(0.75))
    assert brighter.flatten().tolist() == pytest.approx([0.45, 0.35, 0.65, 0.55, 1.15, 0.75])
    duller = dsa.saturation(pixels, values(0.25))  # halfway to the greys 0.5 and 0.3
    assert duller.flatten().tolist() == pytest.approx([0.35, 0.2, 0.45, 0.3, 0.7, 0.4])
    flatter = dsa.contrast(pixels, values(0.0))  # halfway to the mean 0.4
    assert flatter.flatten().tolist() == pytest.approx([0.3, 0.25, 0.4, 0.35, 0.65, 0.45])
    together = dsa.contrast(dsa.saturation(dsa.brightness(pixels, values(0.9)), values(0.3)), values(0.2))
    assert torch.equal(dsa.color(pixels, values(0.9), values(0.3), values(0.2)), together)


def test_saturation_keeps_a_single_channel():
    images = torch.randn(2, 1, 4, 4, generator=seeded())
    torch.testing.assert_close(dsa.color(images, values(0.5, 0.5), values(0.0, 0.9), values(0.5, 0.5)), images)


def test_crop_of_a_ramp():
    moved = dsa.crop(ramp(8, 8, first=1), values(1), values(-2))[0, 0]
    assert moved[0].tolist() == [0, 0, 9, 10, 11, 12, 13, 14]
    assert moved[7].tolist() == [0] * 8
    assert moved[6].tolist() == [0, 0, 57, 58, 59, 60, 61, 62]


def test_crop_of_an_oblong_image_is_per_image():
    images = ramp(3, 5, first=1).expand(2, 1, 3, 5)
    moved = dsa.crop(images, values(0, -2), values(4, 0))[:, 0]
    assert moved[0].tolist() == [[5, 0, 0, 0, 0], [10, 0, 0, 0, 0], [15, 0, 0, 0, 0]]
    assert moved[1].tolist() == [[0] * 5, [0] * 5, [1, 2, 3, 4, 5]]


def zeros(side, row, column):
    return (dsa.cutout(torch.ones(1, 2, side, side), values(row), values(column))[0, 1] == 0).nonzero()


def test_cutout_counts():
    middle = zeros(8, 4, 4)
    assert len(middle) == 16
    assert middle.min() == 2 and middle.max() == 5
    assert len(zeros(8, 0, 0)) == 4
    for centre, rows in {0: 8, 8: 16, 16: 16, 24: 16, 32: 8}.items():
        assert zeros(32, centre, 16)[:, 0].unique().numel() == rows, centre
        assert zeros(32, 16, centre)[:, 1].unique().numel() == rows, centre
    assert zeros(5, 2, 2).unique().tolist() == [1, 2, 3]  # an odd square is about its centre


def test_flip_mirrors_what_is_asked():
    images = torch.randn(3, 2, 4, 5, generator=seeded())
    changed = dsa.flip(images, torch.tensor([True, False, True]))
    assert torch.equal(changed[1], images[1])
    assert torch.equal(changed[0::2], images[0::2].flip(3))


def test_scale_of_ones_and_of_a_ramp():
    shrunk = dsa.scale(torch.ones(1, 1, 5, 5, dtype=torch.float64), values(1.2), values(1.2))[0, 0]
    assert shrunk[0, 2] == pytest.approx(0.6, abs=1e-6)
    assert shrunk[0, 0] == pytest.approx(0.36, abs=1e-6)
    assert torch.allclose(shrunk[1:4, 1:4], torch.ones(3, 3, dtype=torch.float64), atol=1e-6)
    grown = dsa.scale(ramp(5, 5), values(1 / 1.2), values(1 / 1.2))[0, 0]
    assert grown[0, 0] == pytest.approx(2.0, abs=1e-5)
    assert grown[4, 4] == pytest.approx(22.0, abs=1e-5)
    assert (grown[0, 1:] - grown[0, :-1]).tolist() == pytest.approx([0.8333] * 4, abs=1e-4)


def test_scale_tells_across_from_down():
    wide = dsa.scale(torch.ones(1, 1, 5, 5), values(1.2), values(1.0))[0, 0]
    assert wide[:, 0].tolist() == pytest.approx([0.6] * 5, abs=1e-5)
    assert wide[0, 1:4].tolist() == pytest.approx([1.0] * 3, abs=1e-5)


def test_rotation():
    square = ramp(3, 3)
    torch.testing.assert_close(
        dsa.rotate(square, values(90.0))[0, 0],
        torch.tensor([[2.0, 5, 8], [1, 4, 7], [0, 3, 6]], dtype=torch.float64),
        rtol=0,
        atol=1e-5,
    )
    turned = dsa.rotate(square, values(15.0))[0, 0]
    assert turned[1, 1] == pytest.approx(4, abs=1e-6)
    assert turned[0, 0] == pytest.approx(0.2271, abs=1e-4)


def test_shapes_of_the_grid_are_torchs():
    images = torch.randn(4, 3, 6, 9, generator=seeded(), dtype=torch.float64)
    across, down = torch.tensor([[0.9, 1.0, 1.1, 1.2], [1.2, 0.85, 1.0, 1.1]], dtype=torch.float64)
    angle = torch.tensor([-15.0, -3.0, 7.0, 14.0], dtype=torch.float64)
    zero, turn = torch.zeros(4), torch.deg2rad(angle)
    for ours, rows in (
        (dsa.scale(images, across, down), (across, zero, zero, zero, down, zero)),
        (dsa.rotate(images, angle), (turn.cos(), -turn.sin(), zero, turn.sin(), turn.cos(), zero)),
    ):
        matrix = torch.stack([row.double() for row in rows], -1).view(4, 2, 3)
        grid = torch.nn.functional.affine_grid(matrix, list(images.shape), align_corners=True)
        torch.testing.assert_close(ours, torch.nn.functional.grid_sample(images, grid, align_corners=True))


@pytest.mark.parametrize("op", ["rotate", "scale"])
def test_where_the_corners_are_makes_no_difference_to_squares(op):
    """PoDD's sampling puts −1 and 1 at the outer edges of the image, ours in the middles of the outermost pixels."""
    images = torch.randn(5, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    if op == "rotate":
        degrees = torch.tensor([-15.0, -4.0, 0.5, 9.0, 15.0], dtype=torch.float64)
        turn, ours = torch.deg2rad(degrees), dsa.rotate(images, degrees)
        rows = (turn.cos(), -turn.sin(), zero, turn.sin(), turn.cos(), zero)
    else:
        across, down = torch.tensor([[0.9, 1.0, 1.1, 1.2, 1 / 1.2], [1.2, 0.85, 1.0, 1.1, 1.2]], dtype=torch.float64)
        ours = dsa.scale(images, across, down)
        rows = (across, zero, zero, zero, down, zero)
    grid = torch.nn.functional.affine_grid(torch.stack(rows, -1).view(5, 2, 3), list(images.shape), align_corners=False)
    theirs = torch.nn.functional.grid_sample(images, grid, align_corners=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_those_of_finite_differences(op):
    images = torch.randn(3, 3, 5, 6, generator=seeded(), dtype=torch.float64, requires_grad=True)
    for seed in (0, 1):
        assert torch.autograd.gradcheck(lambda x, seed=seed: augment(x, (op,), seeded(seed)), (images,))


# --- which one, and how much ---


def test_parse_strategy():
    assert ALL == ("color", "crop", "cutout", "flip", "scale", "rotate")
    assert parse_strategy("none") == parse_strategy("None") == parse_strategy("") == ()
    assert parse_strategy("flip_crop") == ("flip", "crop")
    with pytest.raises(UserError, match=r"unknown augmentation 'colour' in 'colour_crop' \(did you mean 'color'\?\)"):
        parse_strategy("colour_crop")
    with pytest.raises(UserError, match="unknown augmentation ''"):
        parse_strategy("color__crop")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_an_equal_generator_gives_equal_images_of_the_same_kind(op, kind):
    images = torch.randn(7, 3, 8, 10, generator=seeded(), dtype=kind)
    before = images.clone()
    changed = augment(images, (op,), seeded(3))
    assert changed.shape == images.shape and changed.dtype == kind
    assert torch.equal(changed, augment(images, (op,), seeded(3)))
    assert not torch.equal(changed, images)
    assert torch.equal(images, before)
    assert augment(torch.zeros(2, 1, 28, 28), (op,), seeded()).shape == (2, 1, 28, 28)


def test_no_operation_draws_nothing():
    images, rng = torch.randn(2, 3, 4, 4), seeded(1)
    assert augment(images, (), rng) is images
    assert siamese(images, (), 3) is images
    assert torch.equal(rng.get_state(), seeded(1).get_state())


def test_global_chance_is_left_alone():
    before = torch.get_rng_state()
    augment(torch.randn(2, 3, 4, 4, generator=seeded()), ALL, seeded())
    siamese(torch.randn(2, 3, 4, 4, generator=seeded()), ALL, 5)
    crop_scale_rotate(torch.randn(2, 3, 4, 4, generator=seeded()), seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_one_operation_a_batch_each_as_often(monkeypatch):
    counts = dict.fromkeys(ALL, 0)

    def spy(name):
        def count(images, chance):
            counts[name] += 1
            return images

        return count

    monkeypatch.setattr(dsa, "OPS", {name: spy(name) for name in ALL})
    rng = seeded()
    for _ in range(6000):
        augment(torch.zeros(1, 1, 1, 1), ALL, rng)
    assert sum(counts.values()) == 6000
    assert all(abs(count - 1000) < 120 for count in counts.values())


def drawn(monkeypatch, op, function, shape, seed=0):
    """The arguments with which `augment` calls one of the functions."""
    seen = []
    original = getattr(dsa, function)
    monkeypatch.setattr(dsa, function, lambda images, *args: seen.append(args) or original(images, *args))
    augment(torch.zeros(shape), (op,), seeded(seed))
    (args,) = seen
    return args


def test_how_much_is_drawn(monkeypatch):
    many = 5000
    for value in drawn(monkeypatch, "color", "color", (many, 3, 1, 1)):
        assert 0 <= value.min() < 0.01 and 0.99 < value.max() < 1
        assert abs(value.mean().item() - 0.5) < 0.02
    for value, reach in zip(drawn(monkeypatch, "crop", "crop", (many, 1, 32, 12)), (4, 2), strict=True):
        assert sorted(value.unique().tolist()) == list(range(-reach, reach + 1))
    for value, side in zip(drawn(monkeypatch, "cutout", "cutout", (many, 1, 32, 6)), (32, 5), strict=True):
        assert sorted(value.unique().tolist()) == list(range(side + 1))
    (mirrored,) = drawn(monkeypatch, "flip", "flip", (many, 1, 1, 2))
    assert abs(mirrored.float().mean().item() - 0.5) < 0.03
    across, down = drawn(monkeypatch, "scale", "scale", (many, 1, 2, 2))
    for value in (across, down):
        assert 1 / 1.2 - 1e-6 <= value.min() < 0.84 and 1.19 < value.max() <= 1.2
    assert abs(torch.corrcoef(torch.stack([across, down]))[0, 1].item()) < 0.05
    (degrees,) = drawn(monkeypatch, "rotate", "rotate", (many, 1, 2, 2))
    assert -15 <= degrees.min() < -14.9 and 14.9 < degrees.max() <= 15


@pytest.mark.parametrize(("side", "reach"), [(32, 4), (64, 8), (128, 16), (8, 1)])
def test_reach_of_a_crop(monkeypatch, side, reach):
    down, _ = drawn(monkeypatch, "crop", "crop", (400, 1, side, side))
    assert down.abs().max() == reach


# --- the same for two batches ---


@pytest.mark.parametrize("op", OPS)
def test_siamese_is_one_transform_for_all(op):
    image = torch.randn(1, 3, 12, 12, generator=seeded())
    one, many = siamese(image, (op,), 7), siamese(image.expand(5, 3, 12, 12), (op,), 7)
    assert all(torch.equal(copy, one[0]) for copy in many)
    assert torch.equal(many, siamese(image.expand(5, 3, 12, 12), (op,), 7))
    assert any(not torch.equal(siamese(image, (op,), seed), one) for seed in range(8, 12))


def test_seven_twice_is_the_same_and_fresh_chance_is_not():
    images = torch.randn(16, 3, 32, 32, generator=seeded())
    assert torch.equal(siamese(images, ALL, 7), siamese(images.clone(), ALL, 7))
    rng = seeded(7)
    assert not torch.equal(augment(images, ALL, rng), augment(images, ALL, rng))


def test_siamese_draws_are_seeded_one_by_one():
    images = torch.randn(3, 3, 32, 32, generator=seeded())
    down, right = (torch.randint(-4, 5, (1,), generator=seeded(seed)).expand(3) for seed in (12, 13))
    assert torch.equal(siamese(images, ("crop",), 11), dsa.crop(images, down, right))
    angle = 15 * (2 * torch.rand(1, generator=seeded(1)) - 1).expand(3)
    assert torch.equal(siamese(images, ("rotate",), 0), dsa.rotate(images, angle))
    choices = {int(torch.randint(6, (), generator=seeded(seed))) for seed in range(40)}
    assert choices == set(range(6))  # so consecutive seeds do choose
    with pytest.raises(ValueError, match="at least 0, not -1"):
        siamese(images, ALL, -1)


# --- as PoDD draws ---


@pytest.fixture
def done(monkeypatch):
    """The names of the operations that are done, in order."""
    names = []

    def spy(name, original):
        return lambda images, chance: names.append(name) or original(images, chance)

    monkeypatch.setattr(dsa, "OPS", {name: spy(name, original) for name, original in OPS.items()})
    return names


def test_one_of_those_named_for_the_whole_batch(done):
    change, rng = poster_augment("flip_rotate_color", False), seeded()
    for number in range(1, 1801):
        change(torch.zeros(2, 3, 4, 4), rng)
        assert len(done) == number
    counts = {name: done.count(name) for name in set(done)}
    assert set(counts) == {"flip", "rotate", *COLORS}
    assert all(abs(counts[name] - 600) < 80 for name in ("flip", "rotate"))
    assert all(abs(counts[name] - 200) < 60 for name in COLORS)


def test_composed(done):
    images = torch.zeros(2, 3, 4, 4)
    for strategy, first, rest in (
        ("color_cutout_flip", ["flip", "color", "cutout"], set()),
        ("rotate_cutout_scale_crop_flip", ["flip", "cutout"], {"rotate", "scale", "crop"}),
        ("cutout_rotate_cutout_rotate", ["cutout"], {"rotate"}),
        ("scale_rotate", [], {"scale", "rotate"}),
        ("color", ["color"], set()),
    ):
        change, rng, seen = poster_augment(strategy, True), seeded(), set()
        for _ in range(60):
            done.clear()
            change(images, rng)
            assert done[: len(first)] == first and len(done) == len(first) + bool(rest)
            seen |= set(done[len(first) :])
        assert seen == rest, strategy


@pytest.mark.parametrize("composed", [False, True])
def test_as_podd_draws_is_repeatable_and_differentiable(composed):
    change = poster_augment("flip_rotate_color_cutout", composed)
    images = torch.randn(3, 3, 5, 5, generator=seeded(), dtype=torch.float64, requires_grad=True)
    before = torch.get_rng_state()
    for seed in range(6):
        assert torch.equal(change(images, seeded(seed)), change(images, seeded(seed)))
        assert torch.autograd.gradcheck(lambda x, seed=seed: change(x, seeded(seed)), (images,))
    assert torch.equal(torch.get_rng_state(), before)


def test_flip_is_of_half_the_images():
    image = torch.arange(4.0).view(1, 1, 1, 4).expand(1000, 1, 1, 4)
    flipped = (poster_augment("flip", False)(image, seeded())[:, 0, 0, 0] == 3).float().mean()
    assert abs(float(flipped) - 0.5) < 0.05


def test_nothing_and_unknown_names():
    for composed in (False, True):
        assert poster_augment("none", composed) is None and poster_augment("", composed) is None
        with pytest.raises(
            UserError, match=r"unknown augmentation 'rotat' in 'flip_rotat' \(did you mean 'rotate'\?\)"
        ):
            poster_augment("flip_rotat", composed)


# --- the older augmentation ---


def test_older_augmentation_is_per_image_and_keeps_a_flat_batch():
    images = torch.randn(300, 2, 16, 16, generator=seeded())
    changed = crop_scale_rotate(images, seeded())
    assert torch.equal(changed, crop_scale_rotate(images, seeded()))
    assert not torch.equal(changed, crop_scale_rotate(images, seeded(1)))
    flat = crop_scale_rotate(torch.full((60, 1, 16, 16), 0.5), seeded())
    kept = torch.isclose(flat, torch.tensor(0.5)).flatten(1).all(1)  # what comes in is the mean
    assert 0.6 < kept.float().mean() < 0.95
    dark = flat[~kept]  # scaled down: zero outside
    assert set(dark.unique().tolist()) == {0.0, 0.5}


def test_older_crop_moves_by_four_to_three_and_fills_with_the_mean():
    images = torch.randn(1, 2, 12, 12, generator=seeded()).expand(400, 2, 12, 12)
    changed = crop_scale_rotate(images, seeded())
    mean = images[0].mean((1, 2))[:, None, None]
    seen = {}
    for down in range(-5, 6):
        for right in range(-5, 6):
            moved = dsa.crop(images[:1] - mean, values(down), values(right)) + mean
            seen[down, right] = int(torch.isclose(changed, moved, atol=1e-5).flatten(1).all(1).sum())
    found = {shift for shift, count in seen.items() if count}
    assert found <= {(down, right) for down in range(-4, 4) for right in range(-4, 4)}
    assert {down for down, _ in found} == {right for _, right in found} == set(range(-4, 4))
    assert 100 < sum(seen.values()) < 170  # a third


def test_older_rotation_is_up_to_45_degrees(monkeypatch):
    seen = []
    original = dsa.rotate
    monkeypatch.setattr(dsa, "rotate", lambda images, degrees: seen.append(degrees) or original(images, degrees))
    crop_scale_rotate(torch.randn(3000, 1, 4, 4, generator=seeded()), seeded())
    (degrees,) = seen
    assert 900 < len(degrees) < 1100
    assert (degrees.min(), degrees.max()) == (-45, 44) and torch.equal(degrees, degrees.round())


def test_older_scale_sizes():
    factors = torch.tensor([[0.8, 1.0, 1.19], [1.19, 1.0, 0.8]])
    ones = dsa._resized(torch.ones(3, 1, 20, 20), factors)[:, 0]
    assert [int(image.any(1).sum()) for image in ones] == [16, 20, 20]
    assert [int(image.any(0).sum()) for image in ones] == [20, 20, 16]
    grown = dsa._resized(ramp(10, 10), torch.tensor([[1.2], [1.0]]))[0, 0]
    assert (grown[:, 0] / 10).tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8]
