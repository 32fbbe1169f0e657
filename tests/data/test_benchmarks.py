"""Labelled data sets: the published table, anybody's folders and tables, and mistakes."""

import pytest
import torch

from data.benchmark_files import FilePictures, in_order
from data.benchmarks import ELEVATER, GROUPS, IMAGENET, ROBUSTNESS, BenchmarkConfig, LabelledSet, open_benchmark
from data.subsets import SUBSETS, wordnet_names
from data.toy import SHAPES
from tests.data.labelled_world import folders, opened, paint, reds, write_rows
from utils.errors import UserError

# --- the table -------------------------------------------------------------------------------------------------------


def test_the_published_table():
    assert len(ELEVATER) == 20 and len(ROBUSTNESS) == 5
    known = {one.name: one for one in (*ELEVATER, IMAGENET, *ROBUSTNESS)}
    assert sum(one.classes for one in ELEVATER) == 1151
    assert {one.metric for one in ELEVATER} == {"accuracy", "mean-per-class", "roc_auc", "11point_mAP"}
    assert sum(one.metric == "mean-per-class" for one in ELEVATER) == 4
    assert known["resisc45-clip"].sizes == (3150, 3150, 25200) and known["caltech101"].prompts == 34
    assert [one.name for one in ELEVATER if not one.crop] == ["kitti-distance"]
    assert IMAGENET.classes == 1000 and all(one.prompts == 80 for one in (IMAGENET, *ROBUSTNESS))


def test_names_ids_groups_and_config_files_are_known():
    cfg = BenchmarkConfig(dataset=("oxford-flower-102", "resources/datasets/cifar10.yaml", "cifar-10", "robustness"))
    assert cfg.names == ("flower102", "cifar10", *(one.name for one in GROUPS["robustness"]))
    assert len(BenchmarkConfig(dataset=("elevater",)).names) == 20
    with pytest.raises(UserError, match=r"unknown dataset 'flowers102' \(did you mean 'flower102'\?\)"):
        BenchmarkConfig(dataset=("flowers102",)).check()


# --- anybody's -------------------------------------------------------------------------------------------------------


def test_folders_of_classes(tmp_path):
    folders(tmp_path, ("train", "valid", "test"))
    found = opened(tmp_path, "folder")
    assert found.classes == ("cat", "dog") and found.metric == "accuracy" and found.crop and not found.notes
    for split in ("train", "val", "test"):
        assert found.split(split).labels.tolist() == [0, 0, 1, 1] and reds(found.split(split)) == [0, 1, 10, 11]
    assert found.split("train").pictures.image(0).size == (6, 4)


def test_val_is_test_where_that_lacks_and_bare_classes_are_test(tmp_path):
    folders(tmp_path / "a", ("train", "val"))
    found = opened(tmp_path / "a", "folder")
    assert set(found.splits) == {"train", "test"}
    # Which is told of every set but ImageNet, whose val is published as its test.
    assert found.notes == ["folder: it has no test images here; those of val are taken"]
    assert found.notes[0].replace("folder", "dtd") in opened(tmp_path / "a", "dtd").notes
    write_rows(tmp_path / "a" / "b" / "valid.csv", [("file", "label"), ("../val/cat/0.png", "cat")])
    assert opened(tmp_path / "a" / "b", "csv").notes == [
        "csv: it has no test images here; those of valid.csv are taken"
    ]
    folders(tmp_path / "c", ("val", "test"))
    whole = opened(tmp_path / "c", "folder")
    assert len(whole.split("val").pictures) == 4 and not whole.notes
    bare = opened(tmp_path / "a" / "train", "folder")
    assert bare.classes == ("cat", "dog") and set(bare.splits) == {"test"}
    with pytest.raises(UserError, match="folder has no train images here"):
        bare.split("train")


def test_numbers_are_in_the_order_of_numbers(tmp_path):
    assert in_order(["10", "9", "1"]) == ("1", "9", "10") and in_order(["10", "9", "a"]) == ("10", "9", "a")
    folders(tmp_path, ("test",), [str(k) for k in range(1, 12)], count=1)
    assert reds(opened(tmp_path, "folder").split("test")) == [10 * k for k in range(11)]


def test_a_class_that_only_one_split_has_keeps_its_number(tmp_path):
    folders(tmp_path, ("train",), ("ant", "bee", "cow"), count=1)
    folders(tmp_path, ("test",), ("bee",), count=1)
    found = opened(tmp_path, "folder")
    assert found.classes == ("ant", "bee", "cow") and found.split("test").labels.tolist() == [1]


@pytest.mark.parametrize("header", [("file", "label"), ("label", "filepath"), ("Image", "Class")])
def test_tables(tmp_path, header):
    for i in range(3):
        paint(tmp_path / "images" / f"{i}.png", i)
    rows = [("images/2.png", "dog"), ("images/0.png", "cat"), ("images/1.png", "dog")]
    flipped = header[0] == "label"
    write_rows(tmp_path / "test.csv", [header, *(row[::-1] if flipped else row for row in rows)])
    for place in (tmp_path, tmp_path / "test.csv"):
        listing = opened(place, "csv").split("test")
        assert listing.labels.tolist() == [1, 0, 1] and listing.classes == ("cat", "dog") and reds(listing) == [2, 0, 1]


def test_tables_of_several_labels(tmp_path):
    for i in range(3):
        paint(tmp_path / f"{i}.png", i)
    write_rows(tmp_path / "test.csv", [("file", "label"), ("0.png", "cat; dog"), ("1.png", ""), ("2.png", "dog")])
    found = opened(tmp_path, "csv")
    assert found.metric == "11point_mAP"
    assert found.split("test").labels.tolist() == [[True, True], [False, False], [False, True]]
    with pytest.raises(UserError, match="cannot be scored by accuracy"):
        opened(tmp_path, "csv", metric="accuracy")


def test_the_toy_set():
    toy = open_benchmark(BenchmarkConfig(dataset=("toy",), toy_images=12, toy_size=16), "toy")
    assert toy.classes == tuple(SHAPES) and len(toy.split("test").pictures) == 300
    assert len(toy.split("train").pictures) == 12 and toy.split("train").pictures.image(3).size == (16, 16)


def test_sets_of_the_catalogue(tmp_path):
    wnids = [wordnet_names()[0][number] for number in SUBSETS["imagenette"]]
    folders(tmp_path, ("train", "val"), wnids, count=1)
    found = opened(tmp_path, "nette", cache_dir=str(tmp_path / "cache"))
    assert list(found.classes) == wnids and found.words[1] == "English springer"
    assert reds(found.split("train")) == reds(found.split("test")) == [10 * k for k in range(10)]


def test_content_follows_the_files(tmp_path):
    folders(tmp_path, ("test",))
    before = opened(tmp_path, "folder").split("test").pictures.content(tmp_path / "cache", 1)
    assert opened(tmp_path, "folder").split("test").pictures.content(tmp_path / "cache", 1) == before
    paint(tmp_path / "test" / "dog" / "1.png", 99)
    assert opened(tmp_path, "folder").split("test").pictures.content(tmp_path / "cache", 1) != before


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_places_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no folder for dtd; give --data_path"):
        open_benchmark(BenchmarkConfig(), "dtd")
    with pytest.raises(UserError, match=r"no folder .*gone; correct --data_path"):
        opened(tmp_path / "gone", "dtd")
    with pytest.raises(UserError, match=r"no dtd in .* \(looked for dtd/dtd/labels, dtd/test/<class>/"):
        opened(tmp_path, "dtd")
    for name in ("folder", "csv"):
        with pytest.raises(UserError, match="no labelled images in"):
            opened(tmp_path, name)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,b\n1,2\n", "has columns a, b; it needs file and label"),
        ("file,label\n", "lists no image"),
        ("file,label\n,cat\n", "line 2 of .* is not whole"),
        ("file,label\n1.png\n", "line 2 of .* is not whole"),
    ],
)
def test_tables_that_are_not_whole(tmp_path, text, told):
    (tmp_path / "test.csv").write_text(text)
    with pytest.raises(UserError, match=told):
        opened(tmp_path, "csv")


def test_an_image_that_cannot_be_decoded_is_told(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"image .*a.png cannot be decoded"):
        FilePictures([tmp_path / "a.png"]).image(0)
    with pytest.raises(UserError, match=r"no image .*b.png"):
        FilePictures([tmp_path / "b.png"]).image(0)


def test_train_and_test_have_equal_classes(tmp_path):
    def part(*names):
        return lambda: type("L", (), {"classes": names, "labels": torch.zeros(1), "pictures": [0], "note": ""})()

    odd = LabelledSet("mine", {"train": part("a", "b"), "test": part("a", "c")}, "")
    with pytest.raises(UserError, match="classes of train and test differ, such as b"):
        odd.split("train")
    with pytest.raises(UserError, match="roc_auc, which takes two classes; it has 3"):
        LabelledSet("mine", {"test": part("a", "b", "c")}, "roc_auc")


def test_a_table_may_mix_relative_and_absolute_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "set" / "a.png")
    paint(tmp_path / "b.png", 9)
    write_rows(tmp_path / "set" / "test.csv", [("file", "label"), ("a.png", "ant"), (tmp_path / "b.png", "bee")])
    found = opened("set", "csv").split("test")
    assert reds(found) == [0, 9] and len(found.pictures.content(tmp_path / "cache", 1)) == 64
