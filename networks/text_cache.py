"""Caption embeddings on disk: computed once and checked whenever they are opened, or read as they were published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from networks.text import TextEncoder
from networks.towers import TowerConfig
from utils.arrays import map_array, unpack_array
from utils.errors import UserError, first_line
from utils.files import atomic, digest, file_digest, write_text


def cached_embeddings(
    encoder: TextEncoder, captions: Sequence[str], cache_dir: Path | str, published: Path | None = None
) -> np.ndarray:
    """Embeddings (C, D) float32 of `captions`, memory-mapped from `cache_dir/texts`, computed where they are not there.

    The file's name is a digest of the encoder and the captions, so nothing stale is ever read; a damaged file, as the
    digest in `cache_dir/text_digests` tells, is computed again. `published` is read instead where it is given, and
    then no encoder is loaded.
    """
    if published is not None:
        return read_published_embeddings(published, len(captions))
    path = Path(cache_dir) / "texts" / f"{digest(encoder.fingerprint, list(captions))}.npy"
    try:
        return _open(path, len(captions))
    except (OSError, ValueError, EOFError):
        with atomic(path) as temporary:
            with open(temporary, "wb") as file:
                np.save(file, encoder.encode(captions), allow_pickle=False)
            write_text(_digest_file(path), file_digest(temporary) + "\n")  # first: no file is ever without
        return _open(path, len(captions))


def published_cache(cfg: TowerConfig, dataset: str, split: str) -> Path | None:
    """The published embeddings of a split in `--text_cache`, or None where none are asked for or published (val).

    UserError where the folder lacks the file.
    """
    if not cfg.text_cache or split not in ("train", "test"):
        return None
    middle = "train_" if split == "train" else ""
    path = Path(cfg.text_cache) / f"{dataset}_{cfg.text_encoder}_{middle}text_embed.npz"
    if not path.is_file():
        raise UserError(f"no {split} embeddings at {path}; drop --text_cache to compute them")
    return path


def read_published_embeddings(path: Path | str, count: int, width: int | None = None) -> np.ndarray:
    """The embeddings (count, width) float32 of a published `.npz`; any width where it is not given.

    UserError where the file is missing, damaged or of other captions.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            embeddings = unpack_array(file, "bert_test_embed")  # the key in both files, train too
    except FileNotFoundError:
        raise UserError(f"no text embeddings at {path}") from None
    except Exception as error:  # a damaged archive raises half a dozen kinds
        raise UserError(f"text embeddings {path} cannot be read ({first_line(error)}); it is damaged") from None
    shape = embeddings.shape
    if len(shape) != 2 or shape[0] != count or (width is not None and shape[1] != width):
        wanted = f"({count}, {'any width' if width is None else width})"
        raise UserError(f"text embeddings {path} have shape {shape}, not {wanted}; they are of other captions")
    if not np.issubdtype(embeddings.dtype, np.floating) or not np.isfinite(embeddings).all():
        raise UserError(f"text embeddings {path} hold values that are not finite numbers")
    return embeddings.astype(np.float32, copy=False)


def _digest_file(path: Path) -> Path:
    return path.parent.with_name("text_digests") / f"{path.stem}.txt"


def _open(path: Path, count: int) -> np.ndarray:
    array, told = map_array(path), _digest_file(path)
    if told.is_file() and told.read_text(encoding="utf-8", errors="replace").strip() != file_digest(path):
        raise ValueError(f"{path} is not what its digest says")
    if not isinstance(array, np.ndarray) or array.ndim != 2 or len(array) != count or array.dtype != np.float32:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}")
    return array
