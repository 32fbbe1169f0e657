"""The students of the protocol with hard labels: published sizes, the three stems, how weights begin."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks.resnet import Block
from networks.students import build_student, student_depth
from utils.errors import UserError


def weights(net):
    return sum(part.numel() for part in net.parameters())


@pytest.mark.parametrize(
    ("net_type", "size", "depth", "count"),
    [
        ("convnet", 224, 6, 754_570),
        ("resnet_ap", 224, 10, 4_910_922),
        ("resnet", 224, 18, 11_181_642),
        ("densenet", 32, 0, 1_000_618),
    ],
)
def test_published_numbers_of_weights(net_type, size, depth, count):
    assert weights(build_student(net_type, size, 10)) == count
    assert student_depth(net_type, size) == depth


def test_widths_and_norms_change_the_weights_as_named():
    assert weights(build_student("convnet", 32, 10, depth=3, width=0.5)) == 86_282  # ConvNetW64
    assert weights(build_student("resnet_ap", 64, 10, width=0.25)) < 4_910_922 / 10
    batch, plain = build_student("resnet_ap", 32, 10, norm="batch"), build_student("resnet_ap", 32, 10, norm="none")
    assert any(isinstance(part, nn.BatchNorm2d) for part in batch.modules())
    convs = [part for part in plain.modules() if isinstance(part, nn.Conv2d)]
    assert all(part.bias is not None for part in convs)  # no norm has one for them
    assert not any(isinstance(part, (nn.BatchNorm2d, nn.GroupNorm)) for part in plain.modules())


@pytest.mark.parametrize(
    ("net_type", "size", "sides"),
    [
        ("resnet_ap", 224, [56, 56, 28, 14, 7]),
        ("resnet_ap", 128, [64, 64, 32, 16, 8]),
        ("resnet_ap", 64, [64, 64, 32, 16, 8]),
        ("resnet", 224, [56, 56, 28, 14, 7]),
        ("resnet", 128, [64, 64, 32, 16, 8]),
        ("resnet", 32, [32, 32, 16, 8, 4]),
    ],
)
def test_the_stem_follows_the_size(net_type, size, sides):
    net = build_student(net_type, size, 10, depth=10)
    found, maps = [], torch.zeros(1, 3, size, size)
    for layer in net.features[:-2]:  # without the last average
        maps = layer(maps)
        found.append(maps.shape[-1])
    assert found[-5:] == sides  # of the stem and the four stages
    assert net.features[0].kernel_size == ((7, 7) if size > 128 else (3, 3))


def test_averages_stand_after_the_first_relu_and_before_the_shortcuts_norm():
    torch.manual_seed(0)
    maps, block = torch.randn(2, 4, 6, 6), Block(4, 8, 2, "in", averaging=True, bottleneck=False)
    one, two, side = (part for part in block.modules() if isinstance(part, nn.Conv2d))
    body = F.avg_pool2d(F.group_norm(one(maps), 8).relu(), 2)
    shortcut = F.group_norm(F.avg_pool2d(side(maps), 2), 8)
    assert torch.allclose(block(maps), (F.group_norm(two(body), 8) + shortcut).relu(), atol=1e-6)


def test_convolutions_begin_by_the_published_rule():
    torch.manual_seed(0)
    net = build_student("resnet", 64, 10)
    for part in net.modules():
        if isinstance(part, nn.Conv2d) and part.weight.numel() > 1e5:
            wanted = (2 / (part.kernel_size[0] ** 2 * part.out_channels)) ** 0.5
            assert part.weight.std().item() == pytest.approx(wanted, rel=0.02)


def test_cifars_resnets_are_narrower():
    net = build_student("resnet_ap", 32, 10, cifar=True)
    assert [part.weight.shape[0] for part in net.modules() if isinstance(part, nn.Linear)] == [10]
    assert net.num_features == 256
    assert len(build_student("resnet", 32, 10, cifar=True).features) == len(net.features) + 4  # n = 2 instead of 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(net_type="resnet", depth=12), "there is no ResNet of --depth 12; choose from 10, 18"),
        (dict(net_type="convnet", depth=10), "halves the image 10 times"),
        (dict(net_type="resnet", norm="none"), "--norm_type none is for"),
        (dict(net_type="resnet", depth=4, cifar=True), "has no blocks"),
    ],
)
def test_what_does_not_exist_is_refused(options, told):
    with pytest.raises(UserError, match=told):
        build_student(image_size=224, num_classes=10, **options)


def test_too_small_an_image_is_refused():
    with pytest.raises(UserError, match="too small for a ResNet-AP"):
        build_student("resnet_ap", 4, 10)
