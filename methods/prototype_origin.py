"""Where distill.py's prototypes come from: images and captions, files that others wrote, or an earlier command.

Whatever can be wrong with any of these is told when the origin is opened, before a run folder or a model is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.catalogue import Catalogue, CatalogueConfig, Kind, build_catalogue, read_label_file
from data.metadata import METADATA, captions_digest, metadata_file, read_metadata
from data.subsets import wordnet_labels
from methods.prototype_classes import PrototypeConfig, check_counts, class_prototypes
from methods.prototype_files import (
    ExchangeConfig,
    Manifest,
    Prototypes,
    check_class,
    import_published,
    load_prototypes,
    published_captions,
    published_text,
    save_prototypes,
)
from methods.prototype_synthesis import planned
from methods.prototype_texts import TextConfig
from utils.config import option
from utils.errors import UserError
from utils.files import digest, file_digest, read_json

Load = Callable[[], Any]  # the diffusion model, when it is first needed


@dataclass(frozen=True)
class CaptionSource:
    """Where the captions of the training images come from."""

    metajson_file: str = option(
        "",
        "captions, JSON lines of file_name and text (empty: those of buffer.py, or else metadata.jsonl in train)",
        free=True,
    )
    allow_missing: bool = option(False, "images without a caption are used all the same", aliases=("allow-missing",))

    def find(self, classes: Catalogue, made: Path | None = None) -> Path | None:
        """The file of captions: the one named, the one that buffer.py `made`, the one in the training folder."""
        if self.metajson_file:
            return Path(self.metajson_file).expanduser()
        places = [*([made] if made else []), classes.train_root / METADATA]
        return next((place for place in places if place.exists()), None)


@dataclass(frozen=True)
class Origin:
    """Prototypes to be had.

    inputs      digests of what they are made of, to which a run is pinned
    train_root  where the training images are, "" where that is not known
    make        (run folder, seed, the model) → each class's prototypes, which are in its folder `prototypes` then
    """

    inputs: dict[str, str]
    train_root: str
    make: Callable[[Path, int, Load], Iterator[Prototypes]]


def from_images(
    data: CatalogueConfig,
    given: CaptionSource,
    prototypes: PrototypeConfig,
    texts: TextConfig,
    buffers: Path,
    model: str,
) -> Origin:
    """Prototypes found among training images; `model` is a digest of the autoencoder, `buffers` buffer.py's folder."""
    classes = build_catalogue(data)
    noted = Manifest(buffers).section("captions")
    made = Path(noted["path"]) if "path" in noted else None
    path = given.find(classes, made)
    if path is None:
        raise UserError(
            f"no captions of the training images: run buffer.py, or give --metajson_file (looked for {buffers} and "
            f"{classes.train_root / METADATA})"
        )
    own = "file" in noted and path == made and not given.metajson_file
    if own and file_digest(metadata_file(path)) != noted["file"]:
        raise UserError(
            f"{path} is not as buffer.py left it; restore it, or give --metajson_file {path} to use it as it is"
        )
    captions = read_metadata(path, classes, given.allow_missing)
    check_counts(prototypes, classes)

    def make(folder: Path, seed: int, load: Load) -> Iterator[Prototypes]:
        return class_prototypes(prototypes, texts, classes, captions, folder, seed, model, load)

    inputs = {"training_set": classes.fingerprint(), "captions": captions_digest(captions), "autoencoder": model}
    return Origin(inputs, str(classes.train_root.absolute()), make)


def from_published(exchange: ExchangeConfig, data: CatalogueConfig, ipc: int) -> Origin:
    """Prototypes in published JSON files. Their classes are the label file's, else those that the files have.

    There need be no images: without `--data_path` only names are known.
    """
    images = Path(exchange.prototype_path).expanduser()
    if not images.is_file():
        raise UserError(f"no image prototypes at {images}; correct --prototype_path")
    texts = published_text(images, exchange.text_prototype)
    classes = build_catalogue(data) if data.data_path else _named(data, texts)
    published_captions(texts, classes, ipc)
    inputs = digest(file_digest(images), file_digest(texts))

    def make(folder: Path, seed: int, load: Load) -> Iterator[Prototypes]:
        place = folder / "prototypes"
        idents = [kind.ident for kind in classes.kinds]
        if not all(_made_of(place, ident, inputs) for ident in idents):
            for found in import_published(images, texts, classes, ipc):
                found.inputs = inputs
                save_prototypes(place, found)
        return (load_prototypes(place, ident) for ident in idents)

    root = str(classes.train_root.absolute()) if data.data_path else ""
    return Origin({"published_prototypes": inputs}, root, make)


def from_folder(folder: Path, noted: dict[str, Any], ipc: int, own: bool) -> Origin:
    """Prototypes that an earlier command left in `folder`, which stays as it is, and `noted` in its manifest.

    ipc   images to be made of each class's
    own   they are those of this very run, which is pinned to what they were made of already
    """
    classes = noted["classes"]

    def make(run: Path, seed: int, load: Load) -> Iterator[Prototypes]:
        place = run / "prototypes"
        for ident in classes:
            found = load_prototypes(folder, ident)
            if folder.resolve() != place.resolve() and not _made_of(place, ident, found.inputs):
                save_prototypes(place, found)
            yield found

    made_of = []
    for ident in classes:
        found = load_prototypes(folder, ident)
        planned(folder, found, ipc)  # which tells whether there can be so many
        made_of.append(found.inputs)
    inputs = {} if own else {"prototypes_digest": digest(made_of)}
    return Origin(inputs, noted.get("train_root", ""), make)


def _made_of(place: Path, ident: str, inputs: str) -> bool:
    try:
        return load_prototypes(place, ident).inputs == inputs
    except UserError:  # none yet, or half of one
        return False


def _named(data: CatalogueConfig, texts: Path) -> Catalogue:
    """The classes of a published file of captions, with what they are called, and without images."""
    found = read_json(texts, "text prototypes")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{texts} holds no text prototypes, {{class: [captions]}}; write it again")
    known = wordnet_labels()
    labels = {check_class(ident, texts): known.get(ident, ident.replace("_", " ")) for ident in found}
    named = read_label_file(data.label_file_path) if data.label_file_path else {}
    for ident, (number, label) in named.items():
        if ident not in labels:
            raise UserError(f"line {number} of {data.label_file_path}: {texts} has no class '{ident}'; correct either")
        labels[ident] = label or labels[ident]
    lacking = sorted(set(labels) - set(named)) if named else []
    if lacking:
        raise UserError(f"{data.label_file_path} lacks '{lacking[0]}', which {texts} has; correct either")
    if data.nclass not in (0, len(labels)):
        raise UserError(f"--nclass is {data.nclass}, but {texts} has {len(labels)} classes; all are used: leave it out")
    kinds = tuple(Kind(ident, label) for ident, label in labels.items())
    nowhere, none = Path(), ((),) * len(kinds)
    return Catalogue(data.row, data.source[0], kinds, nowhere, nowhere, none, none, "", data.cache_dir, data.threads)
