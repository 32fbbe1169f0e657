"""Labelled photographs in folders: the layouts that are read, the cache, and what is said of folders that are wrong."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import ImagesConfig, build_images, cache, published_name
from data.photographs import IMAGENET_STATS
from data.subsets import SUBSETS, subset_classes, wordnet_names
from utils.errors import UserError

IMAGENETTE_MINI = Path(__file__).parents[2].parent / "shared/data/imagenette-mini/images.tar"
WNIDS = ("n01443537", "n01629819", "n02056570")


def everything(split):
    return split.images(torch.arange(len(split)))


def photograph(path, seed, extent=(20, 14)):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(extent, Image.Resampling.BICUBIC).save(path)


def squashed(path, size, way=Image.Resampling.BICUBIC):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB").resize((size, size), way)))


@pytest.fixture
def tree(tmp_path):
    """train and val with classes ant, bee and cat: 6 and 2 photographs each, of several formats."""
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("bee", "cat", "ant")):
            for number in range(count):
                suffix = ("jpg", "PNG", "JPEG")[number % 3]
                extent = (20, 14) if number % 2 else (15, 24)
                photograph(tmp_path / "set" / split / name / f"{number}.{suffix}", 100 * label + number, extent)
    return tmp_path / "set"


@pytest.fixture
def build(tmp_path):
    def build(dataset, root, **options):
        values = {"cache_dir": str(tmp_path / "cache"), "workers": 2, "res": 8, "holdout": 0} | options
        return build_images(ImagesConfig(dataset=dataset, data_path=str(root), **values), "cpu")

    return build


# --- any folder ---


def test_folder(build, tree):
    data = build("folder", tree)
    assert data.classes == ("ant", "bee", "cat") and (data.channels, data.size) == (3, 8)
    assert (data.mean, data.std) == IMAGENET_STATS
    assert data["train"].labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert data["test"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    files = sorted((tree / "train" / "bee").iterdir())
    known = torch.stack([squashed(file, 8) for file in files]).permute(0, 3, 1, 2)
    assert torch.equal(data.pictures(data["train"].images(data["train"].indices_of(1))), known)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET_STATS)
    expected = (known / 255 - mean) / std
    torch.testing.assert_close(everything(data["train"])[6:12], expected, rtol=0, atol=1e-5)
    assert build("folder", tree, res=0).size == 128


def test_the_test_folder_comes_first(build, tree):
    shutil.copytree(tree / "val", tree / "test")
    (tree / "test" / "ant" / "0.jpg").unlink()
    assert len(build("folder", tree)["test"]) == 5


def test_deeper_hidden_and_other_files(build, tree):
    photograph(tree / "train" / "ant" / "more" / "deep.webp", 5)
    photograph(tree / "train" / "ant" / ".hidden.jpg", 6)
    photograph(tree / "train" / ".trash" / "0.jpg", 7)
    (tree / "train" / "ant" / "notes.txt").write_text("no image")
    data = build("folder", tree)
    assert data["train"].labels.bincount().tolist() == [7, 6, 6]


def test_crop_takes_the_middle(build, tree):
    data = build("folder", tree, fit="crop")
    (tall, wide) = (data.pictures(data["train"].images(torch.tensor([place])))[0] for place in (0, 1))
    for picture, name, box in ((tall, "0.jpg", (0, 4.5, 15, 19.5)), (wide, "1.PNG", (3, 0, 17, 14))):
        image = Image.open(tree / "train" / "ant" / name).convert("RGB")
        known = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC, box))
        assert np.array_equal(picture.permute(1, 2, 0).numpy(), known)
    assert data.fingerprint() != build("folder", tree).fingerprint()
    assert everything(data["train"]).shape == (18, 3, 8, 8)


def test_holdout_and_limit(build, tree):
    data = build("folder", tree, holdout=0.34, train_limit=3)
    assert data["train"].labels.bincount().tolist() == [3] * 3
    assert data["val"].labels.bincount().tolist() == [2] * 3
    everything(data["train"]), everything(data["val"])
    shown = [set(map(bytes, data.pictures(everything(data[split])).contiguous().numpy())) for split in ("train", "val")]
    assert not shown[0] & shown[1]


def test_images_are_decoded_once_and_only_if_asked_for(build, tree, monkeypatch, tmp_path):
    names = []
    original = cache.decode
    monkeypatch.setattr(cache, "decode", lambda file, *rest: names.append(file) or original(file, *rest))
    data = build("folder", tree)
    assert not names
    first = everything(data["train"])
    assert len(names) == 18 and len(list((tmp_path / "cache" / "images").glob("*.images"))) == 1
    assert torch.equal(everything(build("folder", tree)["train"]), first)
    assert len(names) == 18
    for number in range(6, 30):
        photograph(tree / "train" / "ant" / f"{number}.jpg", number)
    names.clear()
    larger = build("folder", tree)
    larger["train"].images(torch.tensor([3]))  # up to 1/20 is decoded as asked
    assert len(names) == 1
    larger["train"].images(torch.arange(10))
    assert len(names) == 1 + 42


def test_fingerprint_goes_with_the_content(build, tree, tmp_path):
    first = build("folder", tree).fingerprint()
    shutil.copytree(tree, tmp_path / "moved")
    assert build("folder", tmp_path / "moved").fingerprint() == first
    shutil.rmtree(tmp_path / "moved" / "val" / "ant")
    photograph(tmp_path / "moved" / "val" / "ant" / "other.jpg", 99)
    assert build("folder", tmp_path / "moved").fingerprint() == first  # no test image is trained on
    photograph(tmp_path / "moved" / "train" / "ant" / "0.jpg", 99)
    assert build("folder", tmp_path / "moved").fingerprint() != first
    assert build("folder", tree, res=9).fingerprint() != first


def test_whitened_photographs(build, tree):
    data = build("folder", tree, zca=True)
    plain = build("folder", tree)
    for split in ("train", "test"):
        assert torch.equal(data.pictures(everything(data[split])), plain.pictures(everything(plain[split])))


def test_wrong_folders(build, tree, tmp_path):
    with pytest.raises(UserError, match="no folder of images; give --data_path"):
        build("folder", "")
    with pytest.raises(UserError, match=r"no folder .*nowhere; correct --data_path"):
        build("folder", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no test images in .*val: it needs a folder test \(or val\)"):
        build("folder", tree / "val")
    shutil.rmtree(tree / "val" / "cat")
    with pytest.raises(UserError, match=r"classes of .*val do not fit: it lacks 'cat'; training and test"):
        build("folder", tree)
    photograph(tree / "val" / "dog" / "0.jpg", 0)
    with pytest.raises(UserError, match="it lacks 'cat' and has an unknown 'dog'"):
        build("folder", tree)
    shutil.rmtree(tree / "train")
    with pytest.raises(UserError, match=r"no folder .*train; it must hold a folder of images for each class"):
        build("folder", tree)
    (tree / "train").mkdir()
    with pytest.raises(UserError, match="train has no folders"):
        build("folder", tree)


def test_empty_class_folder(build, tree):
    for file in (tree / "train" / "bee").iterdir():
        file.unlink()
    (tree / "train" / "bee" / "notes.txt").write_text("gone")
    with pytest.raises(UserError, match=r"class folder .*train/bee holds no images \(\.bmp, .*\); fill or remove it"):
        build("folder", tree)


def test_undecodable_image(build, tree):
    (tree / "train" / "bee" / "1.PNG").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    data = build("folder", tree)
    with pytest.raises(UserError, match=r"image .*bee/1\.PNG cannot be decoded .*; fetch it again or drop it from "):
        everything(data["train"])
    everything(data["test"])


def test_broken_link(build, tree):
    (tree / "train" / "bee" / "9.jpg").symlink_to(tree / "gone.jpg")
    data = build("folder", tree)
    with pytest.raises(UserError, match=r"1 of 18 images .* are missing, .*bee/9\.jpg; .* correct --data_path"):
        (tree / "train" / "bee" / "0.jpg").unlink()
        everything(build("folder", tree)["train"])
    assert len(data.classes) == 3


# --- Tiny ImageNet ---


@pytest.fixture
def tiny(tmp_path):
    """The archive's layout with three classes: 3 training and 2 test images each, the latter flat."""
    root = tmp_path / "tiny-imagenet-200"
    for label, wnid in enumerate(WNIDS):
        for number in range(3):
            photograph(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", 10 * label + number, (64, 64))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("0 0 1 1")
    lines = []
    for number, wnid in enumerate((*WNIDS, *reversed(WNIDS))):
        photograph(root / "val" / "images" / f"val_{number}.JPEG", 50 + number, (64, 64))
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    words = {"n01443537": "goldfish, Carassius auratus", "n02056570": "king penguin", "n09999999": "nothing"}
    (root / "words.txt").write_text("".join(f"{wnid}\t{name}\n" for wnid, name in words.items()))
    return root


def resort(root, target):
    """Moves flat test images into folders of classes; `target` is where these are."""
    flat = root / "val" / "images"
    moves = [line.split("\t")[:2] for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
    for name, wnid in moves:
        (target / wnid).mkdir(parents=True, exist_ok=True)
        (flat / name).rename(target / wnid / name)


def test_tiny_as_the_archive_unpacks(build, tiny):
    data = build("Tiny", tiny, res=0)
    assert (data.name, data.size, data.mean) == ("Tiny", 64, IMAGENET_STATS[0])
    assert data.classes == ("goldfish", "n01629819", "king penguin")
    assert data["train"].labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data["test"].labels.tolist() == [0, 1, 2, 2, 1, 0]
    known = torch.from_numpy(np.array(Image.open(tiny / "val" / "images" / "val_3.JPEG"))).permute(2, 0, 1)
    assert torch.equal(data.pictures(data["test"].images(torch.tensor([3])))[0], known)
    assert build("Tiny", tiny.parent).fingerprint() == build("Tiny", tiny).fingerprint()  # the folder above will do


def test_tiny_as_podd_sorts_it(build, tiny, tmp_path):
    """val/<wnid>/images/, with boxes beside, and no flat folder; the published spelling of its name."""
    resort(tiny, tiny / "sorted")
    shutil.rmtree(tiny / "val")
    for wnid in WNIDS:
        (tiny / "val" / wnid).mkdir(parents=True)
        (tiny / "sorted" / wnid).rename(tiny / "val" / wnid / "images")
        (tiny / "val" / wnid / f"{wnid}_boxes.txt").write_text("0 0 1 1")
    data = build("tiny-imagenet-200", tiny.parent)
    assert data.name == published_name("Tiny-ImageNet-200") == published_name("tiny") == "Tiny"
    assert data["test"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.fingerprint() == build("Tiny", tiny).fingerprint()
    (tmp_path / "all" / "tiny-imagenet-200").mkdir(parents=True)
    tiny.rename(tmp_path / "all" / "tiny-imagenet-200" / "tiny-imagenet-200")
    assert build("Tiny", tmp_path / "all").fingerprint() == data.fingerprint()


@pytest.mark.parametrize("place", ["val/images", "val"])
@pytest.mark.parametrize("emptied", [True, False])
def test_tiny_with_test_images_in_folders(build, tiny, place, emptied):
    resort(tiny, tiny / place)
    if place == "val" and emptied:
        (tiny / "val" / "images").rmdir()
        (tiny / "val" / "val_annotations.txt").unlink()
    elif place == "val":
        (tiny / "val" / "val_annotations.txt").unlink()
    data = build("Tiny", tiny)
    assert data["test"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    known = squashed(tiny / place / WNIDS[1] / "val_1.JPEG", 8).permute(2, 0, 1)
    assert torch.equal(data.pictures(data["test"].images(torch.tensor([2])))[0], known)


def test_tiny_without_words_and_with_loose_training_images(build, tiny):
    (tiny / "words.txt").unlink()
    (tiny / "wnids.txt").unlink()
    for wnid in WNIDS:
        for file in (tiny / "train" / wnid / "images").iterdir():
            file.rename(tiny / "train" / wnid / file.name)
        (tiny / "train" / wnid / "images").rmdir()
    data = build("Tiny", tiny)
    assert data.classes == WNIDS and len(data["train"]) == 9


def test_tiny_that_is_wrong(build, tiny):
    notes = tiny / "val" / "val_annotations.txt"
    text = notes.read_text()
    for line, shown in {
        "val_6.JPEG\tn00000001\t0": "val_6.JPEG",
        "no tab": "no tab",
        "../a.JPEG\tn01443537": r"\.\./a",
    }.items():
        notes.write_text(text + line + "\n")
        with pytest.raises(UserError, match=f"line 7 of .*val_annotations.txt is '{shown}.*a file, a tab and a class"):
            build("Tiny", tiny)
    notes.write_bytes(text.encode() + b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"line 7 of .*a file, a tab and a class"):
        build("Tiny", tiny)
    notes.write_text("")
    with pytest.raises(UserError, match=r"val_annotations\.txt is empty"):
        build("Tiny", tiny)
    notes.write_text(text)
    (tiny / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(UserError, match=r"1 of 6 images .* missing, the first is .*val_2\.JPEG"):
        everything(build("Tiny", tiny)["test"])
    shutil.rmtree(tiny / "train" / WNIDS[0])
    with pytest.raises(UserError, match=f"classes of .*train do not fit: it lacks '{WNIDS[0]}'"):
        build("Tiny", tiny)


# --- CUB-200-2011 ---

BIRDS = ("001.Laysan_Albatross", "002.Heermann_Gull", "003.Green_tailed_Towhee")


@pytest.fixture
def cub(tmp_path):
    """The archive's layout with three classes, 4 images each, every third a test image; numbers are not in order."""
    root = tmp_path / "CUB_200_2011"
    tables = {"images": [], "image_class_labels": [], "train_test_split": []}
    for number in range(12):
        image, label = number + 5, number % 3
        path = f"{BIRDS[label]}/{BIRDS[label][4:]}_{number:04}.jpg"
        photograph(root / "images" / path, number, (30 + number, 50))
        for name, value in zip(tables, (path, label + 1, int(number % 4 != 0)), strict=True):
            tables[name].insert(number // 2, f"{image} {value}")
    for name, lines in tables.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("name", ["cub-200", "CUB", "cub200"])
def test_cub_as_the_archive_unpacks(build, cub, name):
    data = build(name, cub.parent, res=0)
    assert (data.name, data.size, data.mean) == ("CUB200", 32, IMAGENET_STATS[0])
    assert data.name == published_name(name)
    assert data.classes == ("Laysan_Albatross", "Heermann_Gull", "Green_tailed_Towhee")
    assert len(data["train"]) == 9 and sorted(data["test"].labels.tolist()) == [0, 1, 2]
    for split in ("train", "test"):
        wanted = [line.split()[1] for line in (cub / "images.txt").read_text().splitlines()]
        kept = [path for path in wanted if (int(path[-8:-4]) % 4 != 0) == (split == "train")]
        known = [squashed(cub / "images" / path, 32, Image.Resampling.BILINEAR).permute(2, 0, 1) for path in kept]
        assert torch.equal(data.pictures(everything(data[split])), torch.stack(known))
        assert data[split].labels.tolist() == [int(path[:3]) - 1 for path in kept]
    (cub.parent / "all" / "CUB200").mkdir(parents=True)
    cub.rename(cub.parent / "all" / "CUB200" / "CUB_200_2011")
    assert build(name, cub.parent / "all", res=0).fingerprint() == data.fingerprint()


def test_cub_in_folders(build, cub):
    for split in ("train", "test"):
        for number, bird in enumerate(BIRDS):
            photograph(cub.parent / "sorted" / split / bird / "a.jpg", number, (20, 30))
    data = build("CUB200", cub.parent / "sorted")
    assert data.classes == ("Laysan_Albatross", "Heermann_Gull", "Green_tailed_Towhee") and data.size == 8
    known = squashed(cub.parent / "sorted" / "test" / BIRDS[1] / "a.jpg", 8, Image.Resampling.BILINEAR)
    assert torch.equal(data.pictures(data["test"].images(torch.tensor([1])))[0], known.permute(2, 0, 1))
    middle = build("CUB200", cub.parent / "sorted", fit="crop")
    assert not torch.equal(everything(middle["test"]), everything(data["test"]))
    assert build("cub", cub.parent / "sorted").fingerprint() == data.fingerprint()
    assert build("folder", cub.parent / "sorted").fingerprint() != data.fingerprint()  # another filter


@pytest.mark.parametrize(
    ("table", "number", "line", "says"),
    [
        ("images", 2, "7", "line 2 of .*images.txt is '7'; it needs an image's number and a path such as 001.Black"),
        ("images", 2, "9 a b.jpg", "line 2 of .*images.txt is '9 a b.jpg'; it needs"),
        ("images", 13, "5 001.Laysan_Albatross/a.jpg", "line 13 of .*images.txt is .*; that image came before"),
        (
            "images",
            13,
            "99 001.Laysan_Albatross/a.jpg",
            "line 13 of .*images.txt has image 99, which image_class_labels",
        ),
        ("images", 1, None, "line 1 of .*image_class_labels.txt has image .*, which images.txt lacks"),
        ("image_class_labels", 3, None, "line 3 of .*images.txt has image .*, which image_class_labels.txt lacks"),
        ("train_test_split", 3, None, "line 3 of .*images.txt has image .*, which train_test_split.txt lacks"),
        ("train_test_split", 13, "77 1", "line 13 of .*train_test_split.txt has image 77, which images.txt lacks"),
        ("image_class_labels", 1, "{} 4", "line 1 of .*image_class_labels.txt has class 4 for image .* is in 00"),
        ("image_class_labels", 1, "{} x", "line 1 of .*image_class_labels.txt has class x for image"),
        ("train_test_split", 1, "{} yes", "line 1 of .*train_test_split.txt has yes for image .*, neither 1 nor 0"),
        ("images", 1, "{} Laysan_Albatross/a.jpg", "line 1 of .*images.txt has 'Lay.*', not <number>.<class>/<file>;"),
        ("images", 1, "{} 001.a/../b.jpg", "line 1 of .*images.txt has '001.a/../b.jpg', not <number>"),
        ("images", 1, "{} 000.None/b.jpg", "line 1 of .*images.txt has '000.None/b.jpg', not <number>"),
        ("images", 12, "{} 001.Other/b.jpg", "line 12 of .*images.txt has '001.Other.*class 1 is 001.Laysan"),
    ],
)
def test_tables_of_cub_that_are_damaged(build, cub, table, number, line, says):
    file = cub / f"{table}.txt"
    lines = file.read_text().splitlines()
    change = [] if line is None else [line.format(lines[min(number, 12) - 1].split()[0])]
    file.write_text("\n".join([*lines[: number - 1], *change, *lines[number:]]))
    with pytest.raises(UserError, match=says) as error:
        build("CUB200", cub)
    assert "\n" not in str(error.value)


def test_cub_that_is_wrong(build, cub, tmp_path):
    with pytest.raises(UserError, match=r"no CUB200 in .*images \(looked for images.txt and train/<class>"):
        build("cub-200", cub / "images")
    with pytest.raises(UserError, match="no folder of images; give --data_path, where CUB_200_2011 of CUB200 is"):
        build("cub-200", "")
    next((cub / "images" / BIRDS[1]).iterdir()).unlink()
    with pytest.raises(UserError, match=r"1 of \d+ images named in .*images.txt are missing, .* correct --data_path"):
        data = build("cub-200", cub)
        everything(data["train"]), everything(data["test"])
    split = cub / "train_test_split.txt"
    text = split.read_text()
    split.write_text(text.replace(" 0\n", " 1\n"))
    with pytest.raises(UserError, match=r"train_test_split.txt has no test image"):
        build("cub-200", cub)
    split.write_text("\n")
    with pytest.raises(UserError, match=r"train_test_split.txt is empty"):
        build("cub-200", cub)
    split.unlink()
    with pytest.raises(UserError, match=r"no .*train_test_split.txt; unpack the archive again"):
        build("cub-200", cub)
    split.write_text(text)
    for name in ("images", "image_class_labels"):
        file = cub / f"{name}.txt"
        file.write_text(file.read_text().replace(" 002.", " 004.").replace(" 2\n", " 4\n"))
    with pytest.raises(UserError, match=r"image_class_labels.txt has no image of class 2, but one of class 4"):
        build("cub-200", cub)


# --- ImageNet and its subsets ---


def test_the_six_subsets():
    """Ids, sizes and names are those that the papers used; names agree with WordNet's."""
    assert list(SUBSETS) == ["imagenette", "imagewoof", "imagemeow", "imagesquawk", "imagefruit", "imageyellow"]
    wnids, names = wordnet_names()
    assert len(wnids) == 1000 and list(wnids) == sorted(wnids)
    assert [wnids[number] for number in (0, 217, 482)] == ["n01440764", "n02102040", "n02979186"]
    for name, classes in SUBSETS.items():
        assert len(classes) == 10, name
        for number, ours in classes.items():
            theirs = names[number].lower()
            aliases = {"corn": {"corn", "ear"}, "green apple": {"granny smith"}, "egyptian": {"egyptian cat"}}
            short = ours.lower()
            assert short in theirs or theirs in short or theirs in aliases.get(short, ()), (name, ours, theirs)
    assert subset_classes("imagenette")[0] == (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    assert subset_classes("imagewoof")[0] == (193, 182, 258, 162, 155, 167, 159, 273, 207, 229)
    assert subset_classes("imagemeow")[0] == (281, 282, 283, 284, 285, 291, 292, 290, 289, 287)
    assert subset_classes("imagesquawk")[0] == (84, 130, 88, 144, 145, 22, 96, 9, 100, 89)
    assert subset_classes("imagefruit")[0] == (953, 954, 949, 950, 951, 957, 952, 945, 943, 948)
    assert subset_classes("imageyellow")[0] == (309, 986, 954, 951, 987, 779, 599, 291, 72, 11)
    assert len(set(subset_classes("all")[0])) == 1000


def imagenet(root, numbers, wnids=None):
    """One training and one test image for each class id; the image of class n is drawn by seed n."""
    wnids = wnids or wordnet_names()[0]
    for number in numbers:
        for split in ("train", "val"):
            photograph(root / split / wnids[number] / "0.JPEG", number)


def test_a_subset_in_a_folder_of_its_own(build, tmp_path):
    imagenet(tmp_path / "nett", [*SUBSETS["imagewoof"], 5])
    data = build("ImageNet", tmp_path / "nett", subset="imagewoof")
    assert data.name == "ImageNet" and data.classes[0] == "Australian terrier"
    for label, number in enumerate(SUBSETS["imagewoof"]):  # labels are places in the list, not the order of folders
        photograph(tmp_path / "known.JPEG", number)
        known = squashed(tmp_path / "known.JPEG", 8).permute(2, 0, 1)
        for split in ("train", "test"):
            assert data[split].labels.tolist() == list(range(10))
            assert torch.equal(data.pictures(data[split].images(torch.tensor([label])))[0], known)
    assert build("imagenet", tmp_path / "nett", subset="imagewoof", res=0).size == 128


def test_folders_by_other_names_are_counted(build, tmp_path):
    names = [f"class{number:04}" for number in range(1000)]
    for split in ("train", "val"):
        for name in names:
            (tmp_path / "other" / split / name).mkdir(parents=True)
    imagenet(tmp_path / "other", SUBSETS["imagefruit"], names)
    data = build("ImageNet", tmp_path / "other", subset="imagefruit")
    photograph(tmp_path / "known.JPEG", 953)
    known = squashed(tmp_path / "known.JPEG", 8).permute(2, 0, 1)
    assert torch.equal(data.pictures(data["test"].images(torch.tensor([0])))[0], known)
    with pytest.raises(UserError, match=r"class folder .*class0000 holds no images"):
        build("ImageNet", tmp_path / "other", subset="imagenette")


def test_classes_that_are_not_there(build, tmp_path):
    imagenet(tmp_path / "nett", list(SUBSETS["imagenette"])[:9])
    with pytest.raises(UserError, match=r"1 of the 10 classes of imagenette .*train, such as n03888257 \(parachute\);"):
        build("ImageNet", tmp_path / "nett")
    with pytest.raises(UserError, match="991 of the 1000 classes of all are not in "):
        build("ImageNet", tmp_path / "nett", subset="all")
    photograph(tmp_path / "nett" / "train" / "n03888257" / "0.JPEG", 0)
    with pytest.raises(UserError, match=r"1 of the 10 classes of imagenette are not in .*val, such as n03888257"):
        build("ImageNet", tmp_path / "nett")


def test_own_subsets(build, tmp_path):
    imagenet(tmp_path / "nett", (701, 3, 0))
    file = tmp_path / "mine.yaml"
    file.write_text("mine: [701, 3]\nother: [0]\n")
    data = build("ImageNet", tmp_path / "nett", subset="mine", subsets=str(file))
    assert data.classes == ("parachute", "tiger shark")
    assert build("ImageNet", tmp_path / "nett", subset="other", subsets=str(file)).classes == ("tench",)
    with pytest.raises(UserError, match=r"unknown subset 'min' \(did you mean 'mine'\?\); known: .*mine, other, all$"):
        build("ImageNet", tmp_path / "nett", subset="min", subsets=str(file))


def test_unknown_subset(build, tmp_path):
    with pytest.raises(UserError, match=r"'imagenete' \(did you mean 'imagenette'\?\).*--subsets FILE\.yaml adds"):
        build("ImageNet", tmp_path, subset="imagenete")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine: [0, 1000]", "'mine' is .*different class ids from 0 to 999"),
        ("mine: [-1]", "different class ids"),
        ("mine: [1, 1]", "different class ids"),
        ("mine: []", "different class ids"),
        ("mine: 5", "different class ids"),
        ("mine: [true]", "different class ids"),
        ("mine: [n01440764]", "different class ids"),
        ("imagenette: [1, 2]", "'imagenette' is a published subset; give yours another name"),
        ("[1, 2]", "needs lines such as"),
        ("", "needs lines such as"),
        ("a: [1", "is not valid YAML"),
    ],
)
def test_subset_files_that_are_wrong(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        subset_classes("mine", str(tmp_path / "mine.yaml"))


def test_no_subset_file(tmp_path):
    with pytest.raises(UserError, match="no subsets file none; correct --subsets"):
        subset_classes("mine", "none")
    with pytest.raises(UserError, match="is a folder"):
        subset_classes("mine", str(tmp_path))


# --- a real data set, where it is at hand ---


@pytest.mark.skipif(not IMAGENETTE_MINI.is_file(), reason="the Imagenette sample is not here")
def test_imagenette_mini(build, tmp_path):
    with tarfile.open(IMAGENETTE_MINI) as archive:
        archive.extractall(tmp_path / "mini", filter="data")
    data = build("ImageNet", tmp_path / "mini", res=32, holdout=0.1)
    assert data.classes[:2] == ("tench", "English springer")
    assert (len(data["train"]), len(data["val"]), len(data["test"])) == (630, 70, 250)
    images = everything(data["test"])
    assert abs(float(images.mean())) < 0.3 and 0.8 < float(images.std()) < 1.3
    folder = build("folder", tmp_path / "mini", res=32, holdout=0.1)
    assert folder.classes[0] == "n01440764" and len(folder["train"]) == 630
