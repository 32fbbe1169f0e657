"""Labelled images in memory: splits, hold-out, statistics, whitening, and what is said of data that is wrong."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import LABELLED, ImagesConfig, build_images, images, is_labelled, list_datasets
from data.images import channel_stats, square
from data.photographs import IMAGENET_STATS
from data.sources import CIFAR100_STATS, CIFAR_STATS, FASHION_STATS, MNIST_STATS, SVHN_STATS
from data.toy import SHAPES
from data.zca import fit_unit_zca, fit_zca
from utils.config import parse, section
from utils.errors import UserError

CIFAR_MINI = Path(__file__).parents[2].parent / "shared/data/cifar10-mini/cifar10_mini.npz"


def everything(split):
    return split.images(torch.arange(len(split)))


def write(path, channels=3, side=6, train=40, test=12, classes=4, **changes):
    """A `.npz` file of random images, labels in turn."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        shape = (count, side, side, channels) if channels else (count, side, side)
        arrays[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % classes
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return arrays


@pytest.fixture
def build(tmp_path):
    def build(dataset="digits", **options):
        zca = options.pop("given", None)
        return build_images(ImagesConfig(dataset=dataset, cache_dir=str(tmp_path / "cache"), **options), "cpu", zca)

    return build


@pytest.fixture
def npz(tmp_path, build):
    """npz(options of the config, arrays=changes of the file) builds the data of a small file."""

    def make(arrays=None, **options):
        write(tmp_path / "set.npz", **(arrays or {}))
        return build("npz", data_path=str(tmp_path / "set.npz"), **options)

    return make


# --- names ---


def test_names():
    named = "cifar10 cifar100 svhn mnist fashionmnist tiny tiny-imagenet-200 cub cub-200 cub200 imagenet folder npz"
    assert LABELLED.names() == sorted([*named.split(), "digits", "toy"])
    assert set(LABELLED.names()) <= set(list_datasets())
    assert is_labelled("CIFAR10") and is_labelled("FashionMNIST") and is_labelled("toy")
    assert not is_labelled("flickr")
    assert build_images(ImagesConfig(dataset="Digits"), "cpu").name == "digits"
    with pytest.raises(UserError, match=r"unknown dataset 'cifar11' \(did you mean 'cifar100?'\?\); known: cifar10, "):
        build_images(ImagesConfig(dataset="CIFAR11"), "cpu")


def test_flags():
    @dataclass(frozen=True)
    class Verb:
        """A verb."""

        data: ImagesConfig = section(ImagesConfig)

    cfg, _ = parse(Verb, "verb", ["--dataset=Tiny", "--zca", "--res", "64", "--fit", "crop"])
    assert (cfg.data.dataset, cfg.data.zca, cfg.data.res, cfg.data.fit) == ("Tiny", True, 64, "crop")
    assert parse(Verb, "verb", ["--root=here", "--zca", "--zca_kind=podd"])[0].data.data_path == "here"
    assert cfg.data.threads >= 1 and dataclasses.replace(cfg.data, workers=3).threads == 3
    for flags, message in {
        ("--res", "-1"): "--res is -1; it must be at least 0",
        ("--holdout", "1"): "--holdout is 1.0; it is a share",
        ("--holdout", "-0.1"): "at least 0",
        ("--norm", "mean"): "--norm does not know 'mean'",
        ("--fit", "pad"): "--fit does not know 'pad'",
        ("--zca_kind", "unit"): "--zca_kind does not know 'unit'; choose from mtt, podd",
    }.items():
        with pytest.raises(UserError, match=message):
            parse(Verb, "verb", list(flags))


# --- the two that need no files ---


def test_digits(build):
    data = build(holdout=0)
    assert (data.channels, data.size, data.classes) == (1, 8, tuple("0123456789"))
    assert (len(data["train"]), len(data["test"])) == (1438, 359)
    assert (data["test"].labels.bincount() - 36).abs().max() <= 1
    pictures = torch.cat([data.pictures(everything(data[split])) for split in ("train", "test")])
    assert pictures.shape == (1797, 3, 8, 8) and pictures.dtype == torch.uint8
    assert set(pictures.unique().tolist()) == {round(tone * 255 / 16) for tone in range(17)}
    from sklearn.datasets import load_digits

    known = load_digits().images
    found = (pictures[:, 0].double() * 16 / 255).round().numpy()
    assert sorted(map(bytes, found)) == sorted(map(bytes, known))


def test_toy(build):
    data = build("toy", toy_images=120, holdout=0)
    assert data.classes == tuple(SHAPES) and (data.channels, data.size) == (3, 32)
    assert data["train"].labels.bincount().tolist() == [20] * 6
    assert data["test"].labels.bincount().tolist() == [50] * 6
    again = build("toy", toy_images=120, holdout=0)
    assert torch.equal(everything(data["train"]), everything(again["train"]))
    assert data.fingerprint() == again.fingerprint()
    other = build("toy", toy_images=60, holdout=0)
    torch.testing.assert_close(other.pictures(everything(other["test"])), data.pictures(everything(data["test"])))
    assert build("toy", toy_images=60, res=16)["test"].images(torch.tensor([0])).shape == (1, 3, 16, 16)
    assert len(everything(data["train"]).unique(dim=0)) == 120


def test_toy_shapes_can_be_learned_but_not_from_colours(build):
    data = build("toy", toy_images=600, res=16, holdout=0)
    train, test = data["train"], data["test"]
    x, y = everything(train), train.labels
    colours = torch.cat([x.mean((2, 3)), x.std((2, 3)), torch.ones(len(x), 1)], 1)
    weights = torch.linalg.lstsq(colours, F.one_hot(y).float()).solution
    assert ((colours @ weights).argmax(1) == y).float().mean() < 0.4
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 24, 3, padding=1),
        torch.nn.InstanceNorm2d(24, affine=True),
        torch.nn.ReLU(),
        torch.nn.Conv2d(24, 48, 3, padding=1),
        torch.nn.InstanceNorm2d(48, affine=True),
        torch.nn.ReLU(),
        torch.nn.AdaptiveMaxPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(48, 6),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(12):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        right = (net(everything(test)).argmax(1) == test.labels).float().mean()
    assert 0.4 < right < 0.99


# --- splits ---


def pixels_of(data, name):
    """Each image of a split as bytes, to be compared as sets."""
    return [bytes(image) for image in data.pictures(everything(data[name])).contiguous().numpy()]


def test_holdout_is_a_share_of_each_class_and_always_the_same(build):
    whole, data, wider = (build(holdout=share) for share in (0, 0.1, 0.3))
    counts = whole["train"].labels.bincount().tolist()
    assert data["val"].labels.bincount().tolist() == [int(0.1 * count + 0.5) for count in counts]
    assert sorted(pixels_of(data, "train") + pixels_of(data, "val")) == sorted(pixels_of(whole, "train"))
    assert pixels_of(build(holdout=0.1), "val") == pixels_of(data, "val")
    assert set(pixels_of(data, "val")) <= set(pixels_of(wider, "val"))


def test_no_holdout(build, npz):
    with pytest.raises(UserError, match=r"digits has no validation images: --holdout is 0; give a share such as 0\.1"):
        _ = build(holdout=0)["val"]
    with pytest.raises(UserError, match="no class has more than one image"):
        _ = npz({"train": 4}, holdout=0.5)["val"]
    with pytest.raises(UserError, match="unknown split 'dev'; known: train, val, test"):
        _ = build()["dev"]


def test_few_images_leave_some_to_train_on(npz):
    data = npz({"train": 8}, holdout=0.9)
    assert sorted(data["train"].labels.tolist()) == sorted(data["val"].labels.tolist()) == [0, 1, 2, 3]


def test_limit_counts_each_class_after_the_holdout(build):
    full, few = build(), build(train_limit=3)
    assert few["train"].labels.bincount().tolist() == [3] * 10
    assert torch.equal(few["val"].labels, full["val"].labels)
    for label in range(10):
        first = full["train"].indices_of(label)[:3]
        ours = few["train"].indices_of(label)
        pictures = few.pictures(few["train"].images(ours)), full.pictures(full["train"].images(first))
        assert torch.equal(*pictures)


def test_labels_and_places(npz):
    split = npz(holdout=0)["train"]
    assert split.labels.dtype == torch.long and len(split) == 40
    assert split.indices_of(2).tolist() == list(range(2, 40, 4))
    assert split.indices_of(2).dtype == torch.long
    images = everything(split)
    assert images.dtype == torch.float32 and images.is_contiguous()
    assert torch.equal(split.images(torch.tensor([5, 0, 5])), images[[5, 0, 5]])
    assert split.images(torch.tensor([], dtype=torch.long)).shape == (0, 3, 6, 6)


def test_a_split_is_made_once(npz):
    data = npz()
    assert data["train"] is data["train"]


# --- preparation ---


def test_statistics_are_those_of_the_training_images(npz, tmp_path):
    data = npz(holdout=0)
    with np.load(tmp_path / "set.npz") as file:
        unit = file["train_images"].astype(np.float64) / 255
    assert data.mean == pytest.approx(unit.mean((0, 1, 2)), abs=1e-6)
    assert data.std == pytest.approx(unit.std((0, 1, 2)), abs=1e-6)
    expected = torch.from_numpy((unit - unit.mean((0, 1, 2))) / unit.std((0, 1, 2))).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(everything(data["train"]), expected, rtol=0, atol=1e-5)
    assert npz(holdout=0.2).mean != data.mean  # held out means not looked at


def test_one_tone_has_a_deviation():
    mean, std = channel_stats(torch.full((2, 1, 3, 3), 51, dtype=torch.uint8))
    assert mean == pytest.approx((0.2,)) and std == pytest.approx((1 / 255,), abs=1e-6)


@pytest.mark.parametrize("channels", [0, 1, 3])
def test_pictures_are_the_images_again(npz, channels, tmp_path):
    data = npz({"channels": channels}, holdout=0)
    assert data.channels == (channels or 1)
    pictures = data.pictures(everything(data["test"]))
    with np.load(tmp_path / "set.npz") as file:
        known = torch.from_numpy(file["test_images"].reshape(12, 6, 6, -1)).permute(0, 3, 1, 2)
    assert torch.equal(pictures, known.expand(12, 3, 6, 6))
    grid = everything(data["test"]).view(3, 4, -1, 6, 6)
    assert torch.equal(data.pictures(grid), pictures.view(3, 4, 3, 6, 6))
    wide = torch.randn(2, data.channels, 12, 12, requires_grad=True)  # a canvas, larger than the images
    assert data.pictures(wide).shape == (2, 3, 12, 12)


def test_res_resizes_smoothly(npz, tmp_path):
    data = npz({"side": 12}, res=5, holdout=0)
    assert data.size == 5
    with np.load(tmp_path / "set.npz") as file:
        known = torch.from_numpy(file["train_images"]).permute(0, 3, 1, 2).float()
    expected = F.interpolate(known, (5, 5), mode="bicubic", antialias=True).clamp(0, 255)
    difference = (data.pictures(everything(data["train"])).float() - expected).abs()
    assert difference.max() <= 1.01
    assert npz({"side": 12, "channels": 1}, res=24)["test"].images(torch.tensor([1])).shape == (1, 1, 24, 24)


def test_oblong_images(npz):
    wide = np.random.default_rng(0).integers(0, 256, (40, 6, 9, 3), dtype=np.uint8)
    arrays = {"train_images": wide, "test_images": wide[:12]}
    with pytest.raises(UserError, match="npz: train images are 6 x 9 pixels, not square; give a side, --res 6"):
        npz(arrays)
    assert npz(arrays, res=6)["train"].images(torch.arange(2)).shape == (2, 3, 6, 6)
    data = npz(arrays, res=6, fit="crop", holdout=0)
    middle = torch.from_numpy(wide[:, :, 1:7]).permute(0, 3, 1, 2)
    assert torch.equal(data.pictures(everything(data["train"])), middle)
    tall = torch.from_numpy(wide).permute(0, 3, 2, 1)
    assert torch.equal(square(tall, 6, "crop"), middle.transpose(2, 3))


def test_many_images_are_resized_in_parts(monkeypatch):
    monkeypatch.setattr(images, "_ROWS", 3)
    pixels = torch.randint(256, (8, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = torch.cat([square(pixels[i : i + 1], 4, "squash") for i in range(8)])
    assert torch.equal(square(pixels, 4, "squash"), whole)


# --- whitening ---


def test_whitened_images(npz, tmp_path):
    data = npz(zca=True, holdout=0, arrays={"train": 300})
    assert (data.mean, data.std) == ((0.0,) * 3, (1.0,) * 3)
    with np.load(tmp_path / "set.npz") as file:
        unit = torch.from_numpy(file["train_images"]).permute(0, 3, 1, 2).double() / 255
        tested = torch.from_numpy(file["test_images"]).permute(0, 3, 1, 2)
    zca = fit_zca(unit)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(data["train"].images(torch.tensor([7])), zca.whiten(unit[7:8]).float(), **close)
    torch.testing.assert_close(everything(data["train"]), zca.whiten(unit).float(), **close)
    torch.testing.assert_close(everything(data["test"]), zca.whiten(tested / 255.0).float(), **close)
    assert torch.equal(data.pictures(everything(data["test"])), tested)
    assert npz().zca is None


def test_whitening_is_fitted_once_and_found_again(npz, monkeypatch, tmp_path):
    fits = []
    monkeypatch.setattr(images, "fit_zca", lambda pixels: fits.append(len(pixels)) or fit_zca(pixels))
    first = npz(zca=True, holdout=0.1)
    assert first.zca.digest == first.zca.digest and fits == [36]  # not of the images held out
    again = npz(zca=True, holdout=0.1)
    assert again.zca.digest == first.zca.digest and fits == [36]
    assert torch.equal(everything(again["val"]), everything(first["val"]))
    assert npz(zca=True, holdout=0).zca.digest != first.zca.digest and fits == [36, 40]
    (cached, *_) = (tmp_path / "cache" / "zca").iterdir()
    for file in (tmp_path / "cache" / "zca").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert npz(zca=True, holdout=0.1).zca.digest == first.zca.digest and fits == [36, 40, 36]
    assert cached.exists()


def test_a_given_whitening_is_used(npz):
    other = fit_zca(torch.rand(50, 3, 6, 6, generator=torch.Generator().manual_seed(3)))
    data = npz(zca=True, given=other)
    assert data.zca.digest == other.digest
    plain = npz()
    unit = plain.pictures(everything(plain["test"])).float() / 255
    torch.testing.assert_close(everything(data["test"]), other.whiten(unit), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="a whitening of 108 values does not fit images of 75"):
        npz(zca=True, given=other, res=5)


def test_whitened_as_podd_does(npz, tmp_path):
    """Another cache, another fingerprint, and statistics of the training images alone."""
    first, data = npz(zca=True), npz(zca=True, zca_kind="podd")
    assert (data.zca.kind, data.zca.unit, first.zca.kind) == ("podd", True, "mtt")
    assert data.zca.digest != first.zca.digest and data.fingerprint() != first.fingerprint()
    assert len(list((tmp_path / "cache" / "zca").iterdir())) == 2
    assert npz(zca=True, zca_kind="podd").zca.digest == data.zca.digest
    assert (data.mean, data.std) == ((0.0,) * 3, (1.0,) * 3)
    plain = npz()
    pixels = {split: plain.pictures(everything(plain[split])) for split in ("train", "test")}
    zca = fit_unit_zca(pixels["train"].contiguous())
    torch.testing.assert_close(everything(data["test"]), zca.whiten(pixels["test"].float()), rtol=0, atol=1e-4)
    assert npz(zca_kind="podd").fingerprint() == npz().fingerprint()  # not whitened, no kind


def test_pictures_of_the_unit_kind_are_neither_black_nor_white(npz):
    data = npz(zca=True, zca_kind="podd")
    for prepared in (everything(data["test"]), 3 * torch.randn(2, 3, 6, 6)):
        for fit in (False, True):
            pictures = data.pictures(prepared, fit).float().flatten(1)
            assert (pictures.mean(1) - 127.5).abs().max() < 5 and 25 < pictures.std(1).min() < 60
    assert set(data.pictures(torch.zeros(1, 3, 6, 6)).unique().tolist()) == {128}


def test_a_given_whitening_says_of_which_kind_it_is(npz):
    data = npz(zca=True, zca_kind="podd")
    given = npz(zca=True, given=data.zca)
    assert given.fingerprint() == data.fingerprint() and given.zca.unit
    assert torch.equal(everything(given["test"]), everything(data["test"]))


def test_too_much_whitening_is_refused(build):
    with pytest.raises(UserError, match=r"--zca of 49152 values an image \(3 x 128 x 128\) needs a matrix of 9\.7 GB"):
        build("toy", res=128, toy_images=12, zca=True)
    assert build("toy", res=64, toy_images=12, zca=True).size == 64  # 12288 are allowed


def test_images_that_do_not_fit_are_whitened_a_batch_at_a_time(npz, monkeypatch):
    held = npz(zca=True)["train"]
    kept = everything(held)
    monkeypatch.setattr(images.ImageSplit, "_free", lambda self: 0)
    loose = npz(zca=True)["train"]
    for _ in range(2):
        torch.testing.assert_close(everything(loose), kept, rtol=0, atol=1e-6)
    assert held._held is not None and loose._held is None


# --- fingerprints ---


def test_fingerprint_follows_what_is_trained_on(npz, tmp_path):
    first = npz().fingerprint()
    assert first == npz().fingerprint()
    different = {
        "holdout": npz(holdout=0.3),
        "limit": npz(train_limit=2),
        "res": npz(res=5),
        "whitened": npz(zca=True),
        "labels": npz({"classes": 2}),
        "pixels": npz({"train_images": np.zeros((40, 6, 6, 3), np.uint8)}),
        "grey": npz({"channels": 1}),
    }
    prints = {name: data.fingerprint() for name, data in different.items()}
    assert len({first, *prints.values()}) == 1 + len(prints)
    assert npz({"test_images": np.zeros((12, 6, 6, 3), np.uint8)}).fingerprint() == first
    assert npz(fit="crop").fingerprint() == first  # squares have nothing to be cut off


def test_fingerprint_does_not_hang_on_how_a_machine_rounds(stand_ins, build, tmp_path, monkeypatch):
    """Resizing may be a grey level off elsewhere; the images and the side are the same."""
    one = build("CIFAR10", data_path=str(tmp_path), res=16)
    monkeypatch.setattr("data.sources.square", lambda pixels, *rest: square(pixels, *rest) ^ 1)
    other = build("CIFAR10", data_path=str(tmp_path), res=16)
    assert not torch.equal(everything(one["train"]), everything(other["train"]))
    assert one.fingerprint() == other.fingerprint()


# --- .npz files that do not fit ---


def test_class_names(npz):
    assert npz().classes == ("0", "1", "2", "3")
    assert npz({"classes": 2, "train": 6}).classes == ("0", "1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, "has no array 'train_images"),
        ({"test_labels": None}, "has no array 'test_labels.*'; it needs train_images and train_labels and test_images"),
        ({"test_images": np.zeros((12, 6, 6, 3))}, r"test_images float64 \(12, 6, 6, 3\) .* uint8"),
        ({"test_labels": np.zeros(11, int)}, r"test_labels \(11,\) do not fit"),
        ({"train_labels": np.zeros(40)}, "train_labels are float64; they must be whole numbers"),
        ({"train_labels": np.arange(40) - 1}, "negative labels"),
        (
            {"train_images": np.zeros((40, 6, 6, 4), np.uint8)},
            r"train_images are \(40, 6, 6, 4\); they must be \(N, H, W, 3\)",
        ),
        ({"train_images": np.zeros((40, 6), np.uint8)}, r"train_images are \(40, 6\)"),
        ({"train_images": np.zeros((40, 0, 0, 3), np.uint8)}, r"train_images are \(40, 0, 0, 3\)"),
        ({"test_labels": np.full(12, 4)}, "test label 4 is out of range; the training labels end at 3"),
        (
            {"test_images": np.zeros((12, 5, 5, 3), np.uint8)},
            r"test images are \(3, 5, 5\), training images \(3, 6, 6\)",
        ),
        ({"test_images": np.zeros((12, 6, 6), np.uint8)}, r"test images are \(1, 6, 6\), training images \(3, 6, 6\)"),
        ({"train_labels": np.arange(40) % 3 * 2}, "class '1' has no training images"),
        ({"train_labels": np.zeros(40, int), "test_labels": np.zeros(12, int), "classes": 1}, None),
    ],
)
def test_arrays_that_do_not_fit(npz, changes, message):
    if message is None:
        assert npz(changes).classes == ("0",)
        return
    with pytest.raises(UserError, match=message) as error:
        _ = everything(npz(changes)["train"]), everything(npz(changes)["test"])
    assert "\n" not in str(error.value)


def test_names_of_classes(tmp_path, build):
    arrays = write(tmp_path / "named.npz")
    names = np.array(["ant", "bee", "cat", "dog"])
    np.savez(tmp_path / "named.npz", **arrays, classes=names)
    assert build("npz", data_path=str(tmp_path / "named.npz")).classes == ("ant", "bee", "cat", "dog")
    np.savez(tmp_path / "named.npz", **arrays, classes=names[:3])
    with pytest.raises(UserError, match="label 3 has no name among the 3 classes"):
        build("npz", data_path=str(tmp_path / "named.npz"))


def test_no_npz_file(tmp_path, build):
    with pytest.raises(UserError, match=r"no file of images; give --data_path, a \.npz file"):
        build("npz")
    with pytest.raises(UserError, match=r"is a folder; name the \.npz file in it"):
        build("npz", data_path=str(tmp_path))
    with pytest.raises(UserError, match="no labelled images at "):
        build("npz", data_path=str(tmp_path / "none.npz"))
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(UserError, match=r"cut\.npz cannot be read"):
        build("npz", data_path=str(tmp_path / "cut.npz"))


# --- torchvision's sets ---


def test_statistics_of_named_sets():
    """The figures of the published tables."""
    assert CIFAR_STATS == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert CIFAR100_STATS == ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))
    assert IMAGENET_STATS == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert SVHN_STATS == ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
    assert (MNIST_STATS, FASHION_STATS) == (((0.1307,), (0.3081,)), ((0.2861,), (0.3530,)))


@pytest.fixture
def stand_ins(monkeypatch):
    """torchvision's sets replaced by tiny ones of the same attributes; gives what they were called with."""
    from torchvision import datasets

    calls = []

    def stand_in(name):
        def make(root, download=False, **part):
            calls.append((name, root, download, part))
            count = 20 if part in ({"train": True}, {"split": "train"}) else 10
            rng = np.random.default_rng(count)
            labels = np.arange(count) % (100 if name == "CIFAR100" else 10)
            if name == "CIFAR100":
                labels, count = np.arange(100).repeat(2), 200
            found = type("Stub", (), {})()
            side = 28 if "MNIST" in name else 32
            shape = {"SVHN": (count, 3, side, side)}.get(name, (count, side, side, 3))
            found.data = rng.integers(0, 256, shape[:3] if "MNIST" in name else shape, dtype=np.uint8)
            if "MNIST" in name:
                found.data, found.targets = torch.from_numpy(found.data), torch.from_numpy(labels)
            elif name == "SVHN":
                found.labels = labels
            else:
                found.targets = labels.tolist()
            found.classes = [f"{name} {label}" for label in range(labels.max() + 1)]
            return found

        return make

    for name in ("CIFAR10", "CIFAR100", "SVHN", "MNIST", "FashionMNIST"):
        monkeypatch.setattr(datasets, name, stand_in(name))
    return calls


@pytest.mark.parametrize(
    ("name", "shape", "stats", "first"),
    [
        ("CIFAR10", (3, 32), CIFAR_STATS, "CIFAR10 0"),
        ("CIFAR100", (3, 32), CIFAR100_STATS, "CIFAR100 0"),
        ("SVHN", (3, 32), SVHN_STATS, "0"),
        ("MNIST", (1, 28), MNIST_STATS, "0"),
        ("FashionMNIST", (1, 28), FASHION_STATS, "FashionMNIST 0"),
    ],
)
def test_torchvisions_sets(stand_ins, build, tmp_path, name, shape, stats, first):
    data = build(name.lower(), data_path=str(tmp_path), holdout=0)
    assert data.name == name and (data.channels, data.size) == shape
    assert (data.mean, data.std) == stats
    assert (len(data.classes), data.classes[0]) == (100 if name == "CIFAR100" else 10, first)
    assert [call[2] for call in stand_ins] == [False]  # nothing is fetched unasked, and test is not read yet
    assert everything(data["test"]).shape[1:] == (shape[0], shape[1], shape[1])
    word = "split" if name == "SVHN" else "train"
    expected = ({"split": "train"}, {"split": "test"}) if name == "SVHN" else ({"train": True}, {"train": False})
    assert [call[3] for call in stand_ins] == list(expected) and word in stand_ins[0][3]
    from torchvision import datasets

    part = {"split": "train"} if name == "SVHN" else {"train": True}
    pixels = torch.as_tensor(getattr(datasets, name)("", **part).data)
    known = pixels[:, None] if pixels.ndim == 3 else pixels if name == "SVHN" else pixels.permute(0, 3, 1, 2)
    assert torch.equal(data.pictures(everything(data["train"])), known.expand(-1, 3, -1, -1))
    assert build(name, data_path=str(tmp_path), download=True) and stand_ins[-1][2]


def test_a_set_in_a_folder_of_all_sets(stand_ins, build, tmp_path):
    for name, wanted in (("cifar10", "cifar-10-batches-py"), ("mnist", "MNIST/raw")):
        (tmp_path / name / wanted).mkdir(parents=True)
        build(name, data_path=str(tmp_path))
        assert stand_ins[-1][1] == str(tmp_path / name)
        (tmp_path / wanted).mkdir(parents=True)
        build(name, data_path=str(tmp_path))
        assert stand_ins[-1][1] == str(tmp_path)


def test_mtt_gives_cifar_100_the_statistics_of_cifar_10(stand_ins, build, tmp_path):
    assert build("CIFAR100", data_path=str(tmp_path), norm="mtt").mean == CIFAR_STATS[0]
    assert build("SVHN", data_path=str(tmp_path), norm="mtt").mean == SVHN_STATS[0]
    one, other = (build("CIFAR100", data_path=str(tmp_path), norm=norm) for norm in ("mtt", "data"))
    assert one.fingerprint() != other.fingerprint()


def test_files_of_cifar_10_are_read(monkeypatch, build, tmp_path):
    """torchvision's own reader on files of its layout; only their checksums are not looked at."""
    import pickle

    from torchvision.datasets import cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = [f"kind {label}" for label in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    data = build("CIFAR10", data_path=str(tmp_path), holdout=0)
    assert data.classes == tuple(names) and len(data["train"]) == 50
    known = torch.from_numpy(batch["data"]).view(10, 3, 32, 32)  # planes of red, green and blue
    assert torch.equal(data.pictures(everything(data["test"])), known)


def test_files_of_mnist_are_read(build, tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("t10k", 10)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        sizes = np.array([count, 28, 28], ">i4").tobytes()
        (folder / f"{split}-images-idx3-ubyte").write_bytes(b"\0\0\x08\3" + sizes + pixels.tobytes())
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1" + sizes[:4] + labels.tobytes())
    data = build("mnist", data_path=str(tmp_path), holdout=0.5)
    assert len(data["val"]) == len(data["test"]) == 10
    assert torch.equal(data.pictures(everything(data["test"]))[:, 0], torch.from_numpy(pixels))
    assert data.pictures(everything(data["test"])).shape[1] == 3
    assert build("mnist", data_path=str(tmp_path), res=32)["train"].images(torch.tensor([0])).shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("CIFAR10", "cifar-10-batches-py"),
        ("CIFAR100", "cifar-100-python"),
        ("SVHN", "train_32x32.mat and test_32x32.mat"),
        ("MNIST", "MNIST/raw"),
        ("FashionMNIST", "FashionMNIST/raw"),
    ],
)
def test_missing_sets_say_what_was_looked_for(build, tmp_path, name, wanted):
    with pytest.raises(UserError) as error:
        build(name, data_path=str(tmp_path))
    remedy = "correct --data_path or give --download"
    assert str(error.value) == f"no whole {name} in {tmp_path} (looked for {wanted}); {remedy}"
    with pytest.raises(UserError, match="no folder of images; give --data_path, where "):
        build(name)
    with pytest.raises(UserError, match="no folder nowhere; correct --data_path"):
        build(name, data_path="nowhere")
    assert not list(tmp_path.iterdir())


def test_a_failed_download_is_told(monkeypatch, build, tmp_path):
    from urllib.error import URLError

    from torchvision import datasets

    def fail(error):
        def make(*_, **__):
            raise error

        monkeypatch.setattr(datasets, "CIFAR10", make)

    fail(URLError("no route to host"))
    with pytest.raises(UserError, match=r"CIFAR10 could not be fetched into .* \(.*no route to host.*\); try again"):
        build("CIFAR10", data_path=str(tmp_path / "new"), download=True)
    fail(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        build("CIFAR10", data_path=str(tmp_path), download=True)


# --- a real data set, where it is at hand ---


@pytest.mark.skipif(not CIFAR_MINI.is_file(), reason="the CIFAR-10 sample is not here")
def test_cifar_mini(build):
    data = build("npz", data_path=str(CIFAR_MINI))
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert (len(data["train"]), len(data["val"]), len(data["test"])) == (4500, 500, 1000)
    assert data["val"].labels.bincount().tolist() == [50] * 10
    assert data.mean == pytest.approx(CIFAR_STATS[0], abs=0.01)
    images = everything(data["test"])
    assert abs(float(images.mean())) < 0.05 and abs(float(images.std()) - 1) < 0.05
