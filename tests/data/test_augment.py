import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from data.augment import OPS, draw_ops, magnitude, rand_augment, random_boxes, random_flip, resized_crop


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def apply(op, images, sign=1.0, level=5.0):
    ops = torch.full((1, len(images)), OPS.index(op))
    return rand_augment(images, ops, torch.full((1, len(images)), sign), level)


def photographs(count=6, size=24, seed=0):
    """Smooth pictures whose channels span different, partial ranges of tones."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        low, high = sorted(rng.integers(0, 256, 2).tolist())
        coarse = rng.integers(low, high + 1, (4, 4, 3), dtype=np.uint8)
        pictures.append(np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def as_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def dot(row, column, size=21):
    images = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    images[:, :, row, column] = 255
    return images


def centroid(images, margin):
    """Row and column of the light in the first image, without the grey that comes in over the edge."""
    light = images[0, 0, margin:-margin, margin:-margin].double()
    steps = torch.arange(light.shape[0]) + margin
    return ((light.sum(1) @ steps.double()) / light.sum()).item(), (
        (light.sum(0) @ steps.double()) / light.sum()
    ).item()


def test_magnitudes_at_level_five():
    expected = {"shear_x": 0.15, "shear_y": 0.15, "translate_x": 5, "translate_y": 5, "rotate": 15}
    assert {op: magnitude(op, 5) for op in expected} == pytest.approx(expected)
    assert magnitude("brightness", 5) == magnitude("sharpness", 5) == 1.0
    assert magnitude("brightness", 10) == pytest.approx(1.9)


@pytest.mark.parametrize(
    ("op", "sign", "place"),
    [
        ("translate_x", 1.0, (10, 15)),
        ("translate_x", -1.0, (10, 5)),
        ("translate_y", 1.0, (15, 10)),
        ("translate_y", -1.0, (5, 10)),
    ],
)
def test_a_dot_moves_by_whole_pixels(op, sign, place):
    expected = dot(*place)
    uncovered = slice(None, 5) if sign > 0 else slice(-5, None)
    expected[(..., uncovered) if op == "translate_x" else (..., uncovered, slice(None))] = 128
    assert torch.equal(apply(op, dot(10, 10), sign), expected)


@pytest.mark.parametrize(("sign", "side"), [(1.0, -1), (-1.0, 1)])
def test_rotation_turns_about_the_centre(sign, side):
    turned = apply("rotate", dot(20, 28, size=41), sign)
    angle = math.radians(15)
    assert centroid(turned, 9) == pytest.approx((20 + side * 8 * math.sin(angle), 20 + 8 * math.cos(angle)), abs=0.1)
    assert apply("rotate", dot(20, 20, size=41), sign)[0, 0, 20, 20] == 255


def test_shear_slides_rows_and_keeps_the_corner():
    image = torch.zeros(1, 3, 41, 41, dtype=torch.uint8)
    image[..., 20] = 255  # an upright line
    leaning = apply("shear_x", image)[0, 0].float()
    assert leaning[0].argmax() == 20
    assert leaning[40].where(leaning[40] != 128, 0).argmax() == 20 - round(0.15 * 40.5)
    upright = apply("shear_y", image.transpose(2, 3))[0, 0].float()
    assert torch.equal(upright, leaning.T)


@pytest.mark.parametrize("op", ["shear_x", "shear_y", "rotate"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_shifts_are_pils(op, sign):
    images = photographs(3, size=32)
    for image, moved in zip(images, apply(op, images, sign), strict=True):
        slope = 0.15 * sign
        how = {"resample": Image.Resampling.BILINEAR, "fillcolor": (128, 128, 128)}
        affine = {"shear_x": (1, slope, 0, 0, 1, 0), "shear_y": (1, 0, 0, slope, 1, 0)}.get(op)
        if affine:
            expected = as_pil(image).transform((32, 32), Image.Transform.AFFINE, affine, **how)
        else:
            expected = as_pil(image).rotate(15 * sign, **how)
        difference = (moved.int() - as_tensor(expected).int()).abs()
        # The edge differs: PIL cuts where this blends with grey, as OpenCV does.
        assert (difference <= 1).float().mean() > 0.93
        assert difference[:, 8:-8, 8:-8].max() <= 1


@pytest.mark.parametrize(("op", "pil"), [("autocontrast", ImageOps.autocontrast), ("equalize", ImageOps.equalize)])
def test_tone_curves_are_pils(op, pil):
    flat = torch.full((1, 3, 24, 24), 77, dtype=torch.uint8)
    two_tones = flat.clone()
    two_tones[..., 3:, :] = 200
    images = torch.cat([photographs(8), flat, two_tones, dot(3, 4, 24)])
    changed = apply(op, images)
    for image, result in zip(images, changed, strict=True):
        assert torch.equal(result, as_tensor(pil(as_pil(image))))
    assert not torch.equal(changed, images)


@pytest.mark.parametrize(
    ("op", "pil"), [("brightness", ImageEnhance.Brightness), ("sharpness", ImageEnhance.Sharpness)]
)
@pytest.mark.parametrize("level", [0.0, 3.0, 5.0, 10.0])
def test_enhancements_are_pils(op, pil, level):
    images = photographs()
    changed = apply(op, images, level=level)
    for image, result in zip(images, changed, strict=True):
        expected = as_tensor(pil(as_pil(image)).enhance(magnitude(op, level)))
        assert (result.int() - expected.int()).abs().max() <= 1
    assert torch.equal(changed, images) == (level == 5)


def test_each_image_gets_its_own_ops():
    images = photographs(len(OPS))
    ops = torch.stack([torch.arange(len(OPS)), torch.arange(len(OPS)).flip(0)])
    signs = torch.ones(ops.shape)
    together = rand_augment(images, ops, signs)
    for i in range(len(OPS)):
        assert torch.equal(together[i], rand_augment(images[i : i + 1], ops[:, i : i + 1], signs[:, i : i + 1])[0])
    assert torch.equal(images, photographs(len(OPS)))  # the input is left alone


def test_how_often_ops_occur():
    ops, signs = draw_ops(20_000, seeded())
    assert ops.shape == signs.shape == (2, 20_000)
    share = torch.bincount(ops.flatten(), minlength=len(OPS)) / ops.numel()
    idle = {"identity", "brightness", "sharpness"}  # at level 5
    assert sum(share[OPS.index(op)].item() for op in idle) == pytest.approx(0.65, abs=0.01)
    assert share[OPS.index("identity")].item() == pytest.approx(0.55, abs=0.01)
    assert all(share[i].item() == pytest.approx(0.05, abs=0.005) for i, op in enumerate(OPS) if op != "identity")
    assert signs.unique().tolist() == [-1, 1]
    assert abs(signs.mean().item()) < 0.02
    assert (ops[0] == ops[1]).float().mean().item() == pytest.approx(0.55**2 + 9 * 0.05**2, abs=0.01)  # slots are apart


def test_flip_mirrors_half():
    images = torch.arange(2000 * 3 * 2 * 4).remainder(251).to(torch.uint8).view(2000, 3, 2, 4)
    flipped = random_flip(images, seeded())
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_boxes_are_within_the_image_and_of_the_right_size():
    sizes = torch.tensor([[300, 400], [400, 300], [224, 224], [40, 33]]).repeat_interleave(5000, 0)
    top, left, height, width = random_boxes(sizes, seeded()).unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()
    share = height * width / sizes.prod(1)
    assert share.min() > 0.48
    assert share.max() <= 1
    shape = width / height
    assert shape.min() > 0.72
    assert shape.max() < 1.39
    free = (sizes[:, 0] - height)[:5000]
    assert (top[:5000] == 0).any()
    assert (top[:5000] == free).any()
    where = (top[:5000] / free.clamp(min=1))[free > 5]
    assert where.mean().item() == pytest.approx(0.5, abs=0.02)


def test_boxes_follow_torchvisions_distribution():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(3, 300, 400)
    reference = [RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    ours = random_boxes(torch.tensor([[300, 400]]).expand(4000, 2), seeded()).double()
    theirs = torch.tensor(reference, dtype=torch.float64)
    assert torch.allclose(ours.mean(0), theirs.mean(0), atol=4)
    assert torch.allclose(ours.std(0), theirs.std(0), atol=3)


def test_very_long_images_get_the_largest_central_crop():
    boxes = random_boxes(torch.tensor([[30, 1000], [1000, 30]]), seeded())
    assert boxes.tolist() == [[0, 480, 30, 40], [480, 0, 40, 30]]


@pytest.mark.parametrize("box", [(0, 0, 60, 80), (7, 11, 40, 33), (20, 3, 9, 12)])
def test_crop_is_pils_to_one_grey_level(box):
    coarse = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC)
    top, left, height, width = box
    expected = image.crop((left, top, left + width, top + height)).resize((16, 16), Image.Resampling.BICUBIC)
    ours = resized_crop(torch.from_numpy(np.array(image)), torch.tensor(box), 16)
    assert ours.dtype == torch.uint8
    assert (ours.int() - as_tensor(expected).int()).abs().max() <= 1


def test_ten_tries_are_almost_always_enough():
    # Why the fallback is rare: the chance that one try fits a 4:3 image is about a half.
    sizes = torch.tensor([[300, 400]]).expand(3000, 2)
    boxes = random_boxes(sizes, seeded())
    assert (boxes[:, 2:] == torch.tensor([300, 400])).all(1).float().mean() < math.exp(-3)
