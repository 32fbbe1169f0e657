"""Labelled data sets: the published table, each layout in small, anybody's folders and tables, and mistakes."""

import csv
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from data.benchmark_files import FilePictures, in_order
from data.benchmarks import ELEVATER, GROUPS, IMAGENET, ROBUSTNESS, BenchmarkConfig, LabelledSet, open_benchmark
from data.class_names import CIFAR
from data.subsets import SUBSETS, wordnet_names
from data.toy import SHAPES
from utils.errors import UserError


def paint(path, colour=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(path)


def folders(root, splits, classes=("cat", "dog"), count=2):
    for split in splits:
        for k, name in enumerate(classes):
            for i in range(count):
                paint(root / split / name / f"{i}.png", 10 * k + i)


def opened(root, name, **options):
    return open_benchmark(BenchmarkConfig(dataset=(name,), data_path=str(root), **options), name)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def reds(listing):
    return [listing.pictures.image(row).getpixel((0, 0))[0] for row in range(len(listing.pictures))]


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


# --- published layouts -----------------------------------------------------------------------------------------------


def test_cifar_as_torchvision_stores_it(tmp_path, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        rows = {"data": np.full((2, 3072), 7, np.uint8), "labels": [3, 0]}
        (place / name).write_bytes(pickle.dumps(rows))
    names = list(CIFAR["cifar10"])
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    found = opened(tmp_path, "cifar10")
    assert found.classes == tuple(names) and found.split("test").labels.tolist() == [3, 0]
    assert (
        len(found.split("train").labels) == 10 and "cifar10 has 2 test images here; published are 10,000" in found.notes
    )


def test_dtd_as_torchvision_stores_it(tmp_path):
    place = tmp_path / "dtd" / "dtd"
    for split, number in (("train", 1), ("val", 2), ("test", 3)):
        names = [f"{kind}/{kind}_{number}.jpg" for kind in ("banded", "woven")]
        for name in names:
            paint(place / "images" / name, number)
        (place / "labels").mkdir(exist_ok=True)
        (place / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")
    found = opened(tmp_path, "dtd")
    assert found.classes == ("banded", "woven") and reds(found.split("val")) == pytest.approx([2, 2], abs=2)
    assert found.notes[:2] == [
        "dtd has 2 test images here; published are 1,880",
        "dtd has 2 classes here; published are 47",
    ]


def test_flowers_as_torchvision_stores_them(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import flowers102

    monkeypatch.setattr(flowers102, "check_integrity", lambda *_: True)
    place = tmp_path / "flowers-102"
    for number in range(1, 5):
        paint(place / "jpg" / f"image_{number:05d}.jpg", 50 * number)
    savemat(place / "setid.mat", {"trnid": [[1, 2]], "valid": [[3]], "tstid": [[4, 1]]})
    savemat(place / "imagelabels.mat", {"labels": [[2, 1, 2, 1]]})
    found = opened(tmp_path, "flower102")
    assert found.split("test").labels.tolist() == [0, 1] and found.metric == "mean-per-class"
    assert reds(found.split("test")) == pytest.approx([200, 50], abs=3)


def test_gtsrb_has_ppm_images(tmp_path):
    place = tmp_path / "gtsrb"
    paint(place / "GTSRB" / "Final_Test" / "Images" / "00000.ppm", 5)
    (place / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;1\n")
    found = opened(tmp_path, "gtsrb")
    assert found.split("test").labels.tolist() == [1] and reds(found.split("test")) == [5]


def test_fer2013_names_follow_its_numbers(tmp_path):
    grey = " ".join(["8"] * 48 * 48)
    rows = [("emotion", "pixels", "Usage"), (4, grey, "PrivateTest"), (6, grey, "Training"), (5, grey, "PublicTest")]
    write_rows(tmp_path / "fer2013.csv", rows)
    found = opened(tmp_path, "fer2013")
    said = {split: found.classes[found.split(split).labels[0]] for split in ("train", "val", "test")}
    assert said == {"test": "sad", "train": "neutral", "val": "surprised"}
    assert found.split("test").pictures.image(0).size == (48, 48) and reds(found.split("test")) == [8]


def test_voc_takes_its_classification_lists(tmp_path):
    main = tmp_path / "VOC2007" / "ImageSets" / "Main"
    main.mkdir(parents=True)
    for split in ("train", "val", "test"):
        (main / f"{split}.txt").write_text("000001\n000002\n")
        (main / f"cat_{split}.txt").write_text("000001  1\n000002 -1\n")
        (main / f"dog_{split}.txt").write_text("000001  1\n000002  0\n")
    found = opened(tmp_path, "voc2007classification")
    assert found.metric == "11point_mAP" and found.classes == ("cat", "dog")
    assert found.split("train").labels.tolist() == [[True, True], [False, False]]


def test_hateful_memes_test_on_dev(tmp_path):
    for split, label in (("train", 0), ("dev", 1)):
        (tmp_path / f"{split}.jsonl").write_text(
            json.dumps({"id": 1, "img": f"img/{split}.png", "label": label}) + "\n"
        )
        paint(tmp_path / "img" / f"{split}.png", label)
    found = opened(tmp_path, "hateful-memes")
    assert found.metric == "roc_auc" and found.split("test").labels.tolist() == [1] and len(found.classes) == 2


def test_a_split_is_drawn_where_none_is_published_with_the_images(tmp_path):
    for k, name in enumerate(("ant", "bee")):
        for i in range(40):
            paint(tmp_path / "101_ObjectCategories" / name / f"{i:02d}.png", 100 * k + i)
    found = opened(tmp_path, "caltech101")
    train, test = set(reds(found.split("train"))), set(reds(found.split("test")))
    assert len(train) == 60 and len(test) == 20 and not train & test and len(train | test) == 80
    assert set(reds(opened(tmp_path, "caltech101").split("train"))) == train
    # Nobody else has these images, which is told once for both splits.
    (said,) = [note for note in found.notes if "split" in note]
    assert said.startswith("caltech101: it comes without a split; ours is drawn")
    folders(tmp_path / "set", ("train", "test"))
    assert not any("drawn" in note for note in opened(tmp_path / "set", "caltech101").notes)


def test_imagenets_relatives_are_known_by_wordnet_names_and_numbers(tmp_path):
    wnids = wordnet_names()[0]
    folders(tmp_path / "imagenet-a", ("",), (wnids[6], wnids[11]), count=1)
    found = opened(tmp_path, "imagenet-a")
    assert found.classes == (wnids[6], wnids[11]) and found.wordnet and found.words == ("stingray", "goldfinch")
    folders(tmp_path / "imagenetv2-matched-frequency-format-val", ("",), ("2", "10", "0"), count=1)
    found = opened(tmp_path, "imagenetv2")
    assert found.classes == (wnids[0], wnids[2], wnids[10]) and reds(found.split("test")) == [20, 0, 10]
    folders(tmp_path / "sketch", ("",), ("n01440764", "mine"), count=1)
    with pytest.raises(UserError, match=r"folder mine in .* has no WordNet name"):
        opened(tmp_path, "imagenet-sketch")


def test_imagenet_takes_val_for_test(tmp_path):
    folders(tmp_path, ("train", "val"), ("n01440764", "n01443537"), count=1)
    (tmp_path / "test").mkdir()
    paint(tmp_path / "test" / "0.png")
    found = opened(tmp_path, "imagenet-1k")
    assert found.words == ("tench", "goldfish") and set(found.splits) == {"train", "test"}


def test_objectnet_takes_the_classes_that_imagenet_has(tmp_path):
    maps = tmp_path / "mappings"
    maps.mkdir()
    (maps / "folder_to_objectnet_label.json").write_text(
        json.dumps({"axe": "Axe", "air": "Air freshener", "bow": "Bowl"})
    )
    (maps / "objectnet_to_imagenet_1k.json").write_text(json.dumps({"Bowl": "mixing bowl", "Axe": "hatchet"}))
    for k, name in enumerate(("axe", "air", "bow")):
        paint(tmp_path / "images" / name / "0.png", 10 * k)
    found = opened(tmp_path, "objectnet")
    assert found.classes == ("Axe", "Bowl") and reds(found.split("test")) == [0, 20]


def test_a_named_set_in_folders_of_its_name(tmp_path):
    folders(tmp_path / "resisc45_clip", ("train", "test"), ("airport", "beach_side"))
    folders(tmp_path / "other", ("test",))
    found = opened(tmp_path, "resisc45-clip")
    assert found.words == ("airport", "beach side") and len(found.notes) == 2


def test_a_folder_of_bare_classes_is_one_set_only(tmp_path):
    """Where several are asked for, each lies in a folder of its name: else ImageNet would be its own relatives."""
    folders(tmp_path, ("val",), ("n01440764", "n01443537"))
    cfg = BenchmarkConfig(data_path=str(tmp_path))
    assert len(open_benchmark(cfg, "imagenet-1k").split("test").pictures) == 4
    for name in ("imagenet-a", "dtd"):
        with pytest.raises(UserError, match=f"no {name} in"):
            open_benchmark(cfg, name, alone=False)
    folders(tmp_path / "imagenet-a", ("",), ("n01440764",))
    assert len(open_benchmark(cfg, "imagenet-a", alone=False).split("test").pictures) == 2


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


def test_tables_that_are_not_the_publishers(tmp_path):
    table = tmp_path / "fer2013.csv"
    for rows, told in (
        ("", "fer2013 has no test images of any class"),
        ("1,1 2 3,PrivateTest\n", "is not FER-2013's table"),
        (f"1,{' '.join(['300'] * 2304)},PrivateTest\n", "is not FER-2013's table"),
        ("1\n", "is not FER-2013's table|no test images"),
        (f"7,{' '.join(['3'] * 2304)},PrivateTest\n", "has a test image of class 7; its 7 count from 0"),
        (f"-1,{' '.join(['3'] * 2304)},PrivateTest\n", "has a test image of class -1"),
    ):
        table.write_text(f"emotion,pixels,Usage\n{rows}")
        with pytest.raises(UserError, match=told):
            opened(tmp_path, "fer2013")
    main = tmp_path / "VOC2007" / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (main / "test.txt").write_text("000001\n")
    for row in ("000002  1", "000001", "000001  2"):
        (main / "cat_test.txt").write_text(f"{row}\n")
        with pytest.raises(UserError, match=f"cat_test.txt has a line '{row}'"):
            opened(tmp_path, "voc2007classification")
    (tmp_path / "mappings").mkdir()
    for folders_, shared, told in (([], {}, "has no tables"), ({}, {}, "objectnet has no test images")):
        (tmp_path / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(folders_))
        (tmp_path / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
        with pytest.raises(UserError, match=told):
            opened(tmp_path, "objectnet")


def test_a_table_may_mix_relative_and_absolute_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "set" / "a.png")
    paint(tmp_path / "b.png", 9)
    write_rows(tmp_path / "set" / "test.csv", [("file", "label"), ("a.png", "ant"), (tmp_path / "b.png", "bee")])
    found = opened("set", "csv").split("test")
    assert reds(found) == [0, 9] and len(found.pictures.content(tmp_path / "cache", 1)) == 64
