"""What the teacher says of every image and every sentence: extracted once, read from the disk ever after.

Images are seen whole, as in evaluation: the short side resized to the network's size (bicubic), the middle cut out.
Kept is the embedding in the joint space, behind the projection and before it is normalised, as float32 whatever the
network computes with: the student's losses normalise it themselves. (DIME-FM names its files `vit_l_14_post_proj`; how
it made them was never published.)

A run that was killed goes on behind its last whole row and ends in the same bytes: what goes through the network
together is told by the rows alone. Images that cannot be decoded have a row of zeros and are listed beside the file,
for training to leave out; too many of them stop the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.feature_files import FORMATS, FeatureWriter
from data.pools import ImagePool, TextPool, refuse_bad
from data.views import Reader, normalised, plain_view
from networks.clip import Clip
from utils.config import option
from utils.progress import progress

if TYPE_CHECKING:
    from PIL.Image import Image

LAYER = "projection"  # the joint space
PRECISIONS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class FeatureConfig:
    """How the teacher's features are extracted and kept."""

    feature_format: str = option("npy", "files: npy (an array), or tsv, as DIME-FM packs them", choices=FORMATS)
    feature_batch: int = option(64, "images, or sentences, that go through the teacher at once", low=1)
    feature_dtype: str = option(
        "auto", "numbers that the teacher computes with; auto: float16 on cuda", choices=("auto", *PRECISIONS)
    )

    def precision(self, device: torch.device) -> torch.dtype:
        """The numbers that the teacher computes with on this device."""
        name = self.feature_dtype
        if name == "auto":
            name = "float16" if device.type == "cuda" else "float32"
        return getattr(torch, name)


def extract_images(
    clip: Clip, pool: ImagePool, folder: Path, name: str, cfg: FeatureConfig, workers: int = 0, bad_share: float = 1.0
) -> Path:
    """The file `folder`/`name`.* of the images' features, row by row; what is there of it is not made again.

    workers    threads that decode; 0 is one a core
    bad_share  of the images may be undecodable; UserError beyond it
    """

    def view(image: Image, row: int) -> Tensor:
        return plain_view(image, clip.image_size)

    device = next(clip.net.parameters()).device
    writer = _writer(clip, pool, folder, name, cfg)
    with closing(writer), closing(Reader(pool, workers)) as reader:
        if writer.bad:
            refuse_bad(len(writer.bad), len(pool), bad_share, pool.where(min(writer.bad)))
        views = reader.stream((range(*batch), view) for batch in _batches(writer, cfg.feature_batch))
        for (start, _), (pixels, there) in zip(_shown(writer, cfg.feature_batch, "image"), views, strict=True):
            vectors = torch.zeros(len(there), clip.dim)
            if there.any():
                vectors[there] = clip.images(normalised(pixels.to(device), clip.mean, clip.std)).cpu()
            bad = (~there).nonzero()[:, 0].tolist()
            if bad:  # first, so that nothing is begun of a pool that is to be mended
                known = writer.bad.union(start + place for place in bad)
                refuse_bad(len(known), len(pool), bad_share, reader.bad[min(reader.bad)])
            _add(writer, start, vectors, bad)
        if writer.bad:
            print(f"note: {len(writer.bad):,} of {len(pool):,} images cannot be decoded; they are left out")
        return writer.finish()


def extract_texts(clip: Clip, pool: TextPool, folder: Path, name: str, cfg: FeatureConfig) -> Path:
    """The file `folder`/`name`.* of the sentences' features, row by row; what is there of it is not made again."""
    with closing(_writer(clip, pool, folder, name, cfg)) as writer:
        for start, stop in _shown(writer, cfg.feature_batch, "sentence"):
            _add(writer, start, clip.texts([pool.text(row) for row in range(start, stop)]).cpu())
        return writer.finish()


def note_on(pool: ImagePool | TextPool) -> dict[str, str]:
    """What a file of features notes of the pool that it is of."""
    return {"pool": pool.fingerprint(), "keys": pool.keys_digest()}


def _writer(clip: Clip, pool: ImagePool | TextPool, folder: Path, name: str, cfg: FeatureConfig) -> FeatureWriter:
    weights, place = clip.fingerprint, Path(clip.name).expanduser()
    note = {
        # Where a folder is does not matter, but two of one name are two models.
        "model": f"{place.name} {weights[:12]}" if place.is_dir() else clip.name,
        "weights": weights,
        "layer": LAYER,
        "normalised": False,
        "precision": str(next(clip.net.parameters()).dtype).removeprefix("torch."),
    }
    return FeatureWriter(folder, name, len(pool), clip.dim, note | note_on(pool), cfg.feature_format, pool.key)


def _batches(writer: FeatureWriter, size: int) -> Iterator[tuple[int, int]]:
    """First row and end of each batch that is left, from the one on that has the next row: cut as if nothing had been
    there, for what is beside a row may change its last bits."""
    for start in range(writer.done // size * size, writer.count if writer.done < writer.count else 0, size):
        yield start, min(start + size, writer.count)


def _shown(writer: FeatureWriter, size: int, unit: str) -> Iterator[tuple[int, int]]:
    """The batches that are left, with a bar that counts their rows."""
    what = f"features of {unit}s"
    with progress(total=writer.count, initial=writer.done, what=what, unit=unit) as bar:
        for start, stop in _batches(writer, size):
            yield start, stop
            bar.update(stop - bar.n)


def _add(writer: FeatureWriter, start: int, vectors: Tensor, bad: Sequence[int] = ()) -> None:
    """Append a batch that begins at row `start`, but for its rows that are there already."""
    there = writer.done - start
    writer.add(vectors[there:], [place - there for place in bad if place >= there])
