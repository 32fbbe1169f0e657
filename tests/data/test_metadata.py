"""Captions of training images: what a file of them may look like, and what is said of one that does not fit."""

import json
from dataclasses import replace

import pytest

from data.catalogue import CatalogueConfig, build_catalogue
from data.metadata import METADATA, captions_digest, read_metadata, write_metadata
from utils.errors import UserError

FILES = ("cat/cat_1.png", "cat/cat_2.png", "dog/dog_1.png", "dog/dog_2.png")


@pytest.fixture
def catalogue(tmp_path):
    """Two images each of cat and dog; and a class cow that is not used."""
    for name in (*FILES, "cow/cow_1.png"):
        path = tmp_path / "set" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\ndog\n")
    return build_catalogue(
        CatalogueConfig(dataset="folder", data_path=str(tmp_path / "set"), label_file_path=str(labels), workers=1)
    )


@pytest.fixture
def note(tmp_path):
    """note(*lines) is a file of these lines, texts as they are and pairs as JSON."""

    def write(*lines):
        path = tmp_path / METADATA
        path.write_text("\n".join(line if isinstance(line, str) else entry(*line) for line in lines), encoding="utf-8")
        return path

    return write


def entry(name, text):
    return json.dumps({"file_name": name, "text": text})


def four(*names):
    return [(name, f"Text {number}.") for number, name in enumerate(names)]


def refused(path, catalogue, **options):
    with pytest.raises(UserError) as caught:
        read_metadata(path, catalogue, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read(catalogue, tmp_path):
    captions = {name: f"Fur like « silk », {name}\tand so on." for name in FILES}
    write_metadata(tmp_path / "one", captions)
    write_metadata(tmp_path / "other", dict(reversed(captions.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert read_metadata(tmp_path / "one", catalogue) == captions
    assert list(read_metadata(tmp_path / "one", catalogue)) == list(FILES)
    write_metadata(catalogue.train_root / METADATA, captions)
    assert read_metadata(catalogue.train_root, catalogue) == captions
    lines = (tmp_path / "one").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"file_name": name, "text": captions[name]} for name in FILES]


def test_digest(catalogue):
    captions = {name: "a" for name in FILES}
    assert captions_digest(captions) == captions_digest(dict(reversed(captions.items())))
    assert captions_digest(captions) != captions_digest(captions | {FILES[0]: "b"})


@pytest.mark.parametrize(
    "names",
    [
        [name.split("/")[1] for name in FILES],  # as published for ImageWoof
        [f"train/{name}" for name in FILES],
        [f"/home/someone/set/train/{name}" for name in FILES],
        [f"./{name}" for name in FILES],
        [name.replace("_", "MM") for name in FILES],
        [name.split("/")[1].replace("_", "MM") for name in FILES],
    ],
)
def test_spellings_of_names(catalogue, note, names):
    path = note(*four(*names), ("cow/cow_1.png", "Grazing."), "", "  ")
    assert read_metadata(path, catalogue) == dict(four(*FILES))


def test_files_with_mm_in_their_names(catalogue, note):
    """Whoever renamed the images, as the published tool asks for, has these names."""
    renamed = tuple(tuple(name.replace("_", "MM") for name in files) for files in catalogue.train)
    names = [name for files in renamed for name in files]
    assert list(read_metadata(note(*four(*names)), replace(catalogue, train=renamed))) == names


def test_bare_names_that_several_images_have(catalogue, note):
    for kind in ("cat", "dog"):
        (catalogue.train_root / kind / "same.png").write_text(kind)
    both = replace(catalogue, train=tuple((*files, f"{files[0][:3]}/same.png") for files in catalogue.train))
    path = note(*four(*FILES), ("same.png", "Which?"))
    assert "1 captions of no image, or of several at once: same.png (line 5)" in refused(path, both)
    path = note(*four(*FILES), ("cat/same.png", "A cat."), ("dog/same.png", "A dog."))
    assert read_metadata(path, both)["dog/same.png"] == "A dog."


def test_folders_below_a_class(catalogue, note):
    """Tiny ImageNet's, for which captions may be named as if the images were not in one."""
    inner = replace(catalogue, train=(("cat/images/1.png",), ("dog/images/1.png",)))
    for names in (("cat/1.png", "dog/1.png"), ("cat/images/1.png", "train/dog/images/1.png")):
        assert list(read_metadata(note(*four(*names)), inner)) == ["cat/images/1.png", "dog/images/1.png"]


def test_cifar_classes_in_other_spellings(catalogue, note):
    kinds = tuple(replace(kind, ident=name) for kind, name in zip(catalogue.kinds, ("orchid", "train"), strict=True))
    cifar = replace(catalogue, dataset="cifar100", kinds=kinds, train=(("orchid/1.png",), ("train/1.png",)))
    for names in (("orchids/1.png", "train/1.png"), ("train/orchids/1.png", "train/train/1.png")):
        assert read_metadata(note(*four(*names)), cifar) == {"orchid/1.png": "Text 0.", "train/1.png": "Text 1."}


def test_images_that_are_left_out(catalogue, note):
    """By --train_limit: their captions are not missed, nor in the way."""
    few = replace(catalogue, train=tuple(files[:1] for files in catalogue.train))
    for names in (FILES, [name.split("/")[1] for name in FILES]):
        assert list(read_metadata(note(*four(*names)), few)) == [FILES[0], FILES[2]]


def test_images_without_a_caption(catalogue, note):
    path = note(("dog/dog_1.png", " A dog. "), ("cow/cow_1.png", "A cow."))
    text = refused(path, catalogue)
    assert "3 images without a caption: cat/cat_1.png, cat/cat_2.png, dog/dog_2.png (1 lines are of other" in text
    assert text.endswith("give --allow_missing")
    assert read_metadata(path, catalogue, allow_missing=True) == {"dog/dog_1.png": "A dog."}


def test_only_three_offenders_are_named(catalogue, note):
    text = refused(note(("cow/cow_1.png", "A cow.")), catalogue)
    assert "4 images without a caption: cat/cat_1.png, cat/cat_2.png, dog/dog_1.png, ... (1 lines" in text
    assert "has no caption of an image in" in refused(note(("cow/cow_1.png", "A cow.")), catalogue, allow_missing=True)


@pytest.mark.parametrize(
    "line, told",
    [
        (("cat/cat_9.png", "Gone."), "1 captions of no image, or of several at once: cat/cat_9.png (line 5) in"),
        (("gone.png", "Gone."), "gone.png (line 5) in"),
        (("cat/cat_1.png", "Again."), "1 second captions of an image: cat/cat_1.png (line 5); keep one"),
        (("catMM1.png", "Again."), "1 second captions of an image: catMM1.png (line 5)"),
        (("dog/dog_2.png", " \n"), "1 empty captions: dog/dog_2.png (line 5); write"),
        ('{"file_name": "cat', "line 5 of "),
        ("[1]", 'line 5 of {path} is [1]; it needs "file_name" and "text", both texts'),
        ('{"file_name": "cat/cat_1.png"}', 'is {"file_name": "cat/cat_1.png"}; it needs'),
        ('{"file_name": "cat/cat_1.png", "text": 3}', "both texts"),
        ('{"file_name": "cat/cat_1.png", "text": "half \\ud83e"}', "both texts"),
        ('{"file_name": "", "text": "Text."}', "both texts"),
    ],
)
@pytest.mark.parametrize("allow_missing", [False, True])
def test_wrong_lines(catalogue, note, line, told, allow_missing):
    path = note(*four(*FILES), line)
    assert told.replace("{path}", str(path)) in refused(path, catalogue, allow_missing=allow_missing)


def test_wrong_files(catalogue, tmp_path):
    assert f"no captions at {tmp_path / 'none'}; run buffer.py" in refused(tmp_path / "none", catalogue)
    assert f"no captions at {tmp_path / METADATA}" in refused(tmp_path, catalogue)
    (tmp_path / METADATA).write_bytes(b'{"file_name": "\xff"}')
    assert "line 1 of" in refused(tmp_path, catalogue)
    (tmp_path / METADATA).write_bytes(b"")
    assert "4 images without a caption" in refused(tmp_path, catalogue)
    (tmp_path / METADATA).write_bytes(b"\xef\xbb\xbf" + "\n".join(entry(name, "Text.") for name in FILES).encode())
    assert len(read_metadata(tmp_path, catalogue)) == 4
