"""What the classes of a data set are called in sentences, and which sentences these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.benchmarks import LabelledSet
from data.catalogue import read_label_file
from data.subsets import wordnet_names
from networks.prompts import PHOTO, class_names, templates
from utils.config import option
from utils.errors import UserError

AUTO = "auto"
_NOT_AT_HAND = "the package clip-benchmark has them (pip install --no-deps clip-benchmark)"


@dataclass(frozen=True)
class PromptConfig:
    """The words that stand for classes."""

    templates: str = option(
        AUTO,
        "sentences around a class's name: photo (1), simple (7), imagenet (80), a data set's name, a file with one a "
        "line; auto: those that the set is published with, else photo",
    )
    class_names: str = option(
        AUTO,
        "names of classes: imagenet, a data set's name, a file of lines in the order of labels or, by name, of a "
        "folder, a tab and its name; auto: as published, else the folders' names",
    )


@dataclass(frozen=True)
class Prompts:
    """Names and templates of a data set's classes; `named` and `worded`: where they are from."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    named: str
    worded: str
    notes: tuple[str, ...] = ()


def prompts_of(found: LabelledSet, cfg: PromptConfig) -> Prompts:
    """The words for a data set's classes; UserError where given names do not fit them."""
    names, named, notes = _names(found, cfg.class_names)
    worded = cfg.templates
    if worded == AUTO:
        # ObjectNet's classes are ImageNet's by other names.
        relative = found.wordnet or found.name == "objectnet"
        worded = "imagenet" if relative else found.name if found.published else "photo"
        try:
            return Prompts(names, templates(worded), named, worded, notes)
        except UserError:
            said = (
                f"{found.name} is published with {found.published.prompts} templates; {_NOT_AT_HAND}, 'photo' is used"
            )
            return Prompts(names, PHOTO, named, "photo", (*notes, said))
    return Prompts(names, templates(worded), named, worded, notes)


def _names(found: LabelledSet, source: str) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """A name of each class, where they are from, and what to note."""
    if source != AUTO:
        return _given(found, source), source, ()
    if found.wordnet:
        return _by_wordnet(found), "imagenet", ()
    if found.published is None or not found.published.listed:
        return found.words, "folders", ()
    try:
        listed = class_names(found.name)
    except UserError:
        return found.words, "folders", (f"{found.name} has published class names; {_NOT_AT_HAND}",)
    if len(listed) != len(found.classes):
        said = (
            f"{found.name} has {len(listed)} published class names for {len(found.classes)} classes; its own are used"
        )
        return found.words, "folders", (said,)
    if odd := _misplaced(found, listed):
        said = f"{found.name} has {odd} elsewhere than the published list of class names; its own are used"
        return found.words, "folders", (said,)
    return listed, found.name, ()


def _given(found: LabelledSet, source: str) -> tuple[str, ...]:
    if source == "imagenet" and found.wordnet:
        return _by_wordnet(found)
    if Path(source).is_file() and "\t" in Path(source).read_text(encoding="utf-8", errors="replace"):
        by_name = read_label_file(source)
        for name in found.classes:
            if name not in by_name or not by_name[name][1]:
                raise UserError(f"--class_names {source} has no name for {name} of {found.name}; add a line for it")
        return tuple(by_name[name][1] for name in found.classes)
    listed = class_names(source)
    if len(listed) != len(found.classes):
        raise UserError(
            f"--class_names {source} has {len(listed)} names for the {len(found.classes)} classes of {found.name}; "
            "name each by its folder, a tab and its name"
        )
    if odd := _misplaced(found, listed):
        raise UserError(
            f"--class_names {source} has {odd} of {found.name} in another place; put names in the order of the "
            "classes, or name each by its folder, a tab and its name"
        )
    return listed


def _misplaced(found: LabelledSet, listed: Sequence[str]) -> str:
    """A class whose own name the list has, but for others: the list is in another order. Empty where there is none."""
    own, told = (
        [name.replace("_", " ").replace("-", " ").casefold() for name in names] for names in (found.words, listed)
    )
    return next(
        (word for word, name, other in zip(found.words, own, told, strict=True) if name != other and name in told), ""
    )


def _by_wordnet(found: LabelledSet) -> tuple[str, ...]:
    """ImageNet's published names of classes that are known by WordNet names."""
    listed, places = class_names("imagenet"), {wnid: k for k, wnid in enumerate(wordnet_names()[0])}
    return tuple(listed[places[wnid]] for wnid in found.classes)
