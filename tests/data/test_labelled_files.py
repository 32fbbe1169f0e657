"""Labelled photographs in folders: the layouts that are read, the cache, and what is said of folders that are wrong."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import ImagesConfig, build_images, cache
from data.sources import IMAGENET_STATS
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


def squashed(path, size):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))


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
