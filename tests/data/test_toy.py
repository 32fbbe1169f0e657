import pytest
import torch

from data import DataConfig, build_dataset
from data.toy import COLOURS, HELD_OUT, SHAPES, SIZES, Drawings, Scene, Thing, draw, draw_scenes
from utils.files import digest


def toy(**changes):
    return build_dataset(DataConfig(**({"dataset": "toy", "image_size": 32, "toy_images": 60} | changes)), "cpu")


def everything(split):
    return split.eval_images(torch.arange(split.num_images))


def test_two_builds_are_equal():
    one, other = toy(), toy()
    for split in ("train", "val", "test"):
        a, b = getattr(one, split), getattr(other, split)
        assert a.captions == b.captions
        assert digest(everything(a)) == digest(everything(b))
        assert one.fingerprint(split) == other.fingerprint(split)


def test_shapes_and_sizes():
    data = toy()
    assert (data.train.num_images, data.val.num_images, data.test.num_images) == (60, HELD_OUT, HELD_OUT)
    assert len(data.test.captions) == 5 * HELD_OUT
    assert data.test.captions_of[3] == [15, 16, 17, 18, 19]
    assert everything(data.train).shape == (60, 3, 32, 32)
    assert toy(image_size=48).val.eval_images(torch.tensor([0])).shape == (1, 3, 48, 48)


def test_held_out_scenes_do_not_depend_on_the_training_set():
    small, large = toy(toy_images=20), toy(toy_images=60)
    assert small.fingerprint("test") == large.fingerprint("test")
    assert torch.equal(everything(small.test), everything(large.test))
    assert large.train.captions[:100] == small.train.captions
    assert toy(train_limit=7).train.captions == large.train.captions[:35]
    assert torch.equal(everything(toy(train_limit=7).train), everything(large.train)[:7])


def test_no_scene_occurs_twice():
    scenes = draw_scenes(2000)
    assert len(set(scenes)) == 2000
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}


def test_captions_tell_test_images_apart():
    test = toy().test
    assert all(0 < len(caption.split()) <= 30 for caption in test.captions)
    assert len(set(test.captions)) > 0.97 * len(test.captions)
    for image, ids in enumerate(test.captions_of):
        assert len({test.captions[i] for i in ids}) == 5, image


def test_captions_are_true():
    """Where a caption names one place and colour, that colour is found there."""
    thing = Thing("circle", "red", "large", "bottom left")
    (image,) = draw([Scene("white", (thing,))], 32, torch.Generator().manual_seed(0))
    red, green, _ = image.float()
    reddish = (red > 180) & (green < 120)
    assert reddish[16:, :16].sum() > 100
    assert reddish[:16].sum() == reddish[:, 16:].sum() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_fills_its_place(shape):
    for size, radius in SIZES.items():
        scene = Scene("black", (Thing(shape, "yellow", size, "top right"),))
        (image,) = draw([scene], 64, torch.Generator().manual_seed(1))
        rows, columns = (image[0] > 100).nonzero().unbind(1)
        for low, high, middle in ((rows.min(), rows.max(), 0.27), (columns.min(), columns.max(), 0.73)):
            assert abs((low + high).item() / 128 - middle) < 0.06
            assert (high - low).item() / 64 == pytest.approx(2 * radius, rel=0.3)


def test_colours_are_apart():
    values = torch.tensor(list(COLOURS.values())).float()
    distance = torch.cdist(values, values) + 1000 * torch.eye(len(values))
    assert distance.min() > 55


def test_train_images_only_shift():
    train = toy().train
    images = train.eval_images(torch.arange(60))
    indices = torch.arange(60)
    moved = train.train_images(indices, torch.Generator().manual_seed(0))
    assert torch.equal(moved, train.train_images(indices, torch.Generator().manual_seed(0)))
    assert not torch.equal(moved, images)
    shifts = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
    inner = slice(4, -4)
    seen = set()
    for before, after in zip(images, moved, strict=True):
        matches = [s for s in shifts if torch.equal(after[:, inner, inner], before.roll(s, (1, 2))[:, inner, inner])]
        assert matches
        seen.update(matches)
    assert len(seen) > 10
    plain = toy(no_aug=True).train
    assert torch.equal(plain.train_images(indices, torch.Generator()), everything(plain))


def test_shift_repeats_the_edge():
    ramp = torch.arange(32, dtype=torch.uint8).expand(1, 3, 32, 32)
    moved = Drawings(ramp).augmented(torch.zeros(50, dtype=torch.long), torch.Generator().manual_seed(0), "cpu")
    assert moved.dtype == torch.uint8
    starts = moved[:, 0, 0, 4].int() - 4
    assert set(starts.tolist()) == {-2, -1, 0, 1, 2}
    for image, start in zip(moved, starts, strict=True):
        assert torch.equal(image[0, 0].int(), (torch.arange(32) + start).clamp(0, 31).int())
