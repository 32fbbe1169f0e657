"""Templates and class names: the published lists from the packages that keep them, files, and errors."""

import json

import pytest

from networks.prompts import class_names, fill, templates
from utils.errors import UserError


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """A stand-in for the package clip-benchmark, of which two files are read."""
    lists = {
        "en_classnames.json": {"pets": ["Abyssinian", "Bengal"], "mnist": ["0", "1"]},
        "en_zeroshot_classification_templates.json": {"pets": ["a photo of a {c}, a type of pet."], "odd": ["no name"]},
    }
    (tmp_path / "clip_benchmark" / "datasets").mkdir(parents=True)
    (tmp_path / "clip_benchmark" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    for name, value in lists.items():
        (tmp_path / "clip_benchmark" / "datasets" / name).write_text(json.dumps(value))
    monkeypatch.syspath_prepend(tmp_path)


def test_the_published_lists():
    assert (len(templates("photo")), len(templates("simple")), len(templates("imagenet"))) == (1, 7, 80)
    assert all("{}" in template for template in (*templates("simple"), *templates("imagenet")))
    assert fill(templates("photo")[0], "great white shark") == "a photo of a great white shark."
    names = class_names("imagenet")
    assert len(names) == 1000 and names[0] == "tench" and names == class_names("imagenet-1k")


def test_a_data_sets_own_by_either_name(benchmark):
    assert templates("pets") == templates("oxford-iiit-pets") == ("a photo of a {}, a type of pet.",)
    assert class_names("oxford-iiit-pets") == ("Abyssinian", "Bengal")
    with pytest.raises(UserError, match=r"clip-benchmark has no templates of 'petz' \(did you mean 'pets'\?\); name a"):
        templates("petz")
    with pytest.raises(UserError, match=r"templates of odd: 'no name' has no \{\} for the class name"):
        templates("odd")


def test_files_with_one_a_line(tmp_path):
    (tmp_path / "templates.txt").write_text("a drawing of a {}.\n\n  the {c}!  \n")
    assert templates(str(tmp_path / "templates.txt")) == ("a drawing of a {}.", "the {}!")
    (tmp_path / "names.txt").write_text("café\nblue box\n", encoding="utf-8")
    assert class_names(str(tmp_path / "names.txt")) == ("café", "blue box")


def test_a_class_name_is_put_in_as_it_is():
    assert fill("a {} on a {}", "{}\\1 %s") == "a {}\\1 %s on a {}\\1 %s"


def test_what_is_not_to_be_had_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("networks.prompts.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'fotos' .*without the package clip-benchmark: pip install .*or name a file"):
        templates("fotos")
    with pytest.raises(UserError, match=r"no templates called 'imagenett' \(did you mean 'imagenet'\?\)"):
        templates("imagenett")
    with pytest.raises(UserError, match="no class names called 'dtd' without"):
        class_names("dtd")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=r"templates .*empty\.txt is empty; put one on each line"):
        templates(str(tmp_path / "empty.txt"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"class names .*bytes\.txt is not UTF-8 text"):
        class_names(str(tmp_path / "bytes.txt"))
    (tmp_path / "plain.txt").write_text("a photo of a {}.\na photo.\n")
    with pytest.raises(UserError, match=r"plain\.txt: 'a photo\.' has no \{\}"):
        templates(str(tmp_path / "plain.txt"))
