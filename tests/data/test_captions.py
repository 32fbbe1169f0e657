import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from data import DataConfig, build_dataset, is_captioned, list_datasets
from data.captions import clean_caption
from utils.config import parse
from utils.errors import UserError

FLICKR8K = Path(__file__).parents[2].parent / "shared/data/flickr8k-mini"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("A dog (small, brown) runs... fast!", "a dog small, brown runs fast"),
        ('  Two  men; one "tall" #1:\n', "two men one tall 1"),
        ("It's a T-shirt? & more~", "it's a t-shirt? & more"),
        ("", ""),
        ("\n", ""),
        ("a\tb \t c", "a\tb c"),  # only runs of two or more are joined
        (" ".join(map(str, range(40))), " ".join(map(str, range(30)))),
    ],
)
def test_caption_rule(text, clean):
    assert clean_caption(text) == clean


def test_caption_length_is_an_argument():
    assert clean_caption("One two three", max_words=2) == "one two"


def test_names():
    captioned = ["coco", "flickr", "flickr30k", "folder", "toy"]
    assert [name for name in list_datasets() if is_captioned(name)] == captioned
    assert not is_captioned("CIFAR10")
    with pytest.raises(UserError, match=r"unknown dataset 'flikr' \(did you mean 'flickr'\?\)"):
        build_dataset(DataConfig(dataset="flikr"), "cpu")


def test_options_reach_the_config():
    cfg, given = parse(DataConfig, "buffer", ["--dataset", "toy", "--image_size", "32", "--no_aug"])
    assert (cfg.dataset, cfg.image_size, cfg.no_aug) == ("toy", 32, True)
    assert given == {"dataset", "image_size", "no_aug"}
    with pytest.raises(UserError, match="at least 8"):
        parse(DataConfig, "buffer", ["--image_size", "4"])


def test_importing_is_cheap():
    code = "import sys, data; print([m for m in ('torchvision', 'PIL', 'data.cache', 'data.toy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_train_split(library):
    train = library.data().train
    assert train.name == "train"
    assert train.paths == library.names["train"]
    assert train.num_images == 12
    assert train.captions[0] == "a nice photo, number 0"
    assert train.captions[13] == "a plain photo, number 1"
    assert train.image_of.tolist() == [*range(12), *range(12)]
    assert train.captions_of == [[i, i + 12] for i in range(12)]


def test_held_out_split_has_five_or_six_captions(library):
    test = library.data().test
    assert [len(ids) for ids in test.captions_of] == [5, 6, 5, 5]
    assert test.image_of.tolist() == [0] * 5 + [1] * 6 + [2] * 5 + [3] * 5
    assert test.captions[10] == "test 1 caption 5"
    assert test.captions_of[1] == list(range(5, 11))


def test_splits_are_read_when_asked_for(library):
    library.file("train").unlink()
    shutil.rmtree(library.images)
    data = library.data()
    with pytest.raises(UserError, match="train annotations"):
        _ = data.train


def test_one_split_needs_no_other(library):
    library.file("train").unlink()
    library.file("val").unlink()
    assert library.data().test.num_images == 4


def test_train_limit_counts_images(library):
    train = library.data(train_limit=3).train
    assert train.num_images == 3
    assert train.captions_of == [[0, 3], [1, 4], [2, 5]]
    assert train.captions[3] == "a plain photo, number 0"
    assert library.data(train_limit=3).test.num_images == 4
    assert library.data(train_limit=99).train.num_images == 12


def test_folder_finds_files_by_their_ending(library):
    library.file("test").rename(library.notes / "my_pets_test.json")
    (library.notes / "latest.json").write_text("[]")  # ends in 'test' too, but not as a word
    assert library.data(dataset="folder").test.num_images == 4
    library.write("test", [])
    with pytest.raises(UserError, match=r"found flickr30k_test\.json, my_pets_test\.json"):
        _ = library.data(dataset="folder").test
    (library.notes / "flickr30k_val.json").unlink()
    with pytest.raises(UserError, match=r"needs one \*_val\.json .* found none"):
        _ = library.data(dataset="folder").val


@pytest.mark.parametrize("layout", ["flickr30k_images/flickr30k_images", "flickr30k_images", "."])
def test_images_are_found_as_archives_unpack(library, layout):
    expected = library.data().test.eval_images(torch.arange(4))
    (library.images / "flickr30k-images").rename(library.root / "aside")
    target = library.images / layout
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(library.root / "aside", target, dirs_exist_ok=True)
    assert torch.equal(library.data().test.eval_images(torch.arange(4)), expected)


def test_fingerprint_follows_the_annotations(library):
    first = library.data()
    assert first.fingerprint("test") == library.data(image_size=32).fingerprint("test")
    assert first.fingerprint("test") != first.fingerprint("val")
    records = library.records("test")
    records[2]["caption"][0] = "another one"
    library.write("test", records)
    assert library.data().fingerprint("test") != first.fingerprint("test")


def test_images_in_two_splits_are_told(library):
    library.write("val", [*library.records("val"), library.records("test")[0]])
    data = library.data()
    _ = data.test
    with pytest.warns(UserWarning, match=r"1 images are in both test and val, such as flickr30k-images/test0\.jpg"):
        _ = data.val


# --- what is wrong with an annotation file, told in one line ---


def wrong(library, split, records, match):
    library.write(split, records)
    with pytest.raises(UserError, match=match) as caught:
        getattr(library.data(), split)
    assert "\n" not in str(caught.value)


def test_not_a_list(library):
    wrong(library, "test", {"images": []}, r"flickr30k_test\.json holds dict, not a list")


def test_empty_list(library):
    wrong(library, "train", [], r"flickr30k_train\.json is an empty list")


def test_truncated_json(library):
    text = library.file("val").read_text()
    library.file("val").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"not valid JSON .* fetch it again"):
        _ = library.data().val


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("train", {"image": None}, "record 2 of .* has the image None"),
        ("train", {"image": ""}, "record 2 of .* has the image ''"),
        ("train", {"image": "../secret.jpg"}, "not below the image folder"),
        ("train", {"image": "a/../../secret.jpg"}, "not below the image folder"),
        ("train", {"image": "/etc/passwd"}, "not below the image folder"),
        ("train", {"image": "nul\0.jpg"}, "not below the image folder"),
        ("train", {"image": "\ud83e.jpg"}, "not below the image folder"),
        ("train", {"caption": "half \ud83e"}, r"the caption 'half \\ud83e'; it must be text"),
        ("test", {"caption": ["half \udcff"]}, r"the caption 'half \\udcff'; it must be text"),
        ("train", {"caption": 5}, "record 2 of .* has the caption 5; it must be text"),
        ("train", {"caption": ["a", "b"]}, "list of captions, as val and test files do"),
        ("train", {"image_id": ["x"]}, r"image_id \['x'\]"),
        (
            "train",
            {"image_id": "id0"},
            "gives image_id 'id0' to flickr30k-images/train1.jpg, an earlier one to .*train0",
        ),
        ("test", {"caption": []}, r"record 2 of .* has no captions \(\[\]\)"),
        ("test", {"caption": None}, r"record 2 of .* has no captions \(None\)"),
        ("test", {"caption": ["fine", 7]}, "record 2 of .* has the caption 7"),
        ("test", {"caption": "just one"}, "single caption, as train files do"),
    ],
)
def test_bad_values_name_the_record(library, split, change, message):
    records = library.records(split)
    records[1] |= change
    wrong(library, split, records, message)


@pytest.mark.parametrize(("split", "key"), [("train", "image"), ("train", "caption"), ("test", "image")])
def test_missing_keys_name_the_record(library, split, key):
    records = library.records(split)
    del records[3][key]
    wrong(library, split, records, f"record 4 of .* has no '{key}'; it has ")


def test_missing_image_id(library):
    records = library.records("train")
    del records[0]["image_id"]
    wrong(library, "train", records, "record 1 of .* has no 'image_id'")


def test_record_that_is_no_object(library):
    wrong(library, "train", ["photo.jpg"], "record 1 of .* is str, not an object")


def test_files_of_the_other_kind(library):
    test, train = library.records("test"), library.records("train")
    wrong(library, "train", test, "a train file has one caption and an image_id")
    wrong(library, "test", train, "a val or test file has a list of them")


def test_missing_folders_and_files_say_where_to_get_them(library):
    with pytest.raises(UserError, match=r"give --ann_root, the folder with flickr30k_train\.json"):
        _ = library.data(ann_root="").train
    with pytest.raises(UserError, match="no annotation folder nowhere; correct --ann_root"):
        _ = library.data(ann_root="nowhere").train
    with pytest.raises(UserError, match=r"fetch https://storage.googleapis.com/.*/coco_karpathy_val.json into "):
        _ = library.data(dataset="coco").val
    with pytest.raises(UserError, match=r"give --image_root, .*train0\.jpg; the images are at https://www.kaggle.com"):
        _ = library.data(image_root="").train
    with pytest.raises(UserError, match="no image folder nowhere; correct --image_root"):
        _ = library.data(image_root="nowhere").train


def test_missing_images_are_counted(library):
    for name in library.names["train"][3:6]:
        (library.images / name).unlink()
    (library.images / library.names["train"][4]).mkdir()  # a folder is no image
    with pytest.raises(
        UserError, match=r"3 of 12 images named in .*_train\.json are missing, the first is .*train3\.jpg"
    ):
        _ = library.data().train


# --- a real data set, where it is at hand ---


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="the Flickr8k sample is not here")
def test_flickr8k(tmp_path):
    records = json.loads((FLICKR8K / "flickr30k_test.json").read_text())
    wanted = {record["image"] for record in records}
    with tarfile.open(FLICKR8K / "images.tar") as archive:
        for member in archive:
            if member.name in wanted:
                archive.extract(member, tmp_path, filter="data")
    cfg = DataConfig(image_root=str(tmp_path), ann_root=str(FLICKR8K), image_size=64, cache_dir=str(tmp_path / "cache"))
    test = build_dataset(cfg, "cpu").test
    assert (test.num_images, len(test.captions)) == (1000, 5000)
    assert test.captions[0] == "a blond woman in a blue shirt appears to wait for a ride"
    images = test.eval_images(torch.arange(1000))
    assert images.shape == (1000, 3, 64, 64)
    # Photographs, normalised by statistics of photographs.
    assert abs(float(images.mean())) < 0.2
    assert 0.8 < float(images.std()) < 1.2
