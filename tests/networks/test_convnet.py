"""ConvNets by name: sizes as published, what each part of a name does, and images that are too small."""

import pytest
import torch
from torch import nn

from networks import build_network, has_batch_norm
from utils.errors import UserError

# Name, side, classes, channels, weights: the table of published sizes.
PUBLISHED = [
    ("ConvNet", 32, 10, 3, 320_010),
    ("ConvNet", 32, 100, 3, 504_420),
    ("ConvNetD1", 32, 10, 3, 331_530),
    ("ConvNetD2", 32, 10, 3, 233_610),
    ("ConvNetD3", 32, 10, 3, 320_010),
    ("ConvNetD4", 32, 10, 3, 452_490),
    ("ConvNetD5", 32, 10, 3, 596_490),
    ("ConvNetD3", 64, 200, 3, 1_938_120),
    ("ConvNetD4", 64, 200, 3, 857_160),
    ("ConvNetD4", 64, 1000, 3, 2_496_360),
    ("ConvNetD5", 128, 10, 3, 615_690),
    ("ConvNetD6", 128, 10, 3, 748_170),
    ("ConvNetD5", 256, 10, 3, 677_130),
    ("ConvNetD6", 256, 10, 3, 763_530),
    ("ConvNet", 256, 10, 3, 1_610_250),
    ("ConvNet", 28, 10, 1, 317_706),
    ("ConvNetW32", 32, 10, 3, 24_714),
    ("ConvNetW64", 32, 10, 3, 86_282),
    ("ConvNetW128", 32, 10, 3, 320_010),
    ("ConvNetW256", 32, 10, 3, 1_229_834),
    ("ConvNetW512", 32, 10, 3, 4_818_954),
    ("ConvNetW1024", 32, 10, 3, 19_075_082),
    ("ConvNetKIP", 32, 10, 3, 19_068_938),
    ("ConvNetNN", 32, 10, 3, 319_242),
    ("ConvNetBN", 32, 10, 3, 320_010),
    ("ConvNetIN", 32, 10, 3, 320_010),
    ("ConvNetGN", 32, 10, 3, 320_010),
    ("ConvNetLN", 32, 10, 3, 663_306),
    ("ConvNetAS", 32, 10, 3, 320_010),
    ("ConvNetAR", 32, 10, 3, 320_010),
    ("ConvNetAL", 32, 10, 3, 320_010),
    ("ConvNetAP", 32, 10, 3, 320_010),
    ("ConvNetMP", 32, 10, 3, 320_010),
    ("ConvNetNP", 32, 10, 3, 1_610_250),
    ("ConvNetGAP", 32, 10, 3, 300_810),
    ("ConvNet-3", 32, 10, 3, 320_010),
    ("ConvNet-3-BN", 32, 10, 3, 320_010),
    ("ConvNet-4", 64, 200, 3, 857_160),
]
# The six of PoDD: CIFAR-10, CIFAR-100, CUB at 32 pixels, Tiny at 64.
PODD = {
    "ConvNet": (320_010, 504_420, 709_320, 1_938_120),
    "ConvNetNN": (319_242, 503_652, 708_552, 1_937_352),
    "ConvNetD4": (452_490, 498_660, 549_960, 857_160),
    "ConvNetW128x2": (1_562_634, 2_300_004, 3_119_304, 8_034_504),
    "ConvNetD4W128x2": (6_243_338, 6_612_068, 7_021_768, 9_479_368),
    "ConvNetW128x2BN": (1_562_634, 2_300_004, 3_119_304, 8_034_504),
}
PUBLISHED += [
    (name, size, classes, 3, count)
    for name, counts in PODD.items()
    for (size, classes), count in zip(((32, 10), (32, 100), (32, 200), (64, 200)), counts, strict=True)
]


@pytest.mark.parametrize(("name", "size", "classes", "channels", "count"), PUBLISHED)
def test_sizes_as_published(name, size, classes, channels, count):
    with torch.device("meta"):
        net = build_network(name, size, classes, channels)
        assert net(torch.zeros(2, channels, size, size)).shape == (2, classes)
    assert sum(weight.numel() for weight in net.parameters()) == count


@pytest.mark.parametrize("size", [28, 32, 50])
@pytest.mark.parametrize("name", ["ConvNetD2W8", "ConvNetD1W8ALGNNP", "ConvNetD2W8ASLNMP", "ConvNetW8BNGAP"])
def test_the_size_of_the_image_is_that_of_the_data(name, size):
    """The reference builds its W, A, N and P variants for 32 pixels alone."""
    for channels in (1, 3):
        assert build_network(name, size, 5, channels)(torch.randn(2, channels, size, size)).shape == (2, 5)


@pytest.mark.parametrize("norm", ["", "BN", "IN", "LN", "GN", "NN"])
def test_features(norm):
    net = build_network(f"convnetd2w8{norm}", 20)
    assert net(torch.randn(2, 3, 20, 20)).shape == (2, 8 * 5 * 5) == (2, net.num_features)


def kinds(name):
    """What the layers of a net of one block are: convolution, norm, activation, pool."""
    return [type(layer) for layer in build_network(name, 8, 2).features]


@pytest.mark.parametrize(
    ("letters", "place", "kind"),
    [
        ("AS", 2, nn.Sigmoid),
        ("AR", 2, nn.ReLU),
        ("AL", 2, nn.LeakyReLU),
        ("NN", 1, nn.Identity),
        ("BN", 1, nn.BatchNorm2d),
        ("LN", 1, nn.LayerNorm),
        ("IN", 1, nn.GroupNorm),
        ("GN", 1, nn.GroupNorm),
        ("NP", 3, nn.Identity),
        ("MP", 3, nn.MaxPool2d),
        ("AP", 3, nn.AvgPool2d),
    ],
)
def test_each_part_of_a_name_changes_its_own_layer(letters, place, kind):
    wanted = [nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.AvgPool2d, nn.Flatten]
    assert kinds("ConvNetD1W8") == wanted
    wanted[place] = kind
    assert kinds(f"ConvNetD1W8{letters}") == kinds(f"convnetd1w8{letters.lower()}") == wanted


def test_parts_of_a_name_together():
    net = build_network("ConvNetD4W64GNMP", 64, 10)
    convs = [layer for layer in net.features if isinstance(layer, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [64] * 4
    assert [layer.num_groups for layer in net.features if isinstance(layer, nn.GroupNorm)] == [4] * 4
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in net.features) == 4
    assert build_network("ConvNetD1ALLNNP", 8, 2).features[2].negative_slope == 0.01
    assert [layer.num_groups for layer in build_network("ConvNetD1W8", 8).features[1:2]] == [8]


def test_doubled_widths():
    def widths(name):
        net = build_network(name, 32, 10)
        return [layer.out_channels for layer in net.features if isinstance(layer, nn.Conv2d)]

    assert widths("ConvNetD4W4x2") == widths("convnetd4w4X2ALBNMP") == [4, 8, 16, 32]
    assert widths("ConvNetD4W4") == [4] * 4 and widths("convnetw4") == [4] * 3
    assert has_batch_norm(build_network("ConvNetD1W4x2BN", 8))
    assert build_network("ConvNetD2W4x2", 8)(torch.randn(2, 3, 8, 8)).shape == (2, 8 * 2 * 2)


def test_dd_rankings_spellings():
    def described(name):
        return repr(build_network(name, 32, 10))

    assert described("ConvNet-3") == described("ConvNet") != described("ConvNet-4") == described("ConvNetD4")
    assert described("ConvNet-3-BN") == described("convnetBN") != described("ConvNet-3")


def test_weights_are_drawn_as_torch_draws_them():
    """And in the order of the layers, so that a seed means the same network everywhere."""
    torch.manual_seed(0)
    net = build_network("ConvNetD2W8", 8, 3)
    torch.manual_seed(0)
    wanted = [nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), nn.Conv2d(8, 8, 3), nn.GroupNorm(8, 8), nn.Linear(32, 3)]
    parts = [part for layer in wanted for part in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), parts, strict=True))


def test_batch_norm_is_told():
    assert has_batch_norm(build_network("ConvNetD1W4BN", 8)) and has_batch_norm(build_network("ConvNet-3-BN", 8))
    assert not any(has_batch_norm(build_network(f"ConvNetD1W4{norm}", 8)) for norm in ("", "GN", "LN", "NN"))


def test_parameter_order():
    names = [name for name, _ in build_network("ConvNetD1", 8, 2).named_parameters()]
    assert names == [
        *("features.0.weight", "features.0.bias", "features.1.weight", "features.1.bias"),
        *("classifier.weight", "classifier.bias"),
    ]


def test_instance_norm_forgets_brightness():
    net = build_network("ConvNetD1W8", 8).eval()
    images = torch.randn(2, 3, 8, 8)
    # Away from the padded border a constant added to all pixels moves every channel by a constant.
    norm = net.features[:2]
    torch.nn.init.zeros_(norm[0].weight)
    torch.nn.init.constant_(norm[0].weight[:, 0, 1, 1], 1.0)
    assert torch.allclose(norm(images), norm(images + 3), atol=1e-5)
    assert not torch.allclose(norm[0](images), norm[0](images + 3), atol=1e-1)


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("ConvNetD6", 32, "too few"),
        ("ConvNetD7", 64, "too few .* at most 6"),
        ("ConvNetD8", 128, "too few .* at most 7"),
        ("ConvNetX3", 32, "cannot read"),
        ("ConvNetX2", 32, "cannot read"),
        ("ConvNetW8x3", 32, "cannot read"),
        ("ConvNetD32W128x2NP", 32, "doubles its width to 274877906944, more than 65536; take less"),
        ("ConvNetW6x2GN", 32, "multiple of 4"),
        ("ConvNetBNAS", 32, "cannot read .* in this order"),
        ("ConvNet-", 32, "cannot read"),
        ("ConvNetW6GN", 32, "multiple of 4"),
        ("ConvNetD0", 32, "at least 1"),
        ("ConvNetD99999999999", 32, "too few"),
        ("ConvNetD99999999999NP", 32, "too deep"),
    ],
)
def test_errors(name, size, says):
    with pytest.raises(UserError, match=says) as caught:
        build_network(name, size, 10)
    assert "\n" not in str(caught.value)
