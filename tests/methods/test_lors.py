"""Losses against the specification's numbers and plain formulas; the learned similarity."""

import math

import pytest
import torch
import torch.nn.functional as F

from methods.lors import KINDS, LOSSES, Similarity, contrastive_loss
from utils.errors import UserError

COSINES = torch.tensor([[0.5, 0.1, 0], [0.2, 0.4, 0.1], [0, 0.3, 0.6]], dtype=torch.float64)
SCALE = 1 / 0.07
EYE = torch.eye(3, dtype=torch.float64)


def similarity(kind, count=6, rank=2, alpha=3.0, seed=0):
    return Similarity(kind, count, rank, alpha, torch.Generator().manual_seed(seed), "cpu")


def moved(kind, dtype=torch.float64, **options):
    """A similarity whose parameters are no longer those of the start."""
    found = similarity(kind, **options)
    rng = torch.Generator().manual_seed(1)
    found.leaves = [
        (leaf.detach() + torch.randn(leaf.shape, generator=rng)).to(dtype).requires_grad_() for leaf in found.leaves
    ]
    return found


def low_rank(alpha):
    """Three pairs, rank 1: the specification's example."""
    found = similarity("lowrank", count=3, rank=1, alpha=alpha)
    values = ([1.0, 1, 1], [[1.0], [2], [-1]], [[0.5], [0], [-0.5]])
    found.leaves = [torch.tensor(value, dtype=torch.float64).requires_grad_() for value in values]
    return found.matrix(torch.arange(3))


def random_logits(size=5, seed=3):
    return 3 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale, value", [(SCALE, 0.054669), (2.659260, 0.568257), (1, 0.864195), (0, math.log(3))])
@pytest.mark.parametrize("target", [None, EYE])
@pytest.mark.parametrize("kind", ["InfoNCE", "NCE"])
def test_infonce_of_the_identity(kind, target, scale, value):
    assert float(contrastive_loss(scale * COSINES, target, kind)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("kind, value", [("WBCE", 0.991158), ("BalanceBCE", 0.991158), ("BCE", 1.321082)])
@pytest.mark.parametrize("target", [None, EYE])
def test_binary_losses_of_the_identity(kind, value, target):
    assert float(contrastive_loss(SCALE * COSINES, target, kind)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    "alpha, matrix, positives, nce, wbce",
    [
        (0.3, [[1.15, 0, -0.15], [0.3, 1, -0.3], [-0.15, 0, 1.15]], {(0, 0), (1, 1), (2, 2)}, -0.944657, 0.562751),
        (3, [[2.5, 0, -1.5], [3, 1, -3], [-1.5, 0, 2.5]], {(0, 0), (1, 0), (1, 1), (2, 2)}, -9.938596, -2.326161),
    ],
)
def test_low_rank_example(alpha, matrix, positives, nce, wbce):
    found = low_rank(alpha).detach()
    torch.testing.assert_close(found, torch.tensor(matrix, dtype=torch.float64))
    assert float(contrastive_loss(SCALE * COSINES, found, "InfoNCE")) == pytest.approx(nce, abs=1e-6)
    assert float(contrastive_loss(SCALE * COSINES, found, "WBCE")) == pytest.approx(wbce, abs=1e-6)
    # The value above shows the split; here it is by name: each set's mean counts half.
    p = (SCALE * COSINES).sigmoid()
    cells = -found * (p + 1e-6).log() - (1 - found) * (1 - p + 1e-6).log()
    sides = [[], []]
    for i in range(3):
        for j in range(3):
            sides[(i, j) in positives].append(float(cells[i, j]))
    assert sum(sum(side) / len(side) for side in sides) / 2 == pytest.approx(wbce, abs=2e-6)


def test_a_half_is_negative():
    target = torch.tensor([[1.0, 0.5], [0, 0.5]], dtype=torch.float64)
    logits = torch.tensor([[2.0, -1], [0, 1]], dtype=torch.float64)
    p = logits.sigmoid()
    cells = -target * (p + 1e-6).log() - (1 - target) * (1 - p + 1e-6).log()
    expected = (cells[0, 0] + (cells.sum() - cells[0, 0]) / 3) / 2
    assert float(contrastive_loss(logits, target, "WBCE")) == pytest.approx(float(expected), rel=1e-5)


def test_bce_is_torchs_where_torch_has_one():
    logits = random_logits()
    target = torch.rand(5, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(contrastive_loss(logits, target, "BCE"), expected)
    assert torch.isfinite(contrastive_loss(100 * logits, 5 * target - 2, "BCE"))  # torch refuses such targets


def test_expanded_nce_is_a_loop():
    logits, target = random_logits(), random_logits(seed=5)
    total = 0.0
    for i in range(5):
        for j in range(5):
            row = logits[i, j] - torch.logsumexp(logits[i], 0)
            column = logits[i, j] - torch.logsumexp(logits[:, j], 0)
            total -= float(target[i, j] * (row + column)) / 5 / 2
    assert float(contrastive_loss(logits, target, "InfoNCE")) == pytest.approx(total)


def test_cwcl_kl_and_mse_by_hand():
    """Logits 0 and ln 3 make every probability a quarter, a half or three quarters."""
    ln3 = math.log(3)
    logits = torch.tensor([[ln3, 0], [0, 0]], dtype=torch.float64)
    target = torch.tensor([[1.0, 1], [0, 2]], dtype=torch.float64)
    # Rows of S over their sums: (½, ½), (0, 1); columns: (1, 0), (⅓, ⅔). Softmax: (¾, ¼), (½, ½) either way.
    to_text = -(0.5 * math.log(0.75) + 0.5 * math.log(0.25) + math.log(0.5)) / 2
    to_image = -(math.log(0.75) + math.log(0.5) / 3 + 2 * math.log(0.5) / 3) / 2
    expected = (to_text + to_image) / 2
    assert float(contrastive_loss(logits, target, "CWCL")) == pytest.approx(expected, rel=1e-5)

    # σ is ¾ and three halves.
    expected = ((0.75 - 1) ** 2 + 0.5**2 + 0.5**2 + 1.5**2) / 4
    assert float(contrastive_loss(logits, target, "MSE")) == pytest.approx(expected)

    tenth = torch.tensor([[ln3 / 10, 0], [0, 0]], dtype=torch.float64)  # softmax(10 S) is softmax of the logits
    assert float(contrastive_loss(logits, tenth, "KL")) == pytest.approx(0, abs=1e-12)
    flat = torch.zeros(2, 2, dtype=torch.float64)  # a half each, against (¾, ¼): ½ ln ⅔ + ½ ln 2, over four cells
    expected = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 4
    assert float(contrastive_loss(logits, flat, "KL")) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["CWCL", "KL"])
def test_both_directions_count_the_same(kind):
    logits, target = random_logits(), random_logits(seed=5).abs()
    swapped = contrastive_loss(logits.T, target.T, kind)
    torch.testing.assert_close(contrastive_loss(logits, target, kind), swapped)


@pytest.mark.parametrize("kind", list(LOSSES))
def test_loss_gradients(kind):
    logits = random_logits(4).requires_grad_()
    target = (0.4 * random_logits(4, seed=6)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, s: contrastive_loss(z, s, kind), (logits, target))


@pytest.mark.parametrize("kind", ["InfoNCE", "WBCE"])
@pytest.mark.parametrize("sim", ["full", "lowrank"])
def test_gradients_reach_what_is_learned(kind, sim):
    found = moved(sim, count=5)
    rows, logits = torch.tensor([3, 0, 4]), random_logits(3)

    def loss(*leaves):
        found.leaves = list(leaves)
        return contrastive_loss(logits, found.matrix(rows), kind)

    leaves = tuple(found.leaves)
    assert torch.autograd.gradcheck(loss, leaves)
    for grad in torch.autograd.grad(loss(*leaves), leaves):
        assert grad[rows].abs().max() > 0
        assert grad[[1, 2]].abs().max() == 0  # of pairs that are not in the batch


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_identity(kind):
    found = similarity(kind)
    matrix = found.matrix(torch.arange(6))
    assert matrix is None if kind == "identity" else torch.equal(matrix, torch.eye(6))
    assert torch.equal(found.saved()[1], torch.eye(6))


def test_low_rank_starts_where_it_can_learn():
    diag, left, right = similarity("lowrank", count=400, rank=5).leaves
    assert torch.equal(diag, torch.ones(400)) and torch.equal(right, torch.zeros(400, 5))
    assert float(left.detach().mean()) == pytest.approx(0, abs=0.1)
    assert float(left.detach().std()) == pytest.approx(1, abs=0.1)
    again, other = (similarity("lowrank", count=400, rank=5, seed=seed).leaves[1] for seed in (0, 1))
    assert torch.equal(left, again) and not torch.equal(left, other)


@pytest.mark.parametrize("count, rank, numbers", [(99, 10, 2079), (499, 40, 40419)])
def test_what_it_costs(count, rank, numbers):
    assert sum(leaf.numel() for leaf in similarity("lowrank", count=count, rank=rank).leaves) == numbers


@pytest.mark.parametrize("kind", ["full", "lowrank"])
def test_a_batch_is_rows_and_columns_of_the_whole(kind):
    found = moved(kind)
    whole, rows = found.matrix(torch.arange(6)), torch.tensor([4, 1, 5, 0])
    assert not torch.allclose(whole, whole.T)  # so that a swap of images and texts would show
    expected = torch.stack([torch.stack([whole[i, j] for j in rows]) for i in rows])
    torch.testing.assert_close(found.matrix(rows), expected)


def test_the_rank_is_at_most_the_number_of_pairs():
    similarity("lowrank", count=4, rank=4)
    with pytest.raises(UserError, match=r"sim_rank is 5 for 4 pairs"):
        similarity("lowrank", count=4, rank=5)
    assert similarity("full", count=4, rank=5).leaves[0].shape == (4, 4)  # where there is no rank, none is checked


def test_saved_as_lors_saves():
    params, matrix = moved("lowrank", count=5, rank=2, alpha=3.0).saved()
    diag, left, right = params
    assert [tuple(part.shape) for part in params] == [(5,), (5, 2), (5, 2)]
    torch.testing.assert_close(matrix, torch.diag(diag) + 3.0 / 2 * left @ right.T)
    params, matrix = moved("full").saved()
    assert len(params) == 1 and torch.equal(params[0], matrix)
    params, matrix = similarity("identity").saved()
    assert len(params) == 1 and torch.equal(params[0], torch.eye(6))
    for kind in ("full", "lowrank"):
        found = moved(kind)
        params, matrix = found.saved()
        assert not any(part.requires_grad for part in (*params, matrix))
        with torch.no_grad():
            found.leaves[0].zero_()
        assert params[0].abs().max() > 0  # a copy, which later steps leave alone
