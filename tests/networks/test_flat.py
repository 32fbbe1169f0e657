"""FlatModule against the network itself, ordinary back-propagation and finite differences."""

import pytest
import torch
from torch import nn

from networks import build_network
from networks.flat import FlatModule
from networks.heads import ProjectionHead
from utils.rng import seeded


def small(norm=""):
    with seeded(0):
        return build_network(f"ConvNetD1W4{norm}", 8, 3).double()


def test_round_trip_and_order():
    net = small()
    flat = FlatModule(net)
    assert flat.size == sum(weight.numel() for weight in net.parameters())
    assert [name for name, _ in flat.shapes] == [name for name, _ in net.named_parameters()]
    expected = torch.cat([weight.detach().reshape(-1) for weight in net.parameters()])
    assert torch.equal(flat.flatten(), expected)
    vector = torch.randn(flat.size, dtype=torch.float64)
    flat.load(vector)
    assert torch.equal(flat.flatten(), vector)
    flat.flatten().zero_()
    assert torch.equal(flat.flatten(), vector), "flatten gives a copy"
    assert all(weight.is_leaf and weight.requires_grad for weight in net.parameters())


def test_equals_the_network():
    net, images = small(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    flat = FlatModule(net)
    vector = torch.randn(flat.size, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(flat(vector, images).square().sum(), vector)
    assert not torch.equal(flat.flatten(), vector.detach()), "a call leaves the network's own weights alone"
    flat.load(vector)
    assert torch.equal(net(images), flat(vector, images))
    net(images).square().sum().backward()
    assert torch.allclose(gradient, torch.cat([weight.grad.reshape(-1) for weight in net.parameters()]))


@pytest.mark.parametrize("norm", ["IN", "BN", "GN"])
def test_second_derivatives(norm):
    net = small(norm).train()
    flat = FlatModule(net)
    vector = flat.flatten().requires_grad_()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 3, dtype=torch.float64)

    def step(vector, images):
        loss = (flat(vector, images) * weights).tanh().sum()
        (gradient,) = torch.autograd.grad(loss, vector, create_graph=True)
        return vector - 0.1 * gradient

    assert torch.autograd.gradcheck(lambda *args: flat(*args), (vector, images), fast_mode=True)
    # Two unrolled steps, so BatchNorm is called again before the first call is differentiated.
    assert torch.autograd.gradcheck(lambda *args: step(step(*args), args[1]), (vector, images), fast_mode=True)


def test_frozen_parameters_and_buffers_are_the_networks_own():
    net = small("BN")
    for weight in net.features[0].parameters():
        weight.requires_grad_(False)
    flat = FlatModule(net)
    assert [name for name, _ in flat.shapes] == [
        "features.1.weight",
        "features.1.bias",
        "classifier.weight",
        "classifier.bias",
    ]
    before = net.features[1].running_mean.clone()
    flat(flat.flatten(), torch.randn(4, 3, 8, 8, dtype=torch.float64))
    assert not torch.equal(net.features[1].running_mean, before)


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    flat = FlatModule(Tied())
    assert flat.size == 9
    assert torch.allclose(flat(2 * torch.eye(3).reshape(-1), torch.ones(1, 3)), torch.full((1, 3), 4.0))


def test_wrong_length_is_refused():
    flat = FlatModule(small())
    with pytest.raises(ValueError, match="weight vector"):
        flat(torch.zeros(flat.size + 1), torch.zeros(1, 3, 8, 8))


def test_dropout_is_replayed_by_its_seed():
    head = ProjectionHead(6, 5, dropout=0.5).train()
    flat = FlatModule(head)
    vector, texts = flat.flatten(), torch.randn(4, 6)

    def call(seed):
        with seeded(seed):
            return flat(vector, texts)

    assert torch.equal(call(1), call(1))
    assert not torch.equal(call(1), call(2))
