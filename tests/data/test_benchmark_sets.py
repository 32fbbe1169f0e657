"""The published layouts of labelled data sets, in small."""

import json
import pickle

import numpy as np
import pytest

from data.benchmarks import BenchmarkConfig, open_benchmark
from data.class_names import CIFAR
from data.subsets import wordnet_names
from tests.data.labelled_world import folders, opened, paint, reds, write_rows
from utils.errors import UserError


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


def test_drawn_splits_are_as_large_as_published(tmp_path):
    for number in range(702):
        paint(tmp_path / "NWPU-RESISC45" / "airport" / f"{number:03}.png", number % 256, (1 + number // 256, 1))
    found = opened(tmp_path, "resisc45-clip")
    names = {split: {file.name for file in found.split(split).pictures.files} for split in ("train", "val", "test")}
    assert {split: len(own) for split, own in names.items()} == {"train": 70, "val": 70, "test": 560}
    assert len(set().union(*names.values())) == 700


def test_pets_train_on_trainval(tmp_path):
    place = tmp_path / "oxford-iiit-pet"
    for split, names in (("trainval", ("Abyssinian_1", "boxer_1")), ("test", ("Abyssinian_2", "boxer_2"))):
        (place / "annotations").mkdir(parents=True, exist_ok=True)
        rows = [f"{name} {1 + number} 1 1\n" for number, name in enumerate(names)]
        (place / "annotations" / f"{split}.txt").write_text("".join(rows))
        for number, name in enumerate(names):
            paint(place / "images" / f"{name}.jpg", number)
    found = opened(tmp_path, "oxford-iiit-pets")
    assert found.classes == ("Abyssinian", "Boxer") and found.metric == "mean-per-class"
    assert [file.stem for file in found.split("train").pictures.files] == ["Abyssinian_1", "boxer_1"]


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
    assert not any("are taken" in note for note in found.notes)


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


def test_tables_that_are_not_the_publishers(tmp_path):
    table = tmp_path / "fer2013.csv"
    for rows, told in (
        ("", "fer2013 has no test images of any class"),
        ("1,1 2 3,PrivateTest\n", "is not FER-2013's table"),
        (f"1,{' '.join(['300'] * 2304)},PrivateTest\n", "is not FER-2013's table"),
        (f"1,{' '.join(['3'] * 1152)},PrivateTest\n" * 2, "is not FER-2013's table"),
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


def patches(folder, name, x=None, y=None):
    """One split of Patch-Camelyon."""
    h5py = pytest.importorskip("h5py")
    place = folder / "patch-camelyon"
    place.mkdir(exist_ok=True)
    for part, values in (("x", x), ("y", y)):
        with h5py.File(place / f"camelyonpatch_level_2_split_{name}_{part}.h5", "w") as file:
            if values is not None:
                file.create_dataset(part, data=values, compression="gzip")
    return place


def test_patch_camelyon(tmp_path):
    tissue = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * np.full((1, 96, 96, 3), 100, np.uint8)
    for name in ("train", "valid", "test"):
        patches(tmp_path, name, tissue, np.array([0, 1, 1], np.uint8).reshape(3, 1, 1, 1))
    found = opened(tmp_path, "patchcamelyon")
    assert found.split("test").labels.tolist() == [0, 1, 1] and reds(found.split("val")) == [0, 100, 200]


def test_patch_camelyon_from_a_stranger(tmp_path):
    """What an HDF5 file may say: that its content lies elsewhere, that it is huge, that it is something else."""
    h5py = pytest.importorskip("h5py")
    tissue, labels = np.zeros((2, 96, 96, 3), np.uint8), np.zeros((2, 1, 1, 1), np.uint8)
    place = patches(tmp_path, "test", tissue, labels)
    images, classes = (place / f"camelyonpatch_level_2_split_test_{part}.h5" for part in "xy")
    (tmp_path / "secret").write_bytes(bytes(tissue.size))

    def elsewhere(file):
        file["x"] = h5py.ExternalLink(tmp_path / "other.h5", "/x")

    def outside(file):
        file.create_dataset("x", tissue.shape, np.uint8, external=[(tmp_path / "secret", 0, tissue.size)])

    def pieced(file):
        layout = h5py.VirtualLayout(tissue.shape, np.uint8)
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "x", tissue.shape)
        file.create_virtual_dataset("x", layout)

    def huge(file):
        file.create_dataset("x", (1 << 40, 96, 96, 3), np.uint8, chunks=(1, 96, 96, 3))

    def wide(file):
        file["x"] = np.zeros((2, 32, 32, 3), np.uint8)

    def group(file):
        file.create_group("x/x")

    for write, why in (
        (elsewhere, "x is missing, or a link"),
        (outside, "x lies in other files"),
        (pieced, "x lies in other files"),
        (huge, "not uint8 of at most"),
        (wide, "not uint8 of at most"),
        (group, "no attribute"),
        (lambda _: None, "x is missing, or a link"),
    ):
        with h5py.File(images, "w") as file:
            write(file)
        with pytest.raises(UserError, match=f"split_test_x.h5 is no file of Patch-Camelyon .*{why}"):
            opened(tmp_path, "patchcamelyon").split("test")
    patches(tmp_path, "test", tissue[:1], labels)
    with pytest.raises(UserError, match=r"has 2 labels, camelyonpatch_level_2_split_test_x\.h5 1 images"):
        opened(tmp_path, "patchcamelyon").split("test")
    classes.write_bytes(classes.read_bytes()[:1000])
    with pytest.raises(UserError, match="is no file of Patch-Camelyon"):
        opened(tmp_path, "patchcamelyon").split("test")
