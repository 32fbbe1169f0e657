"""Images that are meant to harm, or harm unmeant, wherever images are decoded: told, or counted, and nothing else."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.benchmark_files import FilePictures
from data.cache import decode as cached
from data.image_pools import BadImage
from data.image_pools import decode as pooled
from utils.errors import UserError
from utils.pictures import TooManyPixels, open_image


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many grey pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def frames() -> list[Image.Image]:
    return [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue", "green")]


BAD = {
    "bomb": bomb(50_000, 50_000),
    "just too large": bomb(1, Image.MAX_IMAGE_PIXELS + 1),
    "truncated jpeg": saved(photo(), "JPEG")[:300],
    "truncated png": saved(photo(), "PNG")[:300],
    "text": b"no image at all",
    "empty": b"",
    "script": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # which PIL would hand to Ghostscript
    "tiff of lies": b"II*\0\x08\0\0\0\xff\xff" + bytes(range(256)) * 4,
    "compressed text": saved(photo(), "PNG")[:33]
    + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27)))
    + saved(photo(), "PNG")[33:],
}
ODD = {
    "animated gif": saved(frames()[0], "GIF", save_all=True, append_images=frames()[1:]),
    "animated webp": saved(frames()[0], "WEBP", save_all=True, append_images=frames()[1:], lossless=True),
    "16 bit": saved(Image.fromarray(np.full((7, 9), 40_000, np.uint16)), "PNG"),
    "palette": saved(Image.new("P", (9, 7)), "PNG", transparency=bytes(range(255))),
    "cmyk": saved(Image.new("CMYK", (9, 7)), "JPEG"),
    "one bit": saved(Image.new("1", (9, 7)), "PNG"),
    "alpha": saved(Image.new("LA", (9, 7)), "PNG"),
    "exif": saved(Image.new("RGB", (9, 7)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + b"\xff" * 3000),
}


@pytest.fixture(autouse=True)
def no_bomb_warning():
    """The warning would be a second line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [one for one in caught if issubclass(one.category, Image.DecompressionBombWarning)]


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_told_everywhere(tmp_path, name):
    path = tmp_path / "x.png"
    path.write_bytes(BAD[name])
    for told, error in (
        (lambda: cached(path, "squashed", 8, Path("list.json")), UserError),
        (lambda: FilePictures([path]).image(0), UserError),
        (lambda: pooled(BAD[name], "key"), BadImage),
    ):
        with pytest.raises(error) as caught:
            told()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
        if "bomb" in name or "large" in name:
            assert "too many pixels" in str(caught.value)


@pytest.mark.parametrize("name", ODD)
def test_strange_images_are_three_channels_of_eight_bits(tmp_path, name):
    path = tmp_path / "x.png"
    path.write_bytes(ODD[name])
    for layout in ("squashed", "cropped", "centred", "ragged"):
        image = cached(path, layout, 4, Path("list.json"))
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    for image in (FilePictures([path]).image(0), pooled(ODD[name], "key")):
        assert image.mode == "RGB" and image.size == (9, 7)
    if name.startswith("animated"):
        assert FilePictures([path]).image(0).getpixel((0, 0))[0] > 200  # the first frame


def test_the_limit_is_the_pixels():
    assert open_image(bomb(1000, 89_478)).size == (1000, 89_478)
    with pytest.raises(TooManyPixels):
        open_image(bomb(1000, 89_479))
    assert open_image(bomb(1000, 89_479), times=2).size == (1000, 89_479)


@pytest.mark.parametrize("sides", [(1, 1001), (200_000, 1)])
def test_strips_are_not_enlarged(tmp_path, sides):
    """With the short side brought to a network's, a file of a few hundred bytes would take gigabytes."""
    Image.new("RGB", sides).save(tmp_path / "strip.png")
    told = f"{sides[0]} pixels wide and {sides[1]} high"
    for work in (
        lambda: cached(tmp_path / "strip.png", "centred", 64, tmp_path),
        lambda: FilePictures([tmp_path / "strip.png"]).image(0),
    ):
        with pytest.raises(UserError, match=rf"strip\.png cannot be decoded .*{told}"):
            work()
    with pytest.raises(BadImage, match=told):
        pooled((tmp_path / "strip.png").read_bytes(), "key")
