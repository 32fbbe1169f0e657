"""Networks by torchvision's names, and what is read from files of weights."""

import pytest
import torch

from networks.pretrained import PUBLISHED, build_architecture, load_architecture
from utils.errors import UserError


def weights(net):
    return sum(part.numel() for part in net.parameters())


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("resnet18_modified", 32, 11_173_962),
        ("resnet18", 64, 11_181_642),
        ("conv3", 32, 320_010),
        ("mobilenet_v2", 32, 2_236_682),
    ],
)
def test_numbers_of_weights(name, size, count):
    net = build_architecture(name, size, 10)
    assert weights(net) == count
    assert net.training
    assert net.eval()(torch.zeros(2, 3, size, size)).shape == (2, 10)


def test_a_modified_stem_keeps_every_pixel():
    net = build_architecture("resnet18_modified", 32, 10)
    assert net.conv1.weight.shape == (64, 3, 3, 3)
    assert net.maxpool(net.conv1(torch.zeros(1, 3, 32, 32))).shape[-1] == 32


@pytest.mark.parametrize("name", ["resnet19", "conv", "vgg11_modified", "ConvNet"])
def test_unknown_names(name):
    with pytest.raises(UserError, match=f"unknown network '{name}'"):
        build_architecture(name, 32, 10)


@pytest.mark.parametrize(("name", "size"), [("alexnet", 32), ("vit_b_16", 40), ("conv6", 32)])
def test_too_small_an_image(name, size):
    with pytest.raises(UserError, match=f"{size} pixels"):
        build_architecture(name, size, 10)


@pytest.fixture
def kept(tmp_path):
    """A file as RDED's are, and the network that wrote it."""
    net = build_architecture("resnet18_modified", 32, 4)
    torch.save({"model": net.state_dict()}, tmp_path / "cifar10_resnet18_modified.pth")
    return tmp_path / "cifar10_resnet18_modified.pth", net.eval()


def test_weights_are_read_strictly(kept):
    path, net = kept
    images = torch.randn(2, 3, 32, 32)
    found = load_architecture("resnet18_modified", str(path), 32, 4)
    assert not found.training
    assert torch.equal(found(images), net(images))
    some = load_architecture("resnet18_modified", str(path), 32, 2, rows=[3, 0])
    assert torch.allclose(some(images), net(images)[:, [3, 0]], atol=1e-6)
    with pytest.raises(UserError, match=r"has 'fc.weight' of shape \(4, 512\), not \(10, 512\)"):
        load_architecture("resnet18_modified", str(path), 32, 10)
    with pytest.raises(UserError, match=r"of shape|of another network"):
        load_architecture("resnet18", str(path), 32, 4)
    with pytest.raises(UserError, match="knows 4 classes, none of number 7"):
        load_architecture("resnet18_modified", str(path), 32, 1, rows=[7])


def test_rdeds_convnets_have_names_of_their_own(tmp_path):
    net = build_architecture("conv3", 32, 10)
    theirs = {}
    for name, value in net.state_dict().items():
        place, _, part = name.removeprefix("features.").partition(".")
        kind = {0: "conv", 1: "norm"}.get(int(place) % 4) if name.startswith("features.") else None
        theirs[name if kind is None else f"layers.{kind}.{int(place) // 4}.{part}"] = value
    assert "layers.norm.2.running_var" in theirs and "classifier.weight" in theirs
    torch.save({"model": theirs}, tmp_path / "conv3.pth")
    images = torch.randn(2, 3, 32, 32)
    found = load_architecture("conv3", str(tmp_path / "conv3.pth"), 32, 10)
    assert torch.equal(found(images), net.eval()(images))


def test_missing_weights_are_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth are not here and cannot be fetched \(no route\)"):
        load_architecture("resnet18", PUBLISHED, 64, 1000)
    with pytest.raises(UserError, match="publishes no weights of 'conv3'"):
        load_architecture("conv3", PUBLISHED, 64, 1000)
    with pytest.raises(UserError, match="no weights file"):
        load_architecture("resnet18", str(tmp_path / "none.pth"), 64, 10)
