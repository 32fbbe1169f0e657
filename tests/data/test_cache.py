import dataclasses
import functools
import math
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from data import cache
from data.cache import ImageFiles, PackedImages
from data.captions import MEAN, STD
from tests.conftest import unreadable
from utils.errors import UserError
from utils.files import digest

SIZE = 16


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded, in the order of decoding."""
    names = []
    original = cache.decode

    def spy(file, *rest):
        names.append(file.name)
        return original(file, *rest)

    monkeypatch.setattr(cache, "decode", spy)
    return names


@pytest.fixture
def hashed(monkeypatch):
    names = []
    original = cache.file_digest
    monkeypatch.setattr(cache, "file_digest", lambda file: names.append(file) or original(file))
    return names


def everything(split):
    return split.eval_images(torch.arange(split.num_images))


def caches(library):
    return sorted((library.root / "cache").rglob("*.images"))


def test_test_transform_is_torchvisions(library):
    test = library.data().test
    reference = transforms.Compose(
        [
            transforms.Resize((SIZE, SIZE), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    files = [library.images / name for name in test.paths]
    expected = torch.stack([reference(Image.open(file).convert("RGB")) for file in files])
    images = everything(test)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)  # one grey level is 0.015
    assert torch.equal(test.eval_images(torch.tensor([2, 0, 2])), images[[2, 0, 2]])


def test_squashed_is_pil_pixel_by_pixel_even_for_a_large_photograph(tmp_path):
    coarse = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    file = tmp_path / "large.jpg"
    Image.fromarray(coarse).resize((1200, 800)).save(file)
    expected = Image.open(file).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    assert np.array_equal(cache.decode(file, "squashed", SIZE, tmp_path), np.asarray(expected))


@pytest.mark.parametrize("extent", [(400, 300), (300, 400), (20, 15), (64, 64), (1000, 30)])
def test_ragged_keeps_shape_and_enough_pixels(tmp_path, extent):
    file = tmp_path / "photo.jpg"
    Image.effect_noise(extent, 60).convert("RGB").resize(extent).save(file)
    height, width, _ = cache.decode(file, "ragged", SIZE, tmp_path).shape
    short = min(*extent, math.ceil(SIZE * math.sqrt(2)))
    assert min(height, width) == short
    assert max(height, width) == round(max(extent) * short / min(extent))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    file = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    image = Image.effect_noise((30, 40), 60).convert("RGB").convert(mode)
    image.save(file)
    expected = Image.open(file).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    assert np.array_equal(cache.decode(file, "squashed", SIZE, tmp_path), np.asarray(expected))


def test_each_image_is_decoded_once_and_read_once(library, decoded, hashed):
    first = everything(library.data().test)
    assert sorted(decoded) == [f"test{i}.jpg" for i in range(4)]
    assert len(hashed) == 4
    again = library.data().test
    assert torch.equal(everything(again), first)
    assert torch.equal(everything(again), first)
    assert len(decoded) == 4
    assert len(hashed) == 4  # sizes and times sufficed


def test_same_content_elsewhere_is_found(library, decoded, hashed):
    first = everything(library.data().test)
    shutil.copytree(library.images, library.root / "moved")
    moved = library.data(image_root=str(library.root / "moved")).test
    assert torch.equal(everything(moved), first)
    assert len(decoded) == 4
    assert len(hashed) == 8
    assert len(caches(library)) == 1


def test_changed_content_is_decoded_anew_even_with_the_old_size_and_time(library, decoded):
    first = everything(library.data().test)
    one, other = (library.images / name for name in library.names["test"][:2])
    padded = max(one.stat().st_size, other.stat().st_size)
    for file in (one, other):
        file.write_bytes(file.read_bytes().ljust(padded, b"\0"))  # decoders ignore what follows the image
    padded_images = everything(library.data().test)
    assert torch.equal(padded_images, first)
    times = one.stat()
    one.write_bytes(other.read_bytes())
    os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = everything(library.data().test)
    assert torch.equal(changed[0], first[1])
    assert torch.equal(changed[1:], first[1:])
    assert len(decoded) == 12


def test_another_size_is_another_cache(library):
    assert everything(library.data().test).shape[-1] == SIZE
    assert everything(library.data(image_size=24).test).shape[-1] == 24
    assert len(caches(library)) == 2


def training(library, layout):
    """All training images of a cache that is opened anew."""
    train = library.data().train
    rng = torch.Generator().manual_seed(0)
    return everything(train) if layout == "squashed" else train.train_images(torch.arange(12), rng)


@pytest.mark.parametrize("layout", ["squashed", "ragged"])
@pytest.mark.parametrize("damage", ["cut", "beheaded", "longer", "empty", "table"])
def test_damaged_cache_is_made_again(library, decoded, layout, damage):
    images = functools.partial(training, library, layout)
    first = images()
    (file,) = caches(library)
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "beheaded":
        content = content[3:]
    elif damage == "longer":
        content += b"more"
    elif damage == "empty":
        content = bytearray()
    else:
        content[-20] ^= 1
    file.write_bytes(content)
    assert torch.equal(images(), first)
    assert len(decoded) == 24
    assert len(file.read_bytes()) > len(content) / 2


@pytest.mark.parametrize("layout", ["squashed", "ragged"])
def test_a_flipped_bit_is_never_an_image(library, decoded, layout):
    images = functools.partial(training, library, layout)
    first = images()
    (file,) = caches(library)
    good = file.read_bytes()
    for at in range(0, len(good) - 12 * 32 - 8, len(good) // 7):
        file.unlink()  # threads may still read the one that was refused
        file.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(UserError, match=rf"image cache {file} is damaged \(its image \d+ is .*; remove it and"):
            images()
    file.unlink()
    assert torch.equal(images(), first)
    assert len(decoded) == 24


def test_an_undamaged_image_is_read_beside_a_damaged_one(tmp_path):
    pixels = torch.arange(2 * 12, dtype=torch.uint8).numpy()
    rows = np.array([(0, 2, 2, zlib.crc32(pixels[:12])), (12, 2, 2, zlib.crc32(pixels[12:]))], dtype=np.int64)
    pixels[3] ^= 1
    (tmp_path / "two.images").write_bytes(pixels.tobytes() + rows.tobytes() + np.int64(zlib.crc32(rows)).tobytes())
    packed = PackedImages(tmp_path / "two.images", 2)
    assert packed[1].flatten().tolist() == [*range(12, 24)]
    assert packed.batch(torch.tensor([1])).shape == (1, 2, 2, 3)
    for read in (lambda: packed[0], packed.whole, lambda: packed.batch(torch.tensor([1, 0]))):
        with pytest.raises(UserError, match="its image 0 is not what"):
            read()


def test_a_cache_of_the_first_format_is_made_anew(library, decoded, capsys):
    first = everything(library.data().test)
    (file,) = caches(library)
    old = file.with_name(file.name.replace(f"_v{cache.VERSION}_", "_v1_"))
    old.write_bytes(b"\0" * 100)
    file.unlink()
    assert torch.equal(everything(library.data().test), first)
    assert len(decoded) == 8 and f"{old} has no checksums; its images are decoded again" in capsys.readouterr().out


def test_damaged_pointer_is_made_again(library, decoded, hashed):
    first = everything(library.data().test)
    (pointer,) = (library.root / "cache").rglob("files_*.txt")
    good = pointer.read_text()
    flipped = ("0" if good[9] != "0" else "1").join((good[:9], good[10:]))
    for times, damaged in enumerate(("half a na", flipped, good[:64], good[:40]), 2):
        pointer.write_text(damaged)
        assert torch.equal(everything(library.data().test), first)
        assert len(decoded) == 4
        assert len(hashed) == 4 * times
    assert pointer.read_text() == good


def test_failed_build_leaves_nothing(library):
    file = library.images / library.names["test"][2]
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match=r"test2\.jpg cannot be decoded .* drop it from .*flickr30k_test\.json"):
        everything(library.data().test)
    assert not [path for path in (library.root / "cache").rglob("*") if path.suffix in (".images", ".part")]
    file.write_bytes(good)
    assert everything(library.data().test).shape == (4, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"\xff\xd8\xff\xe0" + b"\0" * 9]
)
def test_what_is_no_image_is_named(library, content):
    (library.images / library.names["val"][1]).write_bytes(content)
    with pytest.raises(UserError, match=r"val1\.jpg cannot be decoded") as caught:
        everything(library.data().val)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [9_600, 20_000])  # PIL only warns of the first
def test_image_bomb_is_refused(library, side):
    Image.new("1", (side, side)).save(library.images / library.names["val"][1], format="PNG")
    with pytest.raises(UserError, match=r"val1\.jpg has too many pixels; shrink it or drop it from .*_val\.json"):
        everything(library.data().val)


def test_a_few_images_need_no_cache(library, decoded):
    names = library.names["train"] * 4  # 48 images, so two may be asked for without a cache
    files = ImageFiles(
        [library.images / name for name in names], SIZE, library.root / "cache", 2, "train", library.root
    )
    loose = torch.cat([files.plain(torch.tensor([30])), files.plain(torch.tensor([7]))])
    assert len(decoded) == 2
    assert not caches(library)
    packed = files.plain(torch.tensor([30, 7, 30]))
    assert len(caches(library)) == 1
    assert torch.equal(packed[:2], loose)


def test_train_images_replay_whatever_the_workers(library):
    indices = torch.tensor([0, 5, 5, 11, 3])

    def images(seed, workers):
        rng = torch.Generator().manual_seed(seed)
        return library.data(workers=workers).train.train_images(indices, rng)

    first = images(1, workers=1)
    assert first.shape == (5, 3, SIZE, SIZE)
    assert first.dtype == torch.float32
    assert torch.equal(first, images(1, workers=3))
    assert not torch.equal(first, images(2, workers=1))
    assert not torch.equal(first[1], first[2])  # one image, asked for twice


def test_two_runs_may_build_at_once(library):
    code = (
        "import sys, torch; from data import DataConfig, build_dataset; from utils.files import digest;"
        "test = build_dataset(DataConfig(*eval(sys.argv[1])), 'cpu').test;"
        "print(digest(test.eval_images(torch.arange(4))))"
    )
    cfg = repr(dataclasses.astuple(library.config()))
    runs = [subprocess.Popen([sys.executable, "-c", code, cfg], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [run.communicate(timeout=60)[0].strip() for run in runs]
    assert printed == [digest(everything(library.data().test))] * 2
    assert len(caches(library)) == 1
    assert not list((library.root / "cache").rglob("*.part"))


def test_train_images_advance_the_generator(library):
    train, rng = library.data().train, torch.Generator().manual_seed(0)
    assert not torch.equal(*(train.train_images(torch.arange(3), rng) for _ in range(2)))


def test_no_aug_trains_on_test_images(library):
    train = library.data(no_aug=True).train
    assert torch.equal(train.train_images(torch.arange(12), torch.Generator()), everything(train))


def test_mean_and_std_undo_the_normalisation(library):
    data = library.data()
    pixels = (everything(data.test) * data.std + data.mean) * 255
    assert torch.allclose(pixels, pixels.round(), atol=1e-3)
    assert pixels.round().min() >= 0
    assert pixels.round().max() <= 255


def test_packed_images_are_views_of_one_file(tmp_path):
    shapes = [(2, 3, 3), (4, 1, 3)]
    arrays = [np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8) for i, shape in enumerate(shapes)]
    rows = [(at, *array.shape[:2], zlib.crc32(array)) for at, array in zip((0, 18), arrays, strict=True)]
    table = np.array(rows, dtype=np.int64)
    path = tmp_path / "two.images"
    end = np.int64(zlib.crc32(table)).tobytes()
    path.write_bytes(b"".join(array.tobytes() for array in arrays) + table.tobytes() + end)
    packed = PackedImages(path, 2)
    turned = table.copy()
    turned[0, 1:3] = 3, 2  # as many pixels, in another shape: only the table's own checksum tells
    (tmp_path / "turned").write_bytes(path.read_bytes()[: -len(end) - table.nbytes] + turned.tobytes() + end)
    with pytest.raises(ValueError, match="damaged table"):
        PackedImages(tmp_path / "turned", 2)
    assert all(np.array_equal(packed[i].numpy(), array) for i, array in enumerate(arrays))
    with pytest.raises(ValueError, match="table"):
        PackedImages(path, 1)
    with unreadable(tmp_path, path), pytest.raises(PermissionError, match=r"two\.images"):
        PackedImages(Path("two.images"), 2)


@pytest.mark.parametrize("side", [0, -1, 1 << 31, 1 << 40])
def test_no_image_of_an_absurd_shape(tmp_path, side):
    table = np.array([(0, side, side, 0)], dtype=np.int64)
    (tmp_path / "one.images").write_bytes(table.tobytes() + np.int64(zlib.crc32(table)).tobytes())
    with pytest.raises(ValueError, match="table"):
        PackedImages(tmp_path / "one.images", 1)


def test_images_in_passing(library, decoded):
    """In order, a few at a time, and no cache is made of them."""
    files = sorted(library.root.rglob("*.jpg"))[:7]
    images = ImageFiles(files, SIZE, library.root / "apart", 2, "train", library.root, "bilinear")
    parts = list(images.passing(3))
    assert [len(part) for part in parts] == [3, 3, 1] and len(decoded) == 7
    assert not (library.root / "apart").exists()
    assert torch.equal(torch.cat(parts), images.whole())
