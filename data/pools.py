"""Unpaired images and sentences with their features: which files play which of the four parts, and that they fit.

A part is a list of files, row after row: flags name them, or a manifest, or the seed's list of TSV files, whose parts
are told by words in their names; what cannot be told is refused, where the published code drops it without a word.
Features belong to images and sentences by row, so numbers of rows are compared shard by shard, and keys row by row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chain import sampled
from data.feature_files import Features
from data.image_pools import ImagePool, drawn_images, open_image_shard
from data.text_pools import TextPool, drawn_texts, open_text_shard
from utils.config import option
from utils.errors import UserError
from utils.files import check_version, digest
from utils.parsing import is_below, is_name, parse_yaml
from utils.registry import nearest

ROLES = ("images", "image_feats", "texts", "text_feats")
TOY = "toy"
FORMAT = 1  # of a manifest; what has none is of the first
# What else a manifest may tell: which network the features are of, its format, and a digest of all the rest.
BESIDES = ("teacher", "format", "digest")
_FLAGS = "--images, --image_feats, --texts and --text_feats"
_WORDS = {
    "image": {"image", "images", "img", "imgs"},
    "text": {"text", "texts", "caption", "captions"},
    "feature": {"feat", "feats", "feature", "features"},
}


@dataclass(frozen=True)
class PoolsConfig:
    """Unpaired images and sentences, and their features."""

    images: tuple[str, ...] = option(
        (), "folders, .tsv, .tar (webdataset) or .npy (N, H, W, 3) files of images, .list files of such names, or toy"
    )
    texts: tuple[str, ...] = option(
        (), ".tsv, .txt, .json, .jsonl or .tar (webdataset) files of sentences, .list files of such names, or toy"
    )
    image_feats: tuple[str, ...] = option((), ".npy or .tsv files of the images' features in the same order, or .list")
    text_feats: tuple[str, ...] = option((), ".npy or .tsv files of the texts' features in the same order, or .list")
    tsv_file_list: tuple[str, ...] = option(
        (), "TSV files, or .list files of them, of all four kinds, told apart by words of their names"
    )
    pool_manifest: str = option(
        "", "YAML file with the lists images, image_feats, texts and text_feats, shard by shard"
    )
    dataroot: str = option("", "folder that relative names of data files are below", free=True)
    toy_images: int = option(600, "drawn images of the toy pool", low=10)
    toy_texts: int = option(600, "sentences of the toy pool", low=10)
    toy_size: int = option(32, "side of the toy pool's images in pixels", low=8)
    bad_images: float = option(
        0.01, "share of images that cannot be decoded beyond which a run is stopped", low=0, free=True
    )
    cache_dir: str = option("cache", "folder for what can be made again, such as indexes of archives", free=True)
    workers: int = option(0, "threads that decode images; 0 is one a core", aliases=("num_workers",), low=0, free=True)

    def check(self) -> None:
        if self.bad_images > 1:
            raise UserError(f"--bad_images is {self.bad_images}; it is a share of the images, such as 0.01")
        named = [f"--{role}" for role in ROLES if getattr(self, role)][:1]
        ways = named + [f"--{name}" for name in ("tsv_file_list", "pool_manifest") if getattr(self, name)]
        if len(ways) > 1:
            raise UserError(f"{' and '.join(ways)} each say which files are which; give one of them")
        for name in self.tsv_file_list:
            if not name.endswith(".list"):
                _role_of(name, "--tsv_file_list")

    def idle(self) -> dict[str, str]:
        # Where no flag names the files a manifest does, and what is in that is not known here.
        drawn = {"images": ("toy_images", "toy_size"), "texts": ("toy_texts",)}
        named = {role: getattr(self, role) or self.tsv_file_list for role in drawn}
        return {
            name: f"--{role} toy"
            for role, names in drawn.items()
            if named[role] and TOY not in named[role]
            for name in names
        }

    @property
    def threads(self) -> int:
        """`workers`, counted."""
        return self.workers or os.cpu_count() or 1


@dataclass(frozen=True)
class Roles:
    """Files of each part, in order."""

    images: tuple[str, ...] = ()
    image_feats: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    text_feats: tuple[str, ...] = ()

    def need(self, *names: str, remedy: str = "") -> None:
        """UserError where one of these parts has no file."""
        for name in names:
            if not getattr(self, name):
                raise UserError(
                    f"there are no {_SPOKEN[name]}; give --{name}, or add them to --tsv_file_list or --pool_manifest"
                    f"{remedy}"
                )


_SPOKEN = {
    "images": "images",
    "image_feats": "features of the images",
    "texts": "sentences",
    "text_feats": "features of the sentences",
}


def roles(cfg: PoolsConfig) -> Roles:
    """The files of each part, .list files opened, below `cfg.dataroot`.

    UserError for lists and manifests that are missing or malformed, and for names whose part cannot be told.
    """
    if cfg.tsv_file_list:
        found: dict[str, list[str]] = {role: [] for role in ROLES}
        for name, where in _listed(cfg.tsv_file_list, "--tsv_file_list"):
            found[_role_of(name, where)].append(_below(cfg.dataroot, name))
    elif cfg.pool_manifest:
        found = read_manifest(cfg.pool_manifest, cfg.dataroot)
    else:
        found = {
            role: [_below(cfg.dataroot, name) for name, _ in _listed(getattr(cfg, role), f"--{role}")] for role in ROLES
        }
    return Roles(**{role: tuple(names) for role, names in found.items()})


def read_manifest(path: Path | str, dataroot: str = "") -> dict[str, list[str]]:
    """The files of each part that a manifest lists. Relative names are beside it, or below `dataroot` where that is
    given and nothing of the name is beside the manifest."""
    path = Path(path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no manifest of pools at {path}; run buffer.py, or correct --pool_manifest") from None
    except IsADirectoryError:
        raise UserError(f"manifest of pools {path} is a folder; name the .yaml file in it") from None
    except ValueError as error:
        raise UserError(f"manifest {path} is not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise UserError(f"manifest {path} holds no keys and values; it lists {', '.join(ROLES)}")

    version = tree.get("format", 1)
    if not isinstance(version, int):
        raise UserError(f"manifest {path}: its format is {version!r}, which is no number; remove that line")
    check_version(path, version, FORMAT)
    if "digest" in tree and tree["digest"] != manifest_digest(tree):
        raise UserError(
            f"manifest {path} is not as buffer.py wrote it; restore it, or drop the line of its digest to use it so"
        )

    def place(name: str) -> str:
        return _below(dataroot if dataroot and not (path.parent / name).exists() else str(path.parent), name)

    found: dict[str, list[str]] = {role: [] for role in ROLES}
    for key, names in tree.items():
        if key in BESIDES:
            continue
        if key not in ROLES:
            raise UserError(
                f"manifest {path}: unknown key '{key}'{nearest(str(key), ROLES)}; it lists {', '.join(ROLES)}"
            )
        names = [names] if isinstance(names, str) else names or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"manifest {path}: {key} is {names!r}; it must be a list of files")
        for name in names:
            _check_name(name, f"{path}: {key}")
        names = [place(name) if name.endswith(".list") else name for name in names]
        found[key] = [place(name) for name, _ in _listed(names, f"{path}: {key}")]
    return found


def manifest_digest(tree: dict[str, Any]) -> str:
    """A digest of all that a manifest tells but its own; "" where there can be none."""
    try:
        return digest({key: value for key, value in tree.items() if key != "digest"})
    except (TypeError, ValueError):  # YAML has more than buffer.py writes
        return ""


def open_images(paths: Sequence[str], cfg: PoolsConfig) -> ImagePool:
    """The images of these files and folders, end to end."""
    Roles(images=tuple(paths)).need("images")

    def shard(path: str) -> Any:
        drawn = _drawn(path, cfg.toy_images, cfg.toy_size)
        return drawn_images(*drawn) if drawn else open_image_shard(Path(path), cfg.cache_dir)

    return ImagePool([shard(str(path)) for path in paths], "images")


def open_texts(paths: Sequence[str], cfg: PoolsConfig) -> TextPool:
    """The sentences of these files, end to end."""
    Roles(texts=tuple(paths)).need("texts")

    def shard(path: str) -> Any:
        drawn = _drawn(path, cfg.toy_texts)
        return drawn_texts(*drawn) if drawn else open_text_shard(Path(path), cfg.cache_dir)

    return TextPool([shard(str(path)) for path in paths], "texts")


def open_features(paths: Sequence[str], cfg: PoolsConfig, what: str = "features") -> Features:
    """The features in these files, end to end; `what` names them in messages, such as 'features of the images'."""
    if not paths:
        raise UserError(f"there are no {what}; give their files, or run buffer.py to extract them")
    return Features(paths, what)


def check_aligned(pool: ImagePool | TextPool | None, features: Features, what: str = "") -> None:
    """UserError unless row i of the features is of row i of the pool, as far as numbers, keys and notes tell.

    pool  None where only the features are at hand: there is nothing to compare
    what  names the pool in messages; its own name for its rows where it is left out

    Several files of features are of one file of the pool each; one may be of all of them. Keys are compared in up to
    100,000 rows, beyond that in the first, the last and 1,000 others; what the notes tell, file by file.
    """
    if pool is None:
        return
    what = what or pool.what
    again = "; features are matched by row: extract them again, or correct the files' order"
    if len(features.shards) > 1:
        if len(features.shards) != len(pool.shards):
            raise UserError(f"{what} are in {len(pool.shards)} files, their features in {len(features.shards)}{again}")
        for shard, other in zip(pool.shards, features.shards, strict=True):
            if len(shard) != len(other):
                raise UserError(f"{shard.path} has {len(shard)} {what}, its features {other.path} {len(other)}{again}")
    if len(pool) != len(features):
        raise UserError(f"{pool.name} has {len(pool)} {what}, the features {features.name} {len(features)}{again}")
    for row in sampled(len(pool)):
        key = features.key(row)
        if key is not None and key != pool.key(row):
            raise UserError(
                f"row {row} is '{pool.key(row)}' in {what} {pool.name}, and '{key}' in features {features.name}{again}"
            )
    parts = [pool] if len(features.shards) == 1 else [type(pool)([shard], pool.what) for shard in pool.shards]
    for part, shard in zip(parts, features.shards, strict=True):
        for name, now in (("keys", part.keys_digest), ("pool", part.fingerprint)):
            if shard.note.get(name, "") and shard.note[name] != now():
                raise UserError(f"features {shard.path} were extracted of other {what} than {part.name}{again}")


def check_one_teacher(images: Features, texts: Features) -> None:
    """UserError unless both are of one width and, as far as their notes tell, of one network."""
    both = f"features {images.name} of images and {texts.name} of texts"
    if images.dim != texts.dim:
        raise UserError(f"{both} have {images.dim} and {texts.dim} numbers; extract both by one teacher")
    shards = images.shards + texts.shards
    models = list(dict.fromkeys(shard.note["model"] for shard in shards if shard.note.get("model")))
    if len(models) > 1:
        raise UserError(f"{both} are of {models[0]} and of {models[1]}; extract all by one teacher")
    twice = {shard.path.resolve() for shard in images.shards} & {shard.path.resolve() for shard in texts.shards}
    if twice:
        raise UserError(f"{min(twice)} is given as features of images and of texts; it can be one of the two")


def refuse_bad(bad: int, total: int, share: float, example: str) -> None:
    """UserError where more than this share of `total` images cannot be decoded; `example` is one and why."""
    if bad > share * total:
        raise UserError(
            f"{bad} of {total} images cannot be decoded, such as {example}; mend or remove them, or allow more than "
            f"{share:g} by --bad_images"
        )


def _listed(names: Sequence[str], where: str) -> list[tuple[str, str]]:
    """Names with .list files opened, and where each was found."""
    found: list[tuple[str, str]] = []
    for name in names:
        if not name.endswith(".list"):
            found.append((name, where))
            continue
        try:
            lines = Path(name).read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise UserError(f"no list of files at {name} ({where}); correct the path") from None
        except UnicodeDecodeError:
            raise UserError(f"{name} is no text; a .list has the name of a file a line") from None
        inside = [(line.strip(), name) for line in lines if line.strip()]
        for line, _ in inside:
            _check_name(line, name)
        if not inside:
            raise UserError(f"{name} names no file; a .list has the name of a file a line")
        found += inside
    return found


def _check_name(name: str, where: str) -> None:
    """UserError for a name in a list or manifest that no file has, or a relative one that leads out of the folder it
    counts from.

    Absolute names, which may have `..`, are what buffer.py writes and what lists of the field's sets have: all that is
    done with any of them is to read it as a pool.
    """
    if not is_name(name):
        raise UserError(f"{where} has the name {name!r}, which no file can have; correct it")
    if not Path(name).is_absolute() and not is_below(name):
        raise UserError(f"{where} has the name '{name}', which leads out of its folder; give the whole path")


def _role_of(name: str, where: str) -> str:
    """The part that a TSV file plays, by the words of its own name; UserError where they do not tell."""
    base = name.replace("\\", "/").rpartition("/")[2]
    words = set(re.findall("[a-z]+", base.lower()))
    kinds = {kind for kind, known in _WORDS.items() if words & known}
    if not base.endswith(".tsv") or len(kinds & {"image", "text"}) != 1:
        raise UserError(
            f"{where}: what '{name}' holds cannot be told from its name, which must end in .tsv and have one of the "
            f"words image, img, text and caption; name the files by {_FLAGS}"
        )
    kind = "image" if "image" in kinds else "text"
    return f"{kind}_feats" if "feature" in kinds else f"{kind}s"


def lasting(role: str, name: str, cfg: PoolsConfig) -> str:
    """A name that says the same in another folder and to another command: absolute, or `toy` with its numbers."""
    numbers = {"images": (cfg.toy_images, cfg.toy_size), "texts": (cfg.toy_texts,)}.get(role, ())
    if drawn := numbers and _drawn(name, *numbers):
        return ":".join([TOY, *map(str, drawn)])
    return str(Path(name).expanduser().absolute())


def _drawn(name: str, *numbers: int) -> tuple[int, ...]:
    """The numbers of a toy pool, which a manifest notes as in toy:600:32 and which are `numbers` otherwise; () for
    files."""
    if name == TOY:
        return numbers
    found = tuple(int(word) for word in name.split(":")[1:] if word.isdigit()) if name.startswith(f"{TOY}:") else ()
    return found if len(found) == len(numbers) else ()


def _below(root: str, name: str) -> str:
    return name if name == TOY or name.startswith(f"{TOY}:") or not root else str(Path(root) / name)
