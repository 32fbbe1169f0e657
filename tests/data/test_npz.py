"""Labelled images in `.npz` files: what is read, and what is said of a file that is not one."""

import re

import numpy as np
import pytest

from data.npz import read_npz
from utils.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
LABELS = np.array([0, 2, 1, 2, 0])


def write(path, **changes):
    arrays = {"train_images": IMAGES, "train_labels": LABELS} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_what_is_read(tmp_path, kind):
    images, labels = read_npz(write(tmp_path / "a.npz", train_labels=LABELS.astype(kind), other=np.zeros(3)))
    assert images.dtype == np.uint8 and np.array_equal(images, IMAGES)
    assert labels.dtype == np.int64 and np.array_equal(labels, LABELS)
    np.savez_compressed(tmp_path / "b.npz", train_images=IMAGES, train_labels=LABELS)
    assert np.array_equal(read_npz(str(tmp_path / "b.npz"))[0], IMAGES)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_images": None}, "has no array .*train_images.*; it needs train_images and train_labels"),
        ({"train_labels": None}, "has no array .*train_labels"),
        ({"train_images": IMAGES.astype(np.float32)}, r"train_images float32 \(5, 4, 6, 3\)"),
        ({"train_images": IMAGES[..., 0]}, r"train_images uint8 \(5, 4, 6\) .*do not fit"),
        ({"train_images": IMAGES[..., :2]}, "do not fit"),
        ({"train_images": IMAGES.transpose(0, 3, 1, 2)}, "do not fit"),
        ({"train_labels": LABELS[:4]}, r"train_labels \(4,\) do not fit"),
        ({"train_labels": LABELS[:, None]}, r"train_labels \(5, 1\) do not fit"),
        ({"train_labels": LABELS - 1}, "negative labels"),
        ({"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, "holds no train images"),
        ({"train_labels": np.array(["a", "b", "c", "d", "e"])}, "must be whole numbers"),
        ({"train_images": np.array([{"a": 1}], dtype=object)}, "cannot be read"),  # pickled, so never read
    ],
)
def test_files_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        read_npz(write(tmp_path / "bad.npz", **changes))
    assert "bad.npz" in str(error.value)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "npy"])
def test_damaged_files(tmp_path, damage):
    path = write(tmp_path / "bad.npz")
    content = {"empty": b"", "cut": path.read_bytes()[:-60], "text": b"no images here", "npy": None}[damage]
    if content is None:
        with open(path, "wb") as file:
            np.save(file, IMAGES)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_npz(path)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"no labelled images at .*none\.npz"):
        read_npz(tmp_path / "none.npz")
