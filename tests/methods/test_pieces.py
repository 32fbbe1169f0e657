"""A loss summed piece by piece is the loss, and so is its gradient."""

import torch
import torch.nn.functional as F

from methods.core.pieces import summed


def problem():
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(12, generator=rng, dtype=torch.float64)
    images, labels = torch.randn(7, 4, generator=rng, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 2])

    def loss(weights, piece):
        return F.cross_entropy(piece[0] @ weights.view(4, 3), piece[1], reduction="sum") / len(images)

    return weights, images, labels, loss


def test_value_and_gradient_are_those_of_the_whole():
    weights, images, labels, loss = problem()
    whole, part = (weights.clone().requires_grad_() for _ in range(2))
    expected = F.cross_entropy(images @ whole.view(4, 3), labels)
    found = summed(loss, part * 1, zip(images.split(3), labels.split(3), strict=True))  # 3, 3 and 1
    (5 * expected).backward()
    (5 * found).backward()
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(part.grad, whole.grad, rtol=1e-13, atol=1e-15)


def test_only_one_piece_is_in_memory_at_a_time():
    weights, images, labels, _ = problem()
    alive, most = 0, 0

    class Counted(torch.autograd.Function):
        """Counts graphs that have been built and not yet gone back through."""

        @staticmethod
        def forward(ctx, value):
            nonlocal alive, most
            alive, most = alive + 1, max(most, alive + 1)
            return value.clone()

        @staticmethod
        def backward(ctx, upstream):
            nonlocal alive
            alive -= 1
            return upstream

    def loss(weights, piece):
        return (Counted.apply(piece[0] @ weights.view(4, 3))).square().sum()

    summed(loss, weights.requires_grad_(), zip(images.split(1), labels.split(1), strict=True))
    assert (most, alive) == (1, 0)
