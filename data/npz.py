"""Arrays of `.npz` files, read without running anything, and what is said of a file that is not one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.arrays import unpack_array
from utils.errors import UserError, first_line


def read_arrays(path: Path | str, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays `names` of a `.npz` file, and those of `optional` that it has.

    UserError for a missing or damaged file and for one that lacks an array. Nothing pickled is read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: unpack_array(file, name) for name in (*names, *(name for name in optional if name in file))}
    except FileNotFoundError:
        raise UserError(f"no labelled images at {path}") from None
    except KeyError as error:
        raise UserError(f"{path} has no array {error}; it needs {' and '.join(names)}") from None
    except OSError:
        raise
    except Exception as error:  # zip, LZMA and header errors are of many kinds
        raise UserError(f"{path} cannot be read ({first_line(error)}); it is damaged or not a .npz file") from None


def read_npz(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """`train_images` (N, H, W, 3) uint8 and `train_labels` (N,) int64 of a `.npz` file; labels count from 0.

    UserError for a missing or damaged file and for arrays of other shapes.
    """
    arrays = read_arrays(path, ("train_images", "train_labels"))
    images, labels = arrays["train_images"], arrays["train_labels"]
    if images.ndim != 4 or images.shape[3] != 3:
        raise UserError(f"{path}: train_images {images.dtype} {images.shape} do not fit; they must be (N, H, W, 3)")
    return images, check_labels(path, "train", images, labels)


def check_labels(path: Path | str, split: str, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`labels` as int64, one for each of the uint8 `images` and none negative; UserError otherwise."""
    if images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise UserError(
            f"{path}: {split}_images {images.dtype} {images.shape} with {split}_labels {labels.shape} do not fit; "
            "images must be uint8, with one label each"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{path}: {split}_labels are {labels.dtype}; they must be whole numbers from 0")
    if not len(labels) or labels.min() < 0:
        raise UserError(f"{path}: it holds no {split} images, or negative labels")
    return labels.astype(np.int64)
