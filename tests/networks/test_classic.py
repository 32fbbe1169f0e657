"""MLP, LeNet, AlexNet, VGGs and ResNets by name: sizes as published, variants for other images, and names unknown."""

import pytest
import torch
from torch import nn

from networks import NETWORKS, build_network, has_batch_norm, is_network, list_networks
from networks.flat import FlatModule
from networks.layers import side_after
from networks.resnet import Block
from utils.errors import UserError

# Name and weights for 3 × 32 × 32 and 10 classes.
PUBLISHED = [
    ("MLP", 411_146),
    ("LeNet", 62_006),
    ("AlexNet", 1_872_202),
    ("VGG11", 9_231_114),
    ("VGG11BN", 9_231_114),
    ("VGG13", 9_416_010),
    ("VGG16", 14_728_266),
    ("VGG19", 20_040_522),
    ("ResNet18", 11_173_962),
    ("ResNet18BN", 11_173_962),
    ("ResNet18_AP", 11_250_762),
    ("ResNet18BN_AP", 11_250_762),
    ("ResNet34", 21_282_122),
    ("ResNet50", 23_520_842),
    ("ResNet101", 42_512_970),
    ("ResNet152", 58_156_618),
]


def count(net):
    return sum(weight.numel() for weight in net.parameters())


def shape(name, size, channels=3, classes=10):
    """What comes out for two images, without a single multiplication."""
    with torch.device("meta"):
        net = build_network(name, size, classes, channels)
        return net, tuple(net(torch.zeros(2, channels, size, size)).shape)


@pytest.mark.parametrize(("name", "weights"), PUBLISHED)
def test_sizes_as_published(name, weights):
    net, out = shape(name, 32)
    assert (count(net), out) == (weights, (2, 10))


def without_batch_norm():
    return [name for name, _ in PUBLISHED if "BN" not in name and name != "MLP"]


@pytest.mark.parametrize("name", without_batch_norm())
def test_variants_have_as_many_weights(name):
    weights = dict(PUBLISHED)[name]
    for size in (32, 48, 64, 100, 128):
        net, out = shape(f"{name}_Adaptive", size)
        assert (count(net), out) == (weights, (2, 10))
    if "_AP" not in name:
        net, out = shape(f"{name}_Tiny", 64)
        assert (count(net), out) == (weights, (2, 10))


def test_every_listed_name_builds():
    for name in list_networks():
        if "152" in name or "101" in name:
            continue  # as the other bottlenecks, and slow to draw
        net, out = shape(name, 64 if name.endswith(("_Tiny", "ImageNet")) else 32, classes=7)
        assert out == (2, 7) and has_batch_norm(net) == ("BN" in name), name


@pytest.mark.parametrize("name", ["MLP", "LeNet", "AlexNet", "VGG11", "ResNet18", "ResNet18_AP"])
def test_one_channel_of_28_pixels(name):
    assert shape(name, 28, channels=1)[1] == (2, 10)
    assert shape(name if name == "MLP" else f"{name}_Adaptive", 45, channels=1)[1] == (2, 10)


@pytest.mark.parametrize("size", [8, 64, 128])
@pytest.mark.parametrize("name", ["ResNet18ImageNet", "ResNet6ImageNet"])
def test_large_stem_takes_any_size(name, size):
    net, out = shape(name, size)
    assert out == (2, 10)
    assert count(net) == {"ResNet18ImageNet": 11_181_642, "ResNet6ImageNet": 4_910_922}[name]


@pytest.mark.parametrize("name", ["LeNet", "AlexNet", "VGG11", "ResNet6ImageNet", "ResNet18_AP"])
def test_a_step_of_training_lowers_the_loss(name):
    torch.manual_seed(0)
    net, images, labels = build_network(name, 32, 3), torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2] * 2)
    losses = []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(2):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0] and all(weight.grad is not None for weight in net.parameters())


def test_adaptive_is_the_same_network_at_32_pixels():
    images = torch.randn(2, 3, 32, 32)
    for name in ("LeNet", "AlexNet", "VGG11"):
        net, other = build_network(name, 32, 4), build_network(f"{name}_Adaptive", 32, 4)
        FlatModule(other).load(FlatModule(net).flatten())
        assert torch.allclose(net(images), other(images), atol=1e-6)


def test_the_vggs_at_64_pixels_take_one_position_of_four():
    """DATM's 1×1 pooling of stride 2 averages nothing."""
    net = build_network("VGG11_Tiny", 64, 4)
    *maps, pool, flatten = net.features
    images = torch.randn(2, 3, 64, 64)
    last = nn.Sequential(*maps)(images)
    assert last.shape == (2, 512, 2, 2)
    assert torch.equal(flatten(pool(last)), last[:, :, 0, 0])


@pytest.mark.parametrize("bottleneck", [False, True])
def test_averaging_blocks_have_no_stride(bottleneck):
    for averaging in (False, True):
        block = Block(16, 8, 2, "in", averaging, bottleneck)
        strides = [m.stride[0] for m in block.modules() if isinstance(m, nn.Conv2d)]
        pools = [m for m in block.modules() if isinstance(m, nn.AvgPool2d)]
        assert (max(strides), len(pools)) == ((1, 2) if averaging else (2, 0))
        assert block(torch.randn(2, 16, 8, 8)).shape == (2, 32 if bottleneck else 8, 4, 4)


def test_a_block_is_the_sum_of_its_two_ways():
    block, maps = Block(8, 8, 1, "in", False, False), torch.randn(2, 8, 4, 4)
    assert len(block.shortcut) == 0
    assert torch.equal(block(maps), (block.body(maps) + maps).relu())


def test_parameter_order_of_a_block():
    """Convolution and norm in turn, the shortcut last: the order of published flat vectors."""
    shapes = [tuple(weight.shape) for weight in Block(4, 8, 2, "in", False, False).parameters()]
    assert shapes == [(8, 4, 3, 3), (8,), (8,), (8, 8, 3, 3), (8,), (8,), (8, 4, 1, 1), (8,), (8,)]


def test_side_after():
    layers = [nn.Conv2d(3, 4, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(3)]
    for side in (20, 31, 64):
        assert side_after(layers, side) == nn.Sequential(*layers)(torch.zeros(1, 3, side, side)).shape[-1]
    assert side_after(layers, 4) == 0


def test_spellings():
    for typed in ("resnet18bn", "RESNET18BN", "ResNet-18-BN"):
        assert is_network(typed) and has_batch_norm(shape(typed, 32)[0])
    assert count(shape("vgg-11", 32)[0]) == 9_231_114
    assert is_network("ConvNetD4") and not is_network("resnet19")


def test_list():
    names = list_networks()
    assert names == NETWORKS.names() and {"ConvNet", "MLP", *(name for name, _ in PUBLISHED)} <= set(names)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mlpp", "unknown network 'mlpp' .did you mean 'mlp'..; known: ConvNet .*, AlexNet"),
        ("resnet19", "did you mean 'resnet18'"),
        ("VGG11_Ti", "did you mean 'VGG11_Tiny'"),
    ],
)
def test_unknown_names(name, says):
    with pytest.raises(UserError, match=says) as caught:
        build_network(name, 32, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "channels", "says"),
    [
        ("ResNet18", 64, 3, "images of 3 × 64 × 64, only of 32 pixels; take ResNet18_Adaptive or ResNet18_Tiny"),
        ("resnet18_ap", 64, 3, "take ResNet18_AP_Adaptive$"),
        ("AlexNet", 28, 3, "only of 32 pixels; take AlexNet_Adaptive$"),
        ("VGG11BN", 128, 3, "take VGG11BN_Adaptive$"),
        ("LeNet", 32, 1, "of 28 or 32 pixels; take LeNet_Adaptive"),  # its classifier would see 6 × 6
        ("AlexNet_Tiny", 32, 3, "only of 64 pixels; take AlexNet_Adaptive$"),
        ("LeNet_Tiny", 64, 1, "take LeNet_Adaptive"),
        ("VGG11_Adaptive", 16, 3, "nothing left of 16 pixels"),
        ("LeNet_Adaptive", 15, 3, "nothing left of 15 pixels"),
        ("ResNet18_AP_Adaptive", 7, 3, "nothing left of 7 pixels"),
    ],
)
def test_sizes_that_a_network_does_not_take(name, size, channels, says):
    with pytest.raises(UserError, match=says):
        build_network(name, size, 10, channels)
