"""Files of prototypes: our own, a class each, and the two JSON files that VLCP's released code passes on; and the
manifest, by which a stage finds what the one before it made.

Ours are `<folder>/<class>.safetensors` (latents) and `<folder>/<class>.json` (all else). Published ones are
`<name>-ipc<I>-<threshold>-<tpk>-kmexpand<E>.json`, {class: [I][4][h][w] numbers}, and, in the folder `<name>_text`,
`text_<I>_<threshold>_<tpk>.json`, {class: [I] captions}. The former has 338 kB a prototype, 17 GB for 50 of each of a
thousand classes, so both are written and read one prototype after the other.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.catalogue import Catalogue
from utils.config import option
from utils.errors import UserError, first_line
from utils.files import atomic, load_vectors, read_json, save_vectors, write_signed
from utils.parsing import is_below, is_plain
from utils.registry import nearest
from utils.streams import json_lists

FORMAT = 1


@dataclass(frozen=True)
class ExchangeConfig:
    """Files of prototypes as VLCP's released code writes and reads them."""

    save_prototype_path: str = option(
        "", "folder to which the prototypes are written as published JSON, too", free=True
    )
    km_expand: int = option(1, "a part of published names that means nothing else", low=0, free=True)
    prototype_path: str = option("", "published JSON of image prototypes to make images of (empty: our own prototypes)")
    text_prototype: str = option("", "published JSON of their captions (empty: beside --prototype_path, by its name)")

    def idle(self) -> dict[str, str]:
        return {} if self.prototype_path else {"text_prototype": "--prototype_path"}


@dataclass
class Prototypes:
    """The k pairs (image prototype, text prototype) of one class.

    ident, label  the class's folder, and its name in words
    latents       (k, 4, h, w) float32, scaled as the diffusion model takes them
    texts         [k] captions; `text_files` [k] whose (empty: the label), `words` [k] the counts behind the choice
    files         [n] the class's training images, "<class>/<file>"; `clusters` [n] of each, −1 for outliers
    nearest       [k] the image nearest to each centroid
    inputs        digest of what they were made of

    Prototypes that others published have latents and texts only.
    """

    ident: str
    label: str
    latents: Tensor
    texts: list[str]
    text_files: list[str] = field(default_factory=list)
    words: list[list[tuple[str, int]]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    clusters: list[int] = field(default_factory=list)
    nearest: list[str] = field(default_factory=list)
    inputs: str = ""

    @property
    def inliers(self) -> Tensor:
        """(n,) bool: which images belong to a cluster."""
        return torch.tensor(self.clusters, dtype=torch.long) >= 0

    @property
    def members(self) -> list[list[str]]:
        """[k] the images of each cluster."""
        pairs = list(zip(self.files, self.clusters, strict=True))
        return [[file for file, cluster in pairs if cluster == number] for number in range(len(self.texts))]

    @property
    def sizes(self) -> list[int]:
        """[k] how many images each cluster has."""
        return [len(files) for files in self.members]


def save_prototypes(folder: Path, found: Prototypes) -> None:
    """Write one class's prototypes. Each of the two files notes what both were made of: halves do not mix."""
    save_vectors(
        folder / f"{found.ident}.safetensors", {"latents": found.latents.contiguous(), "inputs": stamp(found.inputs)}
    )
    rest = {name: value for name, value in vars(found).items() if name != "latents"}
    write_signed(folder / f"{found.ident}.json", {"format": FORMAT, **rest})


def load_prototypes(folder: Path, ident: str) -> Prototypes:
    """One class's prototypes as `save_prototypes` left them; UserError where they are missing, damaged or halves."""
    path = folder / f"{check_class(ident, folder)}.json"
    remedy = "distill.py --stages prototypes makes it anew"
    if not path.is_file():
        raise UserError(f"no prototypes at {path}; {remedy}")
    known = read_json(path, "prototypes")
    if not isinstance(known, dict) or not isinstance(known.get("format"), int):
        raise UserError(f"{path} is no file of prototypes; {remedy}")
    if known.pop("format") > FORMAT:
        raise UserError(f"{path} is of a newer format than this {FORMAT}; update the toolkit")
    tensors = load_vectors(folder / f"{ident}.safetensors", "prototypes", remedy)
    try:
        known["words"] = [[(word, count) for word, count in pairs] for pairs in known["words"]]
        found = Prototypes(latents=tensors["latents"], **known)
        whole = len(found.texts) == len(found.latents) and len(found.files) == len(found.clusters)
        whole = whole and torch.equal(tensors["inputs"], stamp(found.inputs))
        if not all(isinstance(text, str) for text in found.texts) or not all(type(k) is int for k in found.clusters):
            raise ValueError("texts that are none, or clusters that are no numbers")
        if found.ident != ident or not all(map(is_below, [*found.files, *found.nearest, *found.text_files])):
            raise ValueError("the name of another class, or of images that are not below the training folder")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no file of prototypes ({error!r}); {remedy}") from None
    if not whole:
        raise UserError(f"{path} and the .safetensors beside it do not belong together; {remedy}")
    return found


def check_class(name: Any, where: Path | str) -> str:
    """The name of a class that a file gives; UserError for one that its files could not have."""
    if not isinstance(name, str) or not is_plain(name):
        raise UserError(f"{where} has a class {name!r}, which can be no name of files; correct it")
    return name


def stamp(inputs: str) -> Tensor:
    """A digest as numbers, to be kept beside the tensors that it tells of."""
    return torch.tensor(list(inputs.encode()), dtype=torch.uint8)


def published_paths(folder: Path, name: str, ipc: int, threshold: float, tpk: int, km_expand: int) -> tuple[Path, Path]:
    """Where the released code has the image prototypes and the text prototypes of the classes called `name`."""
    image = folder / f"{name}-ipc{ipc}-{float(threshold)}-{tpk}-kmexpand{km_expand}.json"
    return image, folder / f"{name}_text" / f"text_{ipc}_{float(threshold)}_{tpk}.json"


def export_published(
    folder: Path, found: Iterable[Prototypes], name: str, ipc: int, threshold: float, tpk: int, km_expand: int
) -> tuple[Path, Path]:
    """Write prototypes as the released code does, one class after another; the paths of images and of texts.

    Numbers are written such that reading them gives the same float32 again.
    """
    image, text = published_paths(Path(folder), name, ipc, threshold, tpk, km_expand)
    with atomic(image) as first, atomic(text) as second:
        _write_published(first, second, found)
    return image, text


def _write_published(image: Path, text: Path, found: Iterable[Prototypes]) -> None:
    with open(image, "w", encoding="utf-8") as images, open(text, "w", encoding="utf-8") as texts:
        before = ""
        for file in (images, texts):
            file.write("{")
        for one in found:
            key = f"{before}{json.dumps(one.ident)}: "
            texts.write(key + json.dumps(one.texts))
            images.write(key)
            for number, latent in enumerate(one.latents):
                images.write((", " if number else "[") + json.dumps(latent.tolist()))
            images.write("]")
            before = ", "
        for file in (images, texts):
            file.write("}")


def published_text(image_json: Path, text_json: str) -> Path:
    """The file of captions that belongs to a published file of image prototypes: the one named, in the working folder
    or beside the latter; or else the one that goes by the latter's name. UserError where neither is there."""
    places = [Path(text_json), image_json.parent / text_json] if text_json else []
    parts = re.fullmatch(r"(.+)-ipc(\d+)-(.+)-(\d+)-kmexpand\d+", image_json.stem)
    if not text_json and parts:
        name, *rest = parts.groups()
        own = Path(f"{name}_text") / f"text_{'_'.join(rest)}.json"
        places = [image_json.parent / own, own]
    for place in places:
        if place.is_file():
            return place
    looked = f" (looked for {', '.join(map(str, places))})" if places else ""
    raise UserError(f"no captions of {image_json}{looked}; name their file by --text_prototype")


def import_published(
    image_json: Path | str, text_json: Path | str, catalogue: Catalogue, ipc: int
) -> Iterator[Prototypes]:
    """The prototypes in two published files, one class at a time in the order of the file, matched by class name.

    catalogue  whose classes must all be in both files, and no other
    ipc        images a class that will be made: a multiple of each class's prototypes

    An empty caption (the released code writes some) becomes the label. All that can be told from the captions' file is
    told before the first latent is read. UserError for files that are cut short, lack a class, or hold what is no
    prototype.
    """
    image_json, text_json = _present(image_json, "image prototypes"), _present(text_json, "text prototypes")
    labels = {kind.ident: kind.label for kind in catalogue.kinds}
    texts = published_captions(text_json, catalogue, ipc)
    shape = None
    for ident, latents in _by_class(image_json, "image prototypes", catalogue, _latent):
        if len(latents) != len(texts[ident]):
            raise UserError(
                f"class {ident} has {len(latents)} prototypes in {image_json}, but {len(texts[ident])} in {text_json}"
            )
        shape = shape or latents[0].shape
        for number, latent in enumerate(latents):
            if latent.shape != shape:
                sizes = f"{tuple(latent.shape)}, the first {tuple(shape)}"
                raise UserError(f"{image_json}: prototype {number} of class {ident} is {sizes}; write it again")
        captions = [text.strip() or labels[ident] for text in texts[ident]]
        yield Prototypes(ident, labels[ident], torch.stack(latents), captions)


def published_captions(path: Path, catalogue: Catalogue, ipc: int) -> dict[str, list[str]]:
    """Class → its captions in a published file, as `import_published` wants them."""
    texts = dict(_by_class(path, "text prototypes", catalogue, _caption))
    for ident, captions in texts.items():
        if not captions or ipc % len(captions):
            told = f"{path} has {len(captions)} prototypes of class {ident}"
            raise UserError(f"{told}, and --ipc {ipc} is no multiple of that; give one")
    return texts


def _present(path: Path | str, what: str) -> Path:
    path = Path(path)
    if path.is_file():
        return path
    close = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.json")], n=1, cutoff=0.4)
    hint = f" (did you mean {path.parent / close[0]}?)" if close else ""
    raise UserError(f"no {what} at {path}{hint}")


def _caption(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("no text")
    return value


def _latent(value: Any) -> Tensor:
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError("of rows that differ in length") from None
    if array.dtype.kind not in "fi":
        raise ValueError("not numbers alone")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if array.ndim != 3 or array.shape[0] != 4 or not array.size:
        raise ValueError(f"of shape {array.shape}, not (4, height, width)")
    if not np.isfinite(array).all():
        raise ValueError("not finite")
    return torch.from_numpy(array)


def _by_class(
    path: Path, what: str, catalogue: Catalogue, convert: Callable[[Any], Any]
) -> Iterator[tuple[str, list[Any]]]:
    """Each class of a file {class: [items]} with its items, `convert`ed (ValueError: what is wrong with one)."""
    idents, seen = [kind.ident for kind in catalogue.kinds], set()
    for key, items in json_lists(path, what):
        place = catalogue.class_number(key)
        if place is None:
            raise UserError(f"{path} has class '{key}', which the data set lacks{nearest(key, idents)}")
        if place in seen:
            raise UserError(f"{path} has class '{key}' twice; write it again")
        seen.add(place)
        converted = []
        for number, item in enumerate(items):
            try:
                converted.append(convert(item))
            except (ValueError, OverflowError) as error:
                reason = first_line(error)
                raise UserError(f"{path}: prototype {number} of class {key} is {reason}; write it again") from None
        yield idents[place], converted
    lacking = [ident for place, ident in enumerate(idents) if place not in seen]
    if lacking:
        raise UserError(
            f"{path} has no prototypes of {len(lacking)} of {len(idents)} classes, the first is {lacking[0]}; "
            "choose the classes that it has"
        )


class Manifest:
    """`manifest.json` of a run folder: what each stage used and made, by section (data, captions, model, prototypes,
    images), for the next stage to read."""

    NAME = "manifest.json"

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.path = self.folder / self.NAME

    @classmethod
    def find(cls, path: Path | str) -> Manifest | None:
        """The one that `path`, a file or folder of a run, belongs to: in it, or up to two folders above."""
        path = Path(path).absolute()
        return next((cls(place) for place in (path, *path.parents[:2]) if (place / cls.NAME).is_file()), None)

    def section(self, name: str) -> dict[str, Any]:
        """What was recorded under this name, {} if nothing was; UserError where the file is damaged."""
        return self._read().get(name, {})

    def record(self, section: str, **values: Any) -> None:
        """Note plain values under a section, beside what it has."""
        known = self._read()
        known[section] = known.get(section, {}) | values
        write_signed(self.path, {"format": FORMAT, **known})

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        known = read_json(self.path, "manifest")
        version = known.pop("format", None) if isinstance(known, dict) else None
        if not isinstance(version, int) or not all(isinstance(part, dict) for part in known.values()):
            raise UserError(f"{self.path} is no manifest of a run; remove it, or choose another folder")
        if version > FORMAT:
            raise UserError(f"{self.path} is of format {version}, newer than this {FORMAT}; update the toolkit")
        return known
