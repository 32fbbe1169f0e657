"""Pools of images: the same pictures from every kind of place, and those that cannot be decoded."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.image_pools import BadImage, decode
from data.payloads import image_payload
from data.pools import PoolsConfig, open_images
from data.toy import captioned_shapes
from data.tsv import TsvWriter
from utils.errors import UserError

NAMES = ("a/0", "a/1", "b/0", "é")


@pytest.fixture(scope="module")
def pictures():
    """Four small pictures, (4, 9, 7, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (4, 9, 7, 3), dtype=np.uint8)


def png(pixels, form="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture
def place(tmp_path, pictures):
    """place(kind) is where the pictures are: a folder, or a .tsv, .tar or .npy file."""

    def make(kind):
        if kind == "folder":
            for name, pixels in zip(NAMES, pictures, strict=True):
                file = tmp_path / "photos" / f"{name}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(png(pixels))
            (tmp_path / "photos" / "notes.txt").write_text("no picture")
            (tmp_path / "photos" / ".hidden.png").write_bytes(b"")
            return tmp_path / "photos"
        if kind == "tsv":
            with TsvWriter(tmp_path / "image_00.tsv") as writer:
                for name, pixels in zip(NAMES, pictures, strict=True):
                    writer.add(name, image_payload(png(pixels)))
            return tmp_path / "image_00.tsv"
        if kind == "tar":
            texts = [(f"{name}.txt", b"a cat") for name in NAMES]
            images = [(f"./{name}.PNG", png(pixels)) for name, pixels in zip(NAMES, pictures, strict=True)]
            return tar(tmp_path / "00.tar", [file for pair in zip(images, texts, strict=True) for file in pair])
        np.save(tmp_path / "images.npy", pictures)
        return tmp_path / "images.npy"

    return make


def opened(*paths, **options):
    return open_images([str(path) for path in paths], PoolsConfig(**options))


def refused(work, *arguments, **options):
    with pytest.raises(UserError) as caught:
        work(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "tsv", "tar", "npy"])
def test_the_same_pictures_from_every_place(place, pictures, kind):
    pool = opened(place(kind))
    assert len(pool) == 4
    for row, pixels in enumerate(pictures):
        image = pool.image(row)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)
    keys = {"folder": [f"{name}.png" for name in NAMES], "npy": list("0123")}.get(kind, list(NAMES))
    assert [pool.key(row) for row in range(4)] == keys
    with pytest.raises(IndexError):
        pool.image(4)
    copy = pickle.loads(pickle.dumps(pool))
    assert np.array_equal(np.asarray(copy.image(3)), pictures[3])
    assert copy.fingerprint() == pool.fingerprint()


def test_places_end_to_end(place, pictures):
    pool = opened(place("npy"), place("tsv"), place("tar"))
    assert len(pool) == 12 and pool.counts == [4, 4, 4]
    assert [pool.key(row) for row in (3, 4, 11)] == ["3", "a/0", "é"]
    assert np.array_equal(np.asarray(pool.image(6)), pictures[2])


def test_drawn_pictures():
    pool = opened("toy", toy_images=20, toy_size=16)
    images, _, _ = captioned_shapes("train", 20, 16)
    assert len(pool) == 20
    assert np.array_equal(np.asarray(pool.image(7)), images[7].permute(1, 2, 0).numpy())
    assert pool.fingerprint() != opened("toy", toy_images=20, toy_size=32).fingerprint()
    assert pool.keys_digest() == opened("toy", toy_images=20, toy_size=32).keys_digest()


def test_a_fingerprint_follows_content_and_order(place):
    tsv, npy = place("tsv"), place("npy")
    assert opened(tsv, npy).fingerprint() == opened(tsv, npy).fingerprint() != opened(npy, tsv).fingerprint()
    before = opened(npy).fingerprint()
    np.save(npy, np.load(npy) ^ 1)
    assert opened(npy).fingerprint() != before


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_all_formats_become_rgb(pictures, form):
    assert decode(png(pictures[0], form), "x").size == (7, 9)
    grey = decode(png(pictures[0, :, :, 0], form), "x")
    assert grey.mode == "RGB" and np.asarray(grey).shape == (9, 7, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"no picture", "it is none of JPEG, PNG"),
        (png(NOISE, "JPEG")[:2000], "truncated"),
        (png(NOISE)[:2000], "truncated"),
    ],
)
def test_what_cannot_be_decoded(content, reason):
    with pytest.raises(BadImage) as caught:
        decode(content, "photos/0.jpg")
    assert caught.value.key == "photos/0.jpg" and reason in caught.value.reason
    assert str(caught.value) == f"photos/0.jpg ({caught.value.reason})"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [50, 10])  # of 63 pixels: PIL only warns of the first
def test_too_many_pixels(pictures, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadImage):
        decode(png(pictures[0]), "x")


def test_too_long_to_be_brought_to_a_networks_width():
    assert decode(png(np.zeros((1000, 1, 3), np.uint8)), "x").height == 1000
    with pytest.raises(BadImage, match=r"x .it is 1001 pixels wide and 1 high"):
        decode(png(np.zeros((1, 1001, 3), np.uint8)), "x")


def test_bad_images_of_each_place_have_their_keys(tmp_path, place):
    folder = place("folder")
    (folder / "a" / "1.png").write_bytes(b"?")
    tar(tmp_path / "x.tar", [("7.jpg", b"?")])
    with TsvWriter(tmp_path / "x.tsv") as writer:
        writer.add("k0", image_payload(b"?"))
        writer.add("k1", "no base64")
    pool = opened(folder, tmp_path / "x.tar", tmp_path / "x.tsv")
    (folder / "b" / "0.png").unlink()
    found = {}
    for row in range(len(pool)):
        try:
            pool.image(row)
        except BadImage as error:
            found[row] = str(error)
    assert sorted(found) == [1, 2, 4, 5, 6]
    assert found[1].startswith("a/1.png (it is none of") and found[2] == "b/0.png (the file is gone)"
    assert found[4].startswith("7 (it is none of") and found[5].startswith("k0 (it is none of")
    assert found[6].startswith("k1 (line 2 of") and "is not base64" in found[6]


def test_a_file_that_is_no_tsv_file_is_more_than_a_bad_image(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"alone\nk1\tx\n")
    assert "has 1 field; a record is a key, a TAB" in refused(opened(tmp_path / "x.tsv").image, 0)


# Places that are none


def test_there_are_no_images(tmp_path):
    assert "there are no images; give --images" in refused(opened)
    (tmp_path / "empty").mkdir()
    assert f"there are no images in {tmp_path / 'empty'}" in refused(opened, tmp_path / "empty")
    assert "no images at" in refused(opened, tmp_path / "nowhere")
    assert "no images at" in refused(opened, tmp_path / "nowhere.npy")
    assert "no TSV file of images at" in refused(opened, tmp_path / "nowhere.tsv")
    assert "no archive of images at" in refused(opened, tmp_path / "nowhere.tar")
    (tmp_path / "x.zip").touch()
    assert "no folder and do not end in .tsv, .tar, .npy" in refused(opened, tmp_path / "x.zip")


def test_arrays_that_are_no_images(tmp_path, pictures):
    for wrong in (pictures.astype(np.float32), pictures[0], pictures.transpose(0, 3, 1, 2)):
        np.save(tmp_path / "x.npy", wrong)
        assert "images are (N, H, W, 3) of uint8" in refused(opened, tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", pictures)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    assert "cannot be read" in refused(opened, tmp_path / "x.npy")


def test_archives_that_are_damaged(tmp_path, place, pictures):
    path = place("tar")
    whole = path.read_bytes()
    large = tar(tmp_path / "large.tar", [("0.png", png(pictures[0])), ("1.png", bytes(100_000))])
    large.write_bytes(large.read_bytes()[:50_000])
    assert "unexpected end of data" in refused(opened, large)
    path.write_bytes(b"?" * len(whole))
    assert "must be a whole .tar that is not compressed" in refused(opened, path)
    tar(path, [("0.png", png(pictures[0]))], "w:gz")
    assert "must be a whole .tar that is not compressed" in refused(opened, path)


def test_the_members_of_a_large_archive_are_remembered(tmp_path, monkeypatch, pictures):
    monkeypatch.setattr("data.tar_files._FEW", 2)
    path = tar(tmp_path / "x.tar", [(f"é{row}.png", png(pixels)) for row, pixels in enumerate(pictures)])
    cache = tmp_path / "cache"
    first = opened(path, cache_dir=str(cache))
    (known,) = cache.rglob("*.npz")
    monkeypatch.setattr("tarfile.open", None)  # it is not gone through again
    again = opened(path, cache_dir=str(cache))
    assert [again.key(row) for row in range(4)] == [first.key(row) for row in range(4)] == ["é0", "é1", "é2", "é3"]
    assert np.array_equal(np.asarray(again.image(3)), pictures[3])
    monkeypatch.undo()
    known.write_bytes(b"damaged")
    assert opened(path, cache_dir=str(cache)).fingerprint() == first.fingerprint()
    tar(path, [("0.png", png(pictures[1]))])
    assert len(opened(path, cache_dir=str(cache))) == 1


def test_long_names_and_folders_in_an_archive(tmp_path, pictures):
    name = "folder/" * 40 + "0"
    path = tar(tmp_path / "x.tar", [(f"{name}.seg.png", b""), (f"{name}.png", png(pictures[1])), ("1.json", b"{}")])
    pool = opened(path)
    assert len(pool) == 1 and pool.key(0) == name
    assert np.array_equal(np.asarray(pool.image(0)), pictures[1])
