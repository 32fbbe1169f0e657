"""Labelled images: for now the `.npz` files that an image trunk may be trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from utils.errors import UserError


def read_npz(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """`train_images` (N, H, W, 3) uint8 and `train_labels` (N,) int64 of a `.npz` file; labels count from 0.

    UserError for a missing or damaged file and for arrays of other shapes. Nothing pickled is read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["train_images"], file["train_labels"].astype(np.int64)
    except FileNotFoundError:
        raise UserError(f"no labelled images at {path}") from None
    except KeyError as error:
        raise UserError(f"{path} has no array {error}; it needs train_images and train_labels") from None
    except OSError:
        raise
    except Exception as error:  # zip, LZMA and header errors are of many kinds
        raise UserError(f"{path} cannot be read ({error}); it is damaged or not a .npz file") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or labels.shape != (len(images),):
        raise UserError(
            f"{path}: train_images {images.dtype} {images.shape} with train_labels {labels.shape} do not fit"
        )
    if not len(labels) or labels.min() < 0:
        raise UserError(f"{path}: it holds no images, or negative labels")
    return images, labels
