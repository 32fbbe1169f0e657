"""Names of classes and templates: a set's own where they are at hand, by numbers or WordNet names; else told."""

import pytest
import torch

from data.benchmark_files import ArrayPictures, Listing
from data.benchmarks import ELEVATER, ROBUSTNESS, LabelledSet
from methods import clip_names
from methods.clip_names import PromptConfig, prompts_of
from utils.errors import UserError


def labelled(name, classes):
    """A set whose classes these are, an image each."""
    known = {one.name: one for one in (*ELEVATER, *ROBUSTNESS)}
    labels = torch.arange(len(classes))
    listing = Listing(ArrayPictures(torch.zeros(len(classes), 2, 2, dtype=torch.uint8)), labels, tuple(classes))
    return LabelledSet(name, {"test": lambda: listing}, "accuracy", known.get(name))


@pytest.fixture
def packaged(monkeypatch):
    """As if clip-benchmark were installed, with lists of its own."""
    lists = {"gtsrb": ("stop", "go"), "imagenet": tuple(f"thing {k}" for k in range(1000))}
    monkeypatch.setattr(clip_names, "class_names", lists.__getitem__)
    monkeypatch.setattr(clip_names, "templates", lambda name: (f"a {{}} of {name}",))


def missing(name):
    raise UserError("no such package")


def test_names_of_a_published_list_go_by_the_sets_numbers(packaged):
    found = prompts_of(labelled("gtsrb", ["0", "1"]), PromptConfig())
    assert found.names == ("stop", "go") and found.templates == ("a {} of gtsrb",) and not found.notes
    assert (found.named, found.worded) == ("gtsrb", "gtsrb")


def test_a_list_of_another_length_is_not_taken(packaged):
    found = prompts_of(labelled("gtsrb", ["0", "1", "2"]), PromptConfig())
    assert found.names == ("0", "1", "2") and found.notes == (
        "gtsrb has 2 published class names for 3 classes; its own are used",
    )


def test_a_set_that_names_its_classes_keeps_them(packaged):
    found = prompts_of(labelled("food101", ["apple_pie", "beef_tartare"]), PromptConfig())
    assert found.names == ("apple pie", "beef tartare") and found.worded == "food101"


def test_imagenets_names_go_by_wordnet_names_not_by_position(packaged):
    found = prompts_of(labelled("imagenet-a", ["n01443537", "n01440764", "n01498041"]), PromptConfig())
    assert found.names == ("thing 1", "thing 0", "thing 6") and found.worded == "imagenet"
    own = prompts_of(labelled("folder", ["n01498041"]), PromptConfig())
    assert own.names == ("thing 6",) and own.worded == "imagenet"
    assert prompts_of(labelled("objectnet", ["Bowl"]), PromptConfig()).worded == "imagenet"


def test_without_the_package_it_is_told(monkeypatch):
    monkeypatch.setattr(clip_names, "class_names", missing)
    monkeypatch.setattr(clip_names, "templates", missing)
    found = prompts_of(labelled("gtsrb", ["0", "1"]), PromptConfig())
    assert found.names == ("0", "1") and found.templates == ("a photo of a {}.",) and found.worded == "photo"
    names, templates = found.notes
    assert names.startswith("gtsrb has published class names; the package clip-benchmark has them (pip install")
    assert templates.startswith("gtsrb is published with 3 templates; the package clip-benchmark")


def test_what_is_asked_for_by_name_is_not_replaced(monkeypatch):
    monkeypatch.setattr(clip_names, "templates", missing)
    with pytest.raises(UserError, match="no such package"):
        prompts_of(labelled("gtsrb", ["0", "1"]), PromptConfig(templates="gtsrb"))


def test_a_list_in_another_order_is_not_taken(packaged, tmp_path):
    """Folders sort by name, published lists by number: in between lie all the wrong names."""
    found = prompts_of(labelled("gtsrb", ["Go", "stop"]), PromptConfig())
    assert found.names == ("Go", "stop")
    assert found.notes == ("gtsrb has Go elsewhere than the published list of class names; its own are used",)
    assert prompts_of(labelled("gtsrb", ["Stop", "walk"]), PromptConfig()).names == ("stop", "go")
    with pytest.raises(UserError, match="--class_names gtsrb has go of mine in another place; put names in the order"):
        prompts_of(labelled("mine", ["go", "stop"]), PromptConfig(class_names="gtsrb"))
