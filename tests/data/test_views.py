"""Views of an image: to the pixel what torchvision makes of it, and the same for any number of threads."""

import io
import math
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from data.payloads import image_payload
from data.pools import PoolsConfig, open_images
from data.tsv import TsvWriter
from data.views import CLIP_MEAN, CLIP_STD, Reader, normalised, plain_view, random_crop, training_view
from utils.rng import generator


def photograph(width=90, height=61, seed=0):
    """A smooth picture that has no two equal parts."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("extent", [(90, 61), (61, 90), (32, 32), (20, 31), (500, 33)])
def test_the_plain_view_is_clips_own(extent):
    from torchvision import transforms

    image = photograph(*extent)
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose([transforms.Resize(32, bicubic), transforms.CenterCrop(32), transforms.PILToTensor()])
    assert torch.equal(plain_view(image, 32), theirs(image))
    squashed = transforms.Compose([transforms.Resize((32, 32), bicubic), transforms.PILToTensor()])
    assert torch.equal(plain_view(image, 32, crop=False), squashed(image))


def test_the_training_view_is_the_published_one(monkeypatch):
    from torchvision import transforms
    from torchvision.transforms import functional

    bicubic, bilinear = transforms.InterpolationMode.BICUBIC, transforms.InterpolationMode.BILINEAR
    image = photograph()
    for seed in range(20):
        found = training_view(image, generator(seed, "view"), 224)
        rng = generator(seed, "view")
        large = functional.resize(image, 256, bicubic)
        left, top, width, height = random_crop(large.size, rng, 0.08)
        theirs = functional.resized_crop(large, top, left, height, width, [224, 224], bilinear)
        flipped = bool(torch.rand((), generator=rng) < 0.5)
        theirs = functional.pil_to_tensor(functional.hflip(theirs) if flipped else theirs)
        assert torch.equal(found, theirs)
        assert found.dtype == torch.uint8 and found.shape == (3, 224, 224) and found.is_contiguous()


def test_crops_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    extent, count = (384, 256), 2000
    rng = generator(0, "crops")
    ours = np.array([random_crop(extent, rng, 0.08) for _ in range(count)], dtype=float)
    torch.manual_seed(0)
    blank = torch.empty(3, extent[1], extent[0])
    drawn = [RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    theirs = np.array([(left, top, width, height) for top, left, height, width in drawn], dtype=float)
    for one, other in ((ours, theirs), (np.log(ours[:, 2:]), np.log(theirs[:, 2:]))):
        error = np.sqrt((one.var(0) + other.var(0)) / count)
        assert (np.abs(one.mean(0) - other.mean(0)) < 4 * error).all()
        assert (np.abs(one.std(0) / other.std(0) - 1) < 0.08).all()


def test_crops_lie_within_and_have_an_allowed_shape():
    rng = generator(0, "crops")
    for extent in ((256, 256), (300, 256), (256, 400)):
        for _ in range(300):
            left, top, width, height = random_crop(extent, rng, 0.3)
            assert left >= 0 and top >= 0 and left + width <= extent[0] and top + height <= extent[1]
            assert 0.29 < width * height / (extent[0] * extent[1]) <= 1
            assert 0.74 < width / height < 1.35


@pytest.mark.parametrize(("extent", "box"), [((400, 4), (197, 0, 5, 4)), ((3, 300), (0, 148, 3, 4))])
def test_a_picture_too_long_for_any_crop_gives_its_middle(extent, box):
    from torchvision.transforms import RandomResizedCrop

    assert random_crop(extent, generator(0, "crops"), 1.0) == box
    top, left, height, width = RandomResizedCrop.get_params(
        torch.empty(3, extent[1], extent[0]), [1.0, 1.0], [3 / 4, 4 / 3]
    )
    assert (left, top, width, height) == box


def test_half_of_the_training_views_are_mirrored():
    image = photograph(256, 256)
    mirrored = 0
    for seed in range(200):
        rng = generator(seed, "view")
        view = training_view(image, rng, 224, min_scale=1.0).float()
        plain = plain_view(image, 224).float()
        mirrored += bool((view.flip(2) - plain).abs().mean() < (view - plain).abs().mean())
    assert 70 < mirrored < 130  # four deviations


def test_a_view_follows_its_generator():
    image = photograph()
    views = [training_view(image, generator(seed, "view"), 32) for seed in (0, 0, 1)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_normalising_by_hand():
    images = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).expand(2, 3, 2, 2)
    found = normalised(images)
    for channel in range(3):
        by_hand = [(value / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel] for value in (0, 255, 51, 102)]
        assert found[1, channel].flatten().tolist() == pytest.approx(by_hand, abs=1e-6)
    assert math.isclose(float(normalised(images, (0, 0, 0), (1, 1, 1)).max()), 1.0)
    assert CLIP_MEAN == (0.48145466, 0.4578275, 0.40821073) and CLIP_STD == (0.26862954, 0.26130258, 0.27577711)


# Many at once


@pytest.fixture(scope="module")
def pool():
    return open_images(["toy"], PoolsConfig(toy_images=30, toy_size=16))


def view(image, row):
    return training_view(image, generator(0, "view", row), 16)


def test_threads_change_nothing(pool):
    rows = torch.randperm(30, generator=generator(0, "rows"))
    one, four = Reader(pool, 1), Reader(pool, 4)
    first, ok = one.batch(rows, view)
    assert first.shape == (30, 3, 16, 16) and ok.all()
    assert torch.equal(first, four.batch(rows, view)[0])
    assert torch.equal(first, torch.stack([view(pool.image(row), row) for row in rows.tolist()]))
    one.close(), four.close()


def test_a_stream_is_its_batches_in_order(pool):
    reader = Reader(pool, 2)
    jobs = [(torch.tensor([k, 29 - k]), view) for k in range(9)]
    streamed = list(reader.stream(jobs))
    assert len(streamed) == 9
    for (images, ok), job in zip(streamed, jobs, strict=True):
        assert torch.equal(images, reader.batch(*job)[0]) and ok.tolist() == [True, True]


def test_a_stream_looks_only_so_far_ahead(pool):
    begun = []

    def jobs():
        for k in range(9):
            begun.append(k)
            yield [k], view

    stream = Reader(pool, 2).stream(jobs(), ahead=3)
    next(stream)
    assert begun == [0, 1, 2, 3]


def test_reading_is_shared_among_threads(pool):
    meeting = threading.Barrier(4, timeout=30)

    def wait(image, row):
        meeting.wait()  # passes only where four are read at once
        return view(image, row)

    assert Reader(pool, 4).batch(range(8), wait)[1].all()


def test_bad_images_are_left_out_and_noted(tmp_path):
    buffer = io.BytesIO()
    photograph(16, 16).save(buffer, "PNG")
    with TsvWriter(tmp_path / "x.tsv") as writer:
        for row in range(6):
            writer.add(f"k{row}", image_payload(buffer.getvalue() if row not in (1, 4) else b"?"))
    reader = Reader(open_images([str(tmp_path / "x.tsv")], PoolsConfig()), 2)
    images, ok = reader.batch([0, 1, 2, 4], view)
    assert ok.tolist() == [True, False, True, False] and images.shape == (2, 3, 16, 16)
    assert sorted(reader.bad) == [1, 4] and reader.bad[4].startswith(f"k4 of {tmp_path}/x.tsv (it is none of")
    images, ok = reader.batch([1, 4], view)
    assert len(images) == 0 and not ok.any()


def test_other_errors_are_not_taken_for_bad_images(pool):
    def broken(image, row):
        raise KeyError(row)

    with pytest.raises(KeyError):
        Reader(pool, 2).batch([0], broken)
