"""Images without labels, from wherever they are: a folder, a TSV file, a webdataset archive, an array, or drawn.

Each is a list of rows with a key a row, and decodes one image at a time. What cannot be decoded is a `BadImage`, which
a caller may skip and count: among millions there are some.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.chain import Chain
from data.payloads import read_image_payload
from data.photographs import SUFFIXES, image_names
from data.tar_files import TarFile
from data.toy import captioned_shapes
from data.tsv import TsvFile
from utils.arrays import map_array
from utils.errors import UserError, first_line
from utils.files import check_kept
from utils.pictures import FORMATS, check_sides, open_image

if TYPE_CHECKING:
    from PIL.Image import Image


class BadImage(Exception):
    """An image that cannot be decoded: its key and why."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key} ({reason})")
        self.key, self.reason = key, reason


class ImagePool(Chain):
    """Images of one or several places, end to end."""

    def image(self, row: int) -> Image:
        """One image, RGB, in its own size; BadImage when it cannot be decoded."""
        shard, inner = self.find(row)
        return shard.image(inner)


def decode(content: bytes, key: str) -> Image:
    """An encoded image as RGB; BadImage, naming `key`, for what is none, is cut off, has too many pixels (PIL's limit,
    89 million), or is a thousand times as long as wide."""
    from PIL import UnidentifiedImageError

    try:
        image = open_image(content)
        check_sides(image)
        return image.convert("RGB")
    except UnidentifiedImageError:
        raise BadImage(key, f"it is none of {', '.join(FORMATS)}" if content else "it is empty") from None
    except Exception as error:  # PIL raises a dozen kinds for damaged files
        raise BadImage(key, str(error) or type(error).__name__) from None


class FolderImages:
    """All images below a folder, sorted by path; the key is the path below it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = sorted(Path(place, name).relative_to(path).as_posix() for place, name in image_names(path))

    def __len__(self) -> int:
        return len(self.names)

    def key(self, row: int) -> str:
        return self.names[row]

    def raw(self, row: int) -> bytes:
        return (self.path / self.names[row]).read_bytes()

    def image(self, row: int) -> Image:
        try:
            return decode(self.raw(row), self.names[row])
        except FileNotFoundError:
            raise BadImage(self.names[row], "the file is gone") from None


class TsvImages:
    """Images of a TSV file: base64 of JPEG or PNG files."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, TsvFile(path, "TSV file of images")
        self.key, self.raw = self.file.key, self.file.payload

    def __len__(self) -> int:
        return len(self.file)

    def image(self, row: int) -> Image:
        key, payload = self.file.pair(row)
        try:
            content = read_image_payload(payload, self.file.where(row))
        except UserError as error:
            raise BadImage(key, str(error)) from None
        return decode(content, key)


class TarImages:
    """Images of a webdataset archive."""

    def __init__(self, path: Path, cache: Path | str = "") -> None:
        self.path, self.file = path, TarFile(path, {suffix[1:] for suffix in SUFFIXES}, "images", cache)
        self.key, self.raw = self.file.key, self.file.raw

    def __len__(self) -> int:
        return len(self.file)

    def image(self, row: int) -> Image:
        return decode(self.file.raw(row), self.file.key(row))


class ArrayImages:
    """Images of an array (N, H, W, 3) uint8; the key is the row's number."""

    def __init__(self, path: Path, images: np.ndarray) -> None:
        self.path, self.images = path, images

    def __len__(self) -> int:
        return len(self.images)

    def key(self, row: int) -> str:
        return str(row)

    def raw(self, row: int) -> np.ndarray:
        return np.asarray(self.images[row])

    def image(self, row: int) -> Image:
        from PIL import Image

        return Image.fromarray(self.raw(row))


class MappedImages(ArrayImages):
    """Images of a .npy file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _mapped(path))

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.path,)  # else all pixels would travel to another process


def drawn_images(count: int, size: int) -> ArrayImages:
    """`count` drawn shapes of size² pixels."""
    images, _, _ = captioned_shapes("train", count, size)
    return ArrayImages(Path("toy"), images.permute(0, 2, 3, 1).contiguous().numpy())


KINDS: dict[str, Callable[[Path], Any]] = {".tsv": TsvImages, ".tar": TarImages, ".npy": MappedImages}


def open_image_shard(path: Path, cache: Path | str = "") -> Any:
    """The images at a path, by its ending; UserError where it is none of a folder and of KINDS.

    cache  folder where the places of an archive's members are remembered
    """
    check_kept(path, "images")
    if path.is_dir():
        return FolderImages(path)
    if path.suffix == ".tar":
        return TarImages(path, cache)
    if path.suffix in KINDS:
        return KINDS[path.suffix](path)
    if not path.exists():
        raise UserError(f"no images at {path}; correct the path, or the --dataroot that was put before it")
    raise UserError(f"images {path} are no folder and do not end in {', '.join(KINDS)}; name one of these, or toy")


def _mapped(path: Path) -> np.ndarray:
    try:
        images = map_array(path)
    except FileNotFoundError:
        raise UserError(f"no images at {path}; correct the path") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"images {path} cannot be read ({first_line(error)}); save them again") from None
    if not isinstance(images, np.ndarray):  # numpy opens an archive of arrays, whatever its name ends in
        raise UserError(f"images {path} cannot be read (it is an archive of arrays); save them again, as one array")
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise UserError(f"{path} is an array {images.shape} of {images.dtype}; images are (N, H, W, 3) of uint8")
    return images
