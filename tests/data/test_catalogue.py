"""Classes by folder name: lists, orders, spellings, files, sets that are no files, and what is said of wrong ones."""

import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import cache
from data.catalogue import SPECS, CatalogueConfig, build_catalogue, read_label_file
from data.class_names import CIFAR, cifar_class
from data.metadata import read_metadata
from data.subsets import subset_classes, wordnet_names
from data.toy import COLOURS, SHAPES, WORDS
from utils.config import idle_options, parse
from utils.errors import UserError

IMAGENETTE_MINI = Path(__file__).parents[2].parent / "shared/data/imagenette-mini/images.tar"
# fmt: off
NETTE = [
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079",
    "n03394916", "n03417042", "n03425413", "n03445777", "n03888257",
]
# Protocol A's order, which is not that of the names.
WOOF = [
    "n02096294", "n02093754", "n02111889", "n02088364", "n02086240",
    "n02089973", "n02087394", "n02115641", "n02099601", "n02105641",
]
IDC = [
    "n02869837", "n01749939", "n02488291", "n02107142", "n13037406",
    "n02091831", "n04517823", "n04589890", "n03062245", "n01773797",
]
# fmt: on
# The 24 classes of CIFAR-100 that its list of super-classes spells unlike its files do.
PLURALS = ("orchid", "rose", "sunflower", "tulip", "bottle", "bowl", "can", "cup", "plate", "apple", "mushroom")
RESPELT = {
    **{name: f"{name}s" for name in (*PLURALS, "orange", "pear")},
    **{f"{name}_tree": name for name in ("maple", "oak", "palm", "pine", "willow")},
    "poppy": "poppies",
    "aquarium_fish": "aquarium fish",
    "sweet_pepper": "sweet peppers",
    "keyboard": "computer keyboard",
    "pickup_truck": "pickup truck",
    "lawn_mower": "lawn-mower",
}


def plant(root, idents, train=2, val=1):
    """Folders of so-called images, none of which is ever decoded; their bytes tell which they are."""
    for part, count in (("train", train), ("val", val)):
        for ident in idents:
            for number in range(count):
                path = root / part / ident / f"{ident}_{number}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{part} {ident} {number}")
    return root


@pytest.fixture
def build(tmp_path):
    def build(root="", **options):
        values = {"cache_dir": str(tmp_path / "cache"), "workers": 1, "data_path": str(root)} | options
        return build_catalogue(CatalogueConfig(**values))

    return build


@pytest.fixture
def refused(build):
    """refused(...) is the one line about a catalogue that cannot be."""

    def refused(root="", **options):
        with pytest.raises(UserError) as caught:
            build(root, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


@pytest.fixture
def nette(tmp_path):
    return plant(tmp_path / "nette", NETTE)


@pytest.fixture
def labels(tmp_path):
    """labels(text) is the path of a label file."""

    def write(text):
        path = tmp_path / "labels.txt"
        path.write_bytes(text.encode())
        return str(path)

    return write


def idents(catalogue):
    return [kind.ident for kind in catalogue.kinds]


# --- ImageNet ---


def test_imagenet_subset(build, nette):
    (nette / "train" / "metadata.jsonl").write_text("{}")  # a stray file
    plant(nette, ["n99999999", "my_own"])
    found = build(nette, spec="nette")
    assert (found.name, found.dataset, found.root, found.train_root) == ("nette", "imagenet", nette, nette / "train")
    assert idents(found) == NETTE
    assert found.kinds[0].label == "tench, Tinca tinca"
    assert found.kinds[7].label == "gas pump, gasoline pump, petrol pump, island dispenser"
    assert found.train[7] == ("n03425413/n03425413_0.JPEG", "n03425413/n03425413_1.JPEG")
    assert found.train_paths(7)[1].read_text() == "train n03425413 1"
    assert [path.read_text() for path in found.test_paths(9)] == ["val n03888257 0"]
    assert found.test_root == nette / "val"
    found.need_test()
    assert (found.class_number("n03425413"), found.class_number("my_own")) == (7, None)


@pytest.mark.parametrize("spec, wanted", [("nette", NETTE), ("woof", WOOF), ("idc", IDC)])
def test_published_orders(build, tmp_path, spec, wanted):
    plant(tmp_path, wanted)
    found = build(tmp_path, spec=spec)
    assert idents(found) == wanted
    assert [files[0].split("/")[0] for files in found.train] == wanted
    assert [files[0].split("/")[0] for files in found.test] == wanted
    assert idents(build(tmp_path, spec=spec, nclass=3)) == wanted[:3]


def test_idc_is_the_beginning_of_imagenet100(build, tmp_path):
    plant(tmp_path, IDC)
    found = build(tmp_path, spec="imagenet100", nclass=10)
    assert (found.name, idents(found)) == ("imagenet100", IDC)
    ids, names = subset_classes("imagenet100")
    assert len(set(ids)) == 100 and names[:3] == ("bonnet", "green mamba", "langur")
    # As evaluation lists it sorted.
    assert sorted(wordnet_names()[0][number] for number in ids)[:3] == ["n01558993", "n01692333", "n01729322"]


def test_every_spec_is_a_subset():
    for spec, subset in SPECS.items():
        assert CatalogueConfig(spec=spec).source == ("imagenet", spec)
        assert len(subset_classes(subset)[0]) == {"imagenet100": 100, "imagenet1k": 1000}.get(spec, 10)


def test_imagenet_without_a_list_takes_every_folder(build, refused, tmp_path):
    plant(tmp_path, ["n02111889", "n01440764", "n04517823"])
    found = build(tmp_path)
    assert found.name == "imagenet"
    assert [kind.label for kind in found.kinds] == ["tench, Tinca tinca", "Samoyed, Samoyede", "vacuum, vacuum cleaner"]
    (tmp_path / "train" / "dogs").mkdir()
    text = refused(tmp_path)
    assert text.startswith("1 of 4 folders of") and "such as dogs; give --spec" in text


def test_the_train_folder_itself(build, nette):
    whole = build(nette, spec="nette")
    assert build(nette / "train", spec="nette") == whole
    # A class may be called train, too, as one of CIFAR-100 is.
    plant(nette, ["train"])
    assert build(nette / "train", spec="nette").train_root == nette / "train"
    plant(nette.parent / "train", NETTE)
    assert build(nette.parent / "train", spec="nette").train_root == nette.parent / "train" / "train"


# --- the label file ---


def test_label_file_picks_and_names(build, labels, nette):
    file = labels("n03888257\tparachute, chute\r\nn01440764\r\n\r\n")
    found = build(nette, label_file_path=file)
    assert [(kind.ident, kind.label) for kind in found.kinds] == [
        ("n03888257", "parachute, chute"),
        ("n01440764", "tench, Tinca tinca"),
    ]
    assert [files[0][:9] for files in found.train] == ["n03888257", "n01440764"]
    plant(nette, ["stray"])  # no list is complete without one, but the file is the list
    assert idents(build(nette, label_file_path=file)) == ["n03888257", "n01440764"]
    assert idents(build(nette, label_file_path=file, nclass=1)) == ["n03888257"]


def test_label_file_beside_a_spec(build, refused, labels, nette):
    sorted_list = labels("\n".join(sorted(NETTE, reverse=True)) + "\n")
    assert build(nette, spec="nette", label_file_path=sorted_list) == build(nette, spec="nette")
    foreign, lacking = [*NETTE[:9], "n02111889"], NETTE[1:]
    for lines, told in (
        (foreign, "labels.txt: 'n02111889' is no class of nette"),
        (lacking, "lacks n01440764 (tench, Tinca tinca) of --spec nette"),
    ):
        assert told in refused(nette, spec="nette", label_file_path=labels("\n".join(lines)))
    short = labels("\n".join(NETTE[:3]))
    assert len(build(nette, spec="nette", label_file_path=short, nclass=3).kinds) == 3
    assert "lacks n03000684" in refused(nette, spec="nette", label_file_path=short, nclass=4)


def test_label_file_mistakes(refused, labels, nette, tmp_path):
    def told(text):
        return refused(nette, dataset="folder", label_file_path=labels(text))

    assert "line 2 of" in told("n01440764\nn0210204\n") and "(did you mean 'n02102040'?)" in told("n0210204")
    assert "no folder of" in told("tench")
    assert "repeats 'n01440764' of line 1" in told("n01440764\nn02102040\nn01440764\n")
    assert "is empty" in told("\n\n")
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in refused(nette, dataset="folder", label_file_path=str(tmp_path / "labels.txt"))
    assert "no label file" in refused(nette, label_file_path=str(tmp_path / "none.txt"))
    assert "is a folder" in refused(nette, label_file_path=str(tmp_path))
    assert read_label_file(labels("\ufeffa\tb\tc\n")) == {"a": (1, "b")}


# --- CIFAR ---


def test_cifar100_by_name_and_not_by_place(build, labels, tmp_path):
    """The published label file is grouped by super-class, ends its lines in CRLF and spells 24 names otherwise."""
    names = CIFAR["cifar100"]
    assert len(RESPELT) == 24 and len(set(names)) == 100 and list(names) == sorted(names)
    spelt = [RESPELT.get(name, name) for name in names]
    assert [cifar_class("cifar100", name) for name in spelt] == list(names)
    assert [cifar_class("cifar100", name) for name in names] == list(names)
    plant(tmp_path / "plain", names)
    listed = labels("".join(f"{name}\r\n" for name in reversed(spelt)))
    found = build(tmp_path / "plain", dataset="cifar100", label_file_path=listed)
    assert idents(found) == list(names)
    for kind, files in zip(found.kinds, found.train, strict=True):
        assert kind.label == kind.ident.replace("_", " ") and files[0].startswith(f"{kind.ident}/")
    # And with the other spelling as folders of train, but not of val.
    plant(tmp_path / "other", spelt, val=0)
    plant(tmp_path / "other", names, train=0)
    other = build(tmp_path / "other", dataset="cifar100")
    assert [kind.label for kind in other.kinds] == [kind.label for kind in found.kinds]
    number = other.class_number("orchid")
    assert other.kinds[number].ident == "orchids" and other.class_number("Orchids") == number
    assert other.test[number] == ("orchid/orchid_0.JPEG",)


def test_cifar10(build, refused, tmp_path):
    plant(tmp_path, [*CIFAR["cifar10"][1:], "plane"])
    text = refused(tmp_path, dataset="CIFAR10")
    assert text.startswith("1 of the 10 classes of cifar10 are not in") and "such as airplane;" in text
    plant(tmp_path, ["Airplane"])
    found = build(tmp_path, dataset="cifar10", spec="cifar10")
    assert (found.name, found.kinds[0].ident, found.kinds[0].label) == ("cifar10", "Airplane", "airplane")
    plant(tmp_path, ["airplanes"])
    assert "are one class, airplane; merge them" in refused(tmp_path, dataset="cifar10")


def test_cifar_without_folders(refused, tmp_path):
    assert "no whole CIFAR10 in" in refused(tmp_path, dataset="cifar10")


# --- Tiny ImageNet ---


def tiny_archive(root):
    """Two classes as the archive unpacks."""
    wnids = ("n01443537", "n01629819")
    for wnid in wnids:
        for number in range(2):
            path = root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wnid)
    (root / "val" / "images").mkdir(parents=True)
    for number in range(4):
        (root / "val" / "images" / f"val_{number}.JPEG").write_text(str(number))
    lines = [f"val_{number}.JPEG\t{wnids[number % 2]}\t0\t0\t62\t57\n" for number in range(4)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return wnids


def test_tiny_as_its_archive_unpacks(build, refused, tmp_path):
    wnids = tiny_archive(tmp_path / "tiny-imagenet-200")
    for root in (tmp_path, tmp_path / "tiny-imagenet-200"):
        found = build(root, dataset="tiny", nclass=2)
        assert (found.name, tuple(idents(found))) == ("tiny_imagenet", wnids)
        assert found.kinds[0].label == "goldfish, Carassius auratus"
        assert found.train[1] == tuple(f"n01629819/images/n01629819_{number}.JPEG" for number in range(2))
        assert found.test == (("images/val_0.JPEG", "images/val_2.JPEG"), ("images/val_1.JPEG", "images/val_3.JPEG"))
        assert found.test_paths(1)[1].read_text() == "3"
    assert "198 of the 200 classes of tiny_imagenet are not in" in refused(tmp_path, dataset="tiny_imagenet")


def test_tiny_in_flat_folders(build, tmp_path):
    plant(tmp_path, ["n01443537", "n01629819"])
    found = build(tmp_path, dataset="tiny_imagenet", nclass=1)
    assert found.test == (("n01443537/n01443537_0.JPEG",),)


# --- any folder ---


def test_folder(build, tmp_path):
    plant(tmp_path, ["red_wine", "beer"])
    found = build(tmp_path, dataset="folder")
    assert [(kind.ident, kind.label) for kind in found.kinds] == [("beer", "beer"), ("red_wine", "red wine")]
    shutil.copytree(tmp_path / "val", tmp_path / "test")
    assert build(tmp_path, dataset="folder").test_root == tmp_path / "test"
    assert build(tmp_path, dataset="folder", train_limit=1).train == (
        ("beer/beer_0.JPEG",),
        ("red_wine/red_wine_0.JPEG",),
    )


def test_without_test_images(build, nette):
    (nette / "val" / NETTE[3] / f"{NETTE[3]}_0.JPEG").unlink()
    found = build(nette, spec="nette")
    assert found.test == ()
    with pytest.raises(UserError, match="n03000684 holds no images"):
        found.need_test()
    shutil.rmtree(nette / "val" / NETTE[3])
    with pytest.raises(UserError, match=r"1 of the 10 classes have no folder in .*val, such as n03000684"):
        build(nette, spec="nette").need_test()
    shutil.rmtree(nette / "val")
    with pytest.raises(UserError, match=r"no folder .*val; it must hold"):
        build(nette, spec="nette").need_test()


# --- mistakes ---


def test_wrong_folders(refused, nette, tmp_path):
    assert "give --data_path" in refused(spec="nette")
    assert f"no folder {tmp_path / 'none' / 'train'}" in refused(tmp_path / "none", spec="nette")
    shutil.move(nette / "train" / NETTE[2], nette / "train" / "cassettes")
    text = refused(nette, spec="nette")
    assert "1 of the 10 classes of nette are not in" in text and "such as n02979186 (cassette player)" in text
    (nette / "train" / NETTE[2]).mkdir()
    assert f"{NETTE[2]} holds no images" in refused(nette, spec="nette")
    (tmp_path / "void" / "train").mkdir(parents=True)
    assert "has no folders" in refused(tmp_path / "void", dataset="folder")


@pytest.mark.parametrize(
    "options, told",
    [
        ({"dataset": "imagnet"}, "unknown dataset 'imagnet' (did you mean 'imagenet'?)"),
        ({"dataset": "coco"}, "unknown dataset 'coco'"),
        ({"spec": "net"}, "unknown --spec 'net' (did you mean 'nette'?)"),
        ({"spec": "cifa10"}, "unknown --spec 'cifa10' (did you mean 'cifar10'?)"),
        ({"dataset": "cifar10", "spec": "nette"}, "--spec nette lists classes of ImageNet, not of cifar10"),
        ({"dataset": "imagenette", "spec": "woof"}, "--dataset imagenette and --spec woof differ"),
        ({"spec": "nette", "nclass": 11}, "--nclass is 11, but nette has 10 classes here"),
    ],
)
def test_wrong_names(refused, nette, options, told):
    assert told in refused(nette, **options)


def test_options():
    cfg, _ = parse(CatalogueConfig, "distill", ["-d", "imagenet-100", "--data_dir", "x", "-j", "3", "--nclass", "10"])
    assert (cfg.source, cfg.row, cfg.data_path, cfg.threads) == (("imagenet", "imagenet100"), "imagenet100_10", "x", 3)
    assert (CatalogueConfig(spec="ImageWoof").row, CatalogueConfig(dataset="npz").row) == ("woof", "npz")
    assert [line.split()[0] for line in idle_options(CatalogueConfig(toy_images=30, download=True))] == [
        "--download",
        "--toy_images",
    ]
    assert idle_options(CatalogueConfig(dataset="toy", toy_images=30)) == []
    with pytest.raises(UserError, match="unknown --spec 'nete'"):
        parse(CatalogueConfig, "distill", ["--spec", "nete"])


# --- the fingerprint ---


def test_fingerprint(build, nette, labels, tmp_path, monkeypatch):
    first = build(nette, spec="nette").fingerprint()
    read = []
    original = cache.file_digest
    monkeypatch.setattr(cache, "file_digest", lambda file: read.append(file) or original(file))
    assert build(nette, spec="nette").fingerprint() == first and not read  # remembered
    shutil.copytree(nette, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere" / "val")
    assert build(tmp_path / "elsewhere", spec="nette").fingerprint() == first and len(read) == 20
    others = [
        build(nette, spec="nette", nclass=9).fingerprint(),
        build(nette, spec="nette", train_limit=1).fingerprint(),
        build(nette, label_file_path=labels("\n".join(reversed(NETTE)))).fingerprint(),
        build(nette, label_file_path=labels("\n".join(f"{name}\tthing" for name in NETTE))).fingerprint(),
    ]
    (nette / "train" / NETTE[0] / f"{NETTE[0]}_0.JPEG").write_text("changed")
    others.append(build(nette, spec="nette").fingerprint())
    assert len({first, *others}) == 6


# --- arrays and drawings become files ---


def test_npz_of_any_shape(build, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8),
        "train_labels": np.array([1, 0, 1, 0, 2, 2]),
        "test_images": rng.integers(0, 256, (3, 5, 7, 3), dtype=np.uint8),
        "test_labels": np.array([2, 1, 0]),
        "classes": np.array(["T-shirt/top", "../x", "wild_cat"]),
    }
    np.savez(tmp_path / "set.npz", **arrays)
    found = build(tmp_path / "set.npz", dataset="npz")
    assert [(kind.ident, kind.label) for kind in found.kinds] == [
        ("T-shirt_top", "T-shirt/top"),
        ("x", "../x"),
        ("wild_cat", "wild cat"),
    ]
    assert found.train[1] == ("x/00000.png", "x/00002.png")
    for k in range(3):
        for part, paths in (("train", found.train_paths(k)), ("test", found.test_paths(k))):
            rows = (arrays[f"{part}_labels"] == k).nonzero()[0]
            for row, path in zip(rows, paths, strict=True):
                assert np.array_equal(np.asarray(Image.open(path)), arrays[f"{part}_images"][row])
    assert found.train_root.is_relative_to(tmp_path / "cache")


def grey(count):
    """Black squares of two classes in turn."""
    images, labels = np.zeros((count, 4, 4), dtype=np.uint8), np.arange(count) % 2
    return {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}


def test_unpacked_once_and_whole(build, tmp_path, monkeypatch):
    arrays = grey(12)
    np.savez(tmp_path / "set.npz", **arrays)
    saved, original = [], Image.Image.save

    def save(image, path):
        if len(saved) == 17:
            raise OSError(28, "No space left on device")
        saved.append(path)
        original(image, path)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError):
        build(tmp_path / "set.npz", dataset="npz")
    assert not list((tmp_path / "cache" / "unpacked").iterdir())
    saved.append("the disk has room again")
    found = build(tmp_path / "set.npz", dataset="npz")
    assert (idents(found), len(saved)) == (["0", "1"], 18 + 24)
    assert Image.open(found.train_paths(0)[0]).size == (4, 4)
    found.need_test()
    assert build(tmp_path / "set.npz", dataset="npz") == found and len(saved) == 18 + 24
    np.savez(tmp_path / "set.npz", **arrays | {"train_labels": 1 - arrays["train_labels"]})
    assert build(tmp_path / "set.npz", dataset="npz").train_root != found.train_root


def test_archives_of_cifar_10(build, tmp_path, monkeypatch):
    """As torchvision reads them; only their checksums are not looked at."""
    from torchvision.datasets import cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng, labels = np.random.default_rng(0), list(range(9, -1, -1))
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": labels}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR["cifar10"])}))
    found = build(tmp_path, dataset="cifar10", nclass=2)
    assert [kind.label for kind in found.kinds] == ["airplane", "automobile"]
    assert found.train[1] == tuple(f"automobile/{number:05d}.png" for number in range(8, 50, 10))
    (path,) = found.test_paths(1)
    assert np.array_equal(np.asarray(Image.open(path)), batch["data"][8].reshape(3, 32, 32).transpose(1, 2, 0))


def test_classes_that_would_share_a_folder(refused, tmp_path):
    np.savez(tmp_path / "set.npz", **grey(2), classes=np.array(["a b", "a/b"]))
    assert "classes 'a b' and 'a/b' would share a folder" in refused(tmp_path / "set.npz", dataset="npz")
    assert "is a folder; name the .npz file in it" in refused(tmp_path, dataset="npz")


def test_toy_has_true_captions(build, tmp_path):
    found = build(dataset="toy", toy_images=30, toy_size=16)
    assert idents(found) == list(SHAPES) and found.kinds[0].label == "circle"
    assert [len(files) for files in found.train] == [5] * 6 and [len(files) for files in found.test] == [50] * 6
    assert Image.open(found.train_paths(2)[0]).size == (16, 16)
    captions = read_metadata(found.train_root, found)
    assert list(captions) == [name for files in found.train for name in files]
    assert len(set(captions.values())) > 25 and max(map(len, captions.values())) < 75
    for name, text in captions.items():
        words = text.lower().replace(",", "").strip(".").split()
        assert {*WORDS[name.split("/")[0]]} & {*words}, "the caption names the shape"
        (colour,) = {*COLOURS} & {*words}
        pixels = np.asarray(Image.open(found.train_root / name)).reshape(-1, 3).astype(int)
        # Some pixel has nearly the colour that is told; shades vary by six percent.
        assert np.abs(pixels - COLOURS[colour]).max(1).min() < 40
    again = build(dataset="toy", toy_images=30, toy_size=16)
    assert again == found and again.fingerprint() == found.fingerprint()
    small = build(dataset="toy", toy_images=30, toy_size=16, nclass=2)
    assert len(read_metadata(small.train_root, small)) == 10


# --- real photographs ---


@pytest.mark.skipif(not IMAGENETTE_MINI.is_file(), reason="the photographs are for development only")
def test_imagenette(build, tmp_path):
    with tarfile.open(IMAGENETTE_MINI) as archive:
        archive.extractall(tmp_path, filter="data")
    found = build(tmp_path, spec="nette")
    assert [len(files) for files in found.train] == [70] * 10 and [len(files) for files in found.test] == [25] * 10
    assert found.kinds[9].label == "parachute, chute"
