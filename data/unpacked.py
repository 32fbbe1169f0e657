"""Images that are no files, as files: arrays and drawings are written once into the cache, a PNG each.

What comes out is `train/<class>/00000.png` and `val/<class>/...`. A folder gets its name when its last image is
written, so half of one is never used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.images import ImagesConfig
from data.metadata import METADATA, write_metadata
from data.sources import FETCHED, digits_source, fetched_source, npz_source
from data.toy import SHAPES, captioned_shapes
from utils.errors import UserError
from utils.files import atomic_folder, digest
from utils.progress import progress

ARRAYS = {**dict.fromkeys(FETCHED, fetched_source), "npz": npz_source, "digits": digits_source}
PARTS = {"train": "train", "test": "val"}  # split → its folder
_VERSION = 2  # of the files; a change makes old folders unseen


def unpacked(cfg: ImagesConfig, cache_dir: str | Path) -> tuple[Path, dict[str, str]]:
    """The folder of the set `cfg.dataset`, one of ARRAYS; and its classes in order: folder → label."""
    source = ARRAYS[cfg.dataset](cfg)
    labels = {split: source.labels(split) for split in PARTS}
    images = {}
    for split, found in labels.items():
        pixels = source.pixels(split, torch.arange(len(found)))
        images[split] = pixels.original  # as they came: nothing has a size of its own here
    names = _folder_names(source.classes, source.name)
    content = digest(_VERSION, names, *images.values(), *labels.values())
    folder = Path(cache_dir) / "unpacked" / f"{cfg.dataset}_{content[:16]}"
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            for split, part in PARTS.items():
                _write(temporary / part, images[split], labels[split], names, f"unpacking {cfg.dataset} {split}")
    return folder, {name: label.replace("_", " ") for name, label in zip(names, source.classes, strict=True)}


def drawn(cache_dir: str | Path, images: int, size: int) -> tuple[Path, dict[str, str]]:
    """The folder of the toy set, one drawn shape an image, with true captions of the training images in
    train/metadata.jsonl; and its classes in order: folder → label.

    images  in train; val has 300, whatever the number of the others
    size    side in pixels
    """
    folder = Path(cache_dir) / "unpacked" / f"toy_v{_VERSION}_{images}_{size}"
    names = list(SHAPES)
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            for split, part in PARTS.items():
                pictures, labels, captions = captioned_shapes(split, images, size)
                files = _write(temporary / part, pictures, labels, names, f"drawing {split}")
                if split == "train":
                    write_metadata(temporary / part / METADATA, dict(zip(files, captions, strict=True)))
    return folder, {name: name for name in names}


def _write(root: Path, images: Tensor, labels: Tensor, names: Sequence[str], what: str) -> list[str]:
    """Save images (N, C, H, W) uint8 as `<class>/<number>.png` below `root`; these paths, in order."""
    from PIL import Image

    files = [f"{names[label]}/{number:05d}.png" for number, label in enumerate(labels.tolist())]
    for label in labels.unique().tolist():
        (root / names[label]).mkdir(parents=True)
    with progress(total=len(files), what=what) as bar:
        for image, file in zip(images, files, strict=True):
            pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
            Image.fromarray(pixels.contiguous().numpy()).save(root / file)
            bar.update()
    return files


def _folder_names(classes: Sequence[str], dataset: str) -> list[str]:
    """Names of folders for classes, which may be called anything, such as T-shirt/top."""
    names: dict[str, str] = {}
    for number, label in enumerate(classes):
        name = re.sub(r"[^\w.+-]+", "_", label).strip("._") or f"class_{number}"
        if name in names:
            raise UserError(f"{dataset}: classes '{names[name]}' and '{label}' would share a folder; rename one")
        names[name] = label
    return list(names)
