"""Stochastic depth: how often, how much, and whose chance it is."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from methods.clip_depth import Depths

CPU = torch.device("cpu")


def seen(step: int, own: slice = slice(0, 400), share: float = 0.2, scale: bool = True) -> torch.Tensor:
    """What two layers make of ones, (2, n)."""
    net = nn.ModuleList([DropPath(share, scale), DropPath(share, scale)])
    Depths(net, 3, 400, own).draw(step, CPU)
    return torch.stack([layer(torch.ones(own.stop - own.start, 2, 3)) for layer in net])[:, :, 0, 0]


@pytest.mark.parametrize("scale", [True, False])
def test_a_layer_leaves_out_its_share_and_keeps_the_mean(scale):
    found = seen(0, scale=scale)
    kept = found > 0
    assert 0.75 < kept.float().mean() < 0.85 and torch.unique(found[kept]).tolist() == pytest.approx(
        [1 / 0.8 if scale else 1.0]
    )


def test_layers_steps_and_images_have_a_chance_of_their_own():
    first, second = seen(0), seen(1)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)
    assert torch.equal(first, seen(0))
    assert torch.equal(first, torch.cat([seen(0, slice(0, 150)), seen(0, slice(150, 400))], dim=1))


def test_nothing_is_left_out_of_what_is_judged():
    net = nn.ModuleList([DropPath(0.5)]).eval()
    Depths(net, 3, 8, slice(0, 8)).draw(0, CPU)
    assert torch.equal(net[0](torch.ones(8, 2)), torch.ones(8, 2))
