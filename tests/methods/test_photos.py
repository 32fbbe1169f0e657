"""Photographs and what is done to them, against torchvision and slow, obvious twins."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as reference

from data.photographs import IMAGENET_STATS
from methods.core import photo_augment as augment
from methods.core.photos import Batches, Photos, ShapedBatches
from utils.errors import UserError

SHAPES = [(40, 60), (61, 33), (32, 32), (50, 50), (20, 30)]  # heights and widths


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for place, shape in enumerate(SHAPES):
        files.append(tmp_path / f"{place}.png")
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(files[-1])
    return Photos(files, torch.arange(5) % 2, tmp_path / "cache", 2, "train")


@pytest.mark.parametrize(("size", "resize"), [(32, 0), (28, 32), (21, 24), (48, 48)])
def test_squares_are_torchvisions(photos, size, resize):
    same = transforms.Compose(
        [transforms.Resize(resize or size), transforms.CenterCrop(size), transforms.PILToTensor()]
    )
    wanted = torch.stack([same(Image.open(file).convert("RGB")) for file in photos.files])
    assert torch.equal(photos.squares(size, resize), wanted)


def test_natives_keep_their_shapes(photos):
    natives = photos.natives(48)
    assert [tuple(natives[place].shape[:2]) for place in range(5)] == SHAPES
    assert torch.equal(natives[1], torch.from_numpy(np.array(Image.open(photos.files[1]))))
    assert min(photos.natives(16)[0].shape[:2]) == math.ceil(16 * math.sqrt(2))


def test_batches_by_shape(photos, tmp_path):
    mixed = ShapedBatches(photos.natives(48), torch.device("cpu"))
    rows = torch.tensor([4, 2, 0, 2])
    found = {
        int(place): image for places, group in mixed.images(rows) for place, image in zip(places, group, strict=True)
    }
    for place, row in enumerate(rows.tolist()):
        wanted = reference.to_tensor(Image.open(photos.files[row]))
        assert torch.allclose(found[place], wanted)
    same = Photos(photos.files[2:3] * 3, torch.zeros(3), tmp_path / "cache", 1, "train")
    ((places, group),) = ShapedBatches(same.natives(48), torch.device("cpu")).images(torch.tensor([2, 0]))
    assert places.tolist() == [0, 1]
    assert torch.allclose(group[1], reference.to_tensor(Image.open(photos.files[2])))


def test_a_large_set_gives_the_same_batches(photos, monkeypatch):
    squares, rows = photos.squares(32), torch.tensor([3, 0])
    wanted = Batches(squares, photos.labels, torch.device("cpu")).images(rows)
    monkeypatch.setattr("methods.core.photos.RESIDENT", 0)
    assert torch.equal(Batches(squares, photos.labels, torch.device("cpu")).images(rows), wanted)


def test_content_is_that_of_images_and_classes(photos, tmp_path):
    def content(files, labels):
        return Photos(files, labels, tmp_path / "cache", 1, "train").content()

    wanted = photos.content()
    assert content(photos.files, photos.labels.clone()) == wanted
    assert content(photos.files, 1 - photos.labels) != wanted
    assert content(photos.files[::-1], photos.labels) != wanted


def test_what_is_no_photograph(tmp_path):
    with pytest.raises(UserError, match="there are no train images"):
        Photos([], torch.zeros(0), tmp_path, 1, "train")
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(UserError, match=r"x\.png cannot be decoded"):
        Photos([tmp_path / "x.png"], torch.zeros(1), tmp_path, 1, "train").squares(8)
    with pytest.raises(UserError, match="are missing"):
        Photos([tmp_path / "y.png"], torch.zeros(1), tmp_path, 1, "train").squares(8)


@pytest.mark.parametrize("size", [12, 24, 40])
def test_crops_are_torchvisions(size):
    images = torch.rand(4, 3, 30, 40, generator=generator())
    boxes = torch.tensor([[0, 0, 30, 40], [3, 5, 7, 9], [10, 20, 20, 20], [29, 0, 1, 40]])
    found = augment.resized_crops(images, boxes, size)
    for image, box, crop in zip(images, boxes.tolist(), found, strict=True):
        wanted = reference.resized_crop(image, *box, [size, size], antialias=True)
        assert torch.allclose(crop, wanted, atol=2e-5)
        alone = augment.resized_crops(image[None], torch.tensor([box]), size)[0]
        assert torch.allclose(alone, wanted, atol=1e-6)


def test_random_crops_keep_half_of_the_image():
    ramp = torch.linspace(0, 1, 64).expand(200, 3, 64, 64)
    crops = augment.random_crops(ramp, 64, (0.5, 1.0), generator())
    width = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]) * 63 / 64
    assert width.min() > 0.55 and width.max() > 0.95  # at least sqrt(0.5 * 3/4) of a side
    whole = augment.random_crops(ramp, 64, (1.0, 1.0), generator())
    assert torch.allclose(whole, ramp, atol=1e-6)


def slow_tint(image, amounts, order):
    """IDC's colour jitter, image by image."""
    for kind in order:
        grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        aim = [torch.zeros_like(image), torch.full_like(image, grey.mean().item()), grey.expand(3, -1, -1)][kind]
        image = image.lerp(aim, amounts[kind].item())
    return image


def test_tints():
    images = torch.rand(12, 3, 6, 6, generator=generator())
    tint = augment.draw_tint(12, generator(1))
    found = augment.tinted(images, tint)
    for place in range(12):
        wanted = slow_tint(images[place], tint.amounts[place], tint.order[place].tolist())
        assert torch.allclose(found[place], wanted + tint.light[place][:, None, None], atol=1e-5)
    assert found.max() > 1  # not clamped


def test_chance_of_tints():
    tint = augment.draw_tint(20_000, generator())
    assert tint.amounts.abs().max() <= 0.4 and tint.amounts.std().item() == pytest.approx(0.4 / math.sqrt(3), rel=0.02)
    assert len(tint.order.unique(dim=0)) == 6
    # The covariance of AlexNet's lighting: 0.1² · axes · eigenvalues² · axesᵀ; red and blue vary together.
    axes = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    wanted = 0.01 * axes @ torch.diag(torch.tensor([0.2175, 0.0188, 0.0045]) ** 2) @ axes.T
    assert torch.allclose(tint.light.T.cov(), wanted, atol=1e-5)


def test_normalised():
    images = torch.rand(2, 3, 4, 4)
    wanted = reference.normalize(images, *IMAGENET_STATS)
    assert torch.allclose(augment.normalised(images, IMAGENET_STATS), wanted)


@pytest.mark.parametrize(
    ("kept", "side", "point", "box", "share"),
    [
        (0.75, 224, (112, 112), (56, 168, 56, 168), 0.75),
        (0.5, 32, (16, 16), (5, 27, 5, 27), 1 - 22**2 / 32**2),
        (0.75, 32, (0, 0), (0, 8, 0, 8), 0.9375),
    ],
)
def test_boxes_of_cutmix(kept, side, point, box, share):
    top, bottom, left, right = augment.cut_box(kept, side, *point)
    assert (top, bottom, left, right) == box
    assert 1 - (bottom - top) * (right - left) / side**2 == share


def test_mixes():
    images = torch.rand(6, 3, 8, 8, generator=generator())
    mix = augment.draw_mix("cutmix", 1.0, 6, 8, generator(3))
    top, bottom, left, right = mix.box
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    assert mix.share == pytest.approx(1 - inside.float().mean().item())
    assert torch.equal(mix(images), torch.where(inside, images[mix.order], images))
    blend = augment.draw_mix("mixup", 0.8, 6, 8, generator(3))
    assert torch.allclose(blend(images), blend.share * images + (1 - blend.share) * images[blend.order])
    rng = generator()
    shares = torch.tensor([augment.draw_mix("mixup", 0.8, 2, 8, rng).share for _ in range(2000)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
    assert shares.var().item() == pytest.approx(1 / (4 * 2.6), abs=0.006)  # of Beta(0.8, 0.8)


def test_bands_of_two_make_four_pictures():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    rng = generator()
    found = {tuple(augment.shuffle_bands(image, augment.draw_bands(1, 2, rng)).flatten().tolist()) for _ in range(60)}
    assert len(found) == 4
    assert (10, 11, 8, 9, 14, 15, 12, 13, 2, 3, 0, 1, 6, 7, 4, 5) in found
    assert tuple(range(16)) in found


def test_the_last_band_takes_what_is_left():
    images = torch.arange(7.0).view(1, 1, 1, 7).expand(2, 3, 5, 7)
    bands = torch.tensor([[[2, 0, 1], [0, 1, 2]], [[0, 1, 2], [0, 1, 2]]])
    found = augment.shuffle_bands(images, bands)
    assert found[0, 2, 4].tolist() == [4, 5, 6, 0, 1, 2, 3]
    assert torch.equal(found[1], images[1])
