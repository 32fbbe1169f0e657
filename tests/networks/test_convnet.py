"""ConvNets by name: sizes as published, names, and images that are too small."""

import pytest
import torch

from networks import build_network, list_networks
from utils.errors import UserError


@pytest.mark.parametrize(
    ("name", "size", "classes", "channels", "count"),
    [
        ("ConvNet", 32, 10, 3, 320_010),
        ("ConvNet", 32, 100, 3, 504_420),
        ("ConvNet", 28, 10, 1, 317_706),
        ("ConvNetD4", 32, 10, 3, 452_490),
        ("ConvNetNN", 32, 10, 3, 319_242),
        ("ConvNetW32", 32, 10, 3, 24_714),
        ("ConvNetW256", 32, 10, 3, 1_229_834),
        ("mlp", 32, 10, 3, 411_146),
    ],
)
def test_sizes_as_published(name, size, classes, channels, count):
    net = build_network(name, size, classes, channels)
    assert sum(weight.numel() for weight in net.parameters()) == count
    assert net(torch.zeros(2, channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize("norm", ["", "BN", "IN", "LN", "GN", "NN"])
def test_features(norm):
    net = build_network(f"convnetd2w8{norm}", 20)
    assert net(torch.randn(2, 3, 20, 20)).shape == (2, 8 * 5 * 5) == (2, net.num_features)


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
    ("name", "says"),
    [
        ("ConvNetD6", "too few"),
        ("ConvNetX3", "cannot read"),
        ("ConvNetW6GN", "multiple of 4"),
        ("ConvNetD0", "at least 1"),
        ("mlpp", "did you mean 'mlp'"),
        ("ConvNetD99999999999", "too few"),
    ],
)
def test_errors(name, says):
    with pytest.raises(UserError, match=says) as caught:
        build_network(name, 32, 10)
    assert "\n" not in str(caught.value)


def test_list():
    assert list_networks() == ["convnet", "mlp"]
