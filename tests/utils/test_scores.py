"""The metrics of ELEVATER: the specification's figures, and slow obvious twins."""

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from utils.errors import RunError, UserError
from utils.scores import accuracy, classification_score, eleven_point_map, mean_per_class, roc_auc


def predicted(*classes):
    """Scores whose highest are these classes."""
    return torch.eye(max(classes) + 1)[list(classes)]


def column(*values):
    return torch.tensor(values)[:, None]


def test_mean_per_class_is_not_accuracy():
    scores, labels = predicted(0, 0, 1, 1), torch.tensor([0, 0, 0, 1])
    assert mean_per_class(scores, labels) == pytest.approx(83.33, abs=0.01)
    assert accuracy(scores, labels) == 75


@pytest.mark.parametrize("seed", range(3))
def test_mean_per_class_is_balanced_accuracy(seed):
    rng = torch.Generator().manual_seed(seed)
    scores, labels = torch.rand(60, 7, generator=rng), torch.randint(6, (60,), generator=rng)  # class 6 has no image
    kept = scores[:, :6]
    expected = 100 * balanced_accuracy_score(labels, kept.argmax(1))
    assert mean_per_class(torch.cat([kept, torch.full((60, 1), -1.0)], 1), labels) == pytest.approx(expected)


def test_roc_auc_counts_ordered_pairs():
    labels = torch.tensor([0, 0, 1, 1])
    assert roc_auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), labels) == 75
    assert roc_auc(torch.zeros(4), labels) == 50


def test_roc_auc_of_logits_is_that_of_class_1s_probability():
    logits = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(40) % 2
    assert classification_score("roc_auc", logits, labels) == pytest.approx(roc_auc(logits.softmax(1)[:, 1], labels))
    # Probabilities of 1 - 1e-20 and 1 - 1e-30 are one float; the logits still tell them apart.
    sure = torch.tensor([[0.0, 50.0], [0.0, 70.0]])
    assert classification_score("roc_auc", sure, torch.tensor([0, 1])) == 100


def test_roc_auc_needs_both_classes():
    with pytest.raises(UserError, match="two classes"):
        roc_auc(torch.zeros(3), torch.ones(3))


def test_eleven_points():
    found = eleven_point_map(column(0.9, 0.8, 0.7, 0.1), column(1, 0, 1, 0).bool())
    assert found == pytest.approx(84.8485, abs=1e-4)


def test_the_artificial_end_point_is_elevaters():
    scores, positive = column(0.9, 0.8, 0.1), column(0, 1, 1).bool()
    assert eleven_point_map(scores, positive) == pytest.approx(66.6667, abs=1e-4)
    assert eleven_point_map(scores, positive, compat=True) == pytest.approx(69.6970, abs=1e-4)


def eleven_points_by_hand(scores, positive):
    """The definition, one threshold at a time."""
    points = []
    for threshold in scores.tolist():
        taken = scores >= threshold
        hits = int((taken & positive).sum())
        points.append((hits, hits / int(taken.sum())))
    total = int(positive.sum())
    return sum(max(p for hits, p in points if 10 * hits >= tenth * total) for tenth in range(11)) / 11


@pytest.mark.parametrize("seed", range(5))
def test_eleven_points_equal_the_definition_with_ties(seed):
    rng = torch.Generator().manual_seed(seed)
    scores, positive = torch.randint(0, 8, (50, 3), generator=rng).float(), torch.rand(50, 3, generator=rng) < 0.3
    expected = sum(eleven_points_by_hand(scores[:, k], positive[:, k]) for k in range(3)) / 3
    assert eleven_point_map(scores, positive) == pytest.approx(100 * expected)


def test_a_softmax_over_classes_changes_the_ranking():
    logits = torch.tensor([[2.0, 0.0], [1.0, -3.0]])
    assert logits.softmax(1)[:, 0].tolist() == pytest.approx([0.881, 0.982], abs=1e-3)
    positive = torch.tensor([[True, False], [False, False]])
    assert classification_score("11point_mAP", logits, positive) == 100
    # The positive comes second: precision 1/2 everywhere but at the end point.
    assert classification_score("11point_mAP", logits, positive, compat=True) == pytest.approx(54.5, abs=0.1)


def test_classes_without_a_positive_do_not_count():
    scores, positive = torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.tensor([[True, False], [False, False]])
    assert eleven_point_map(scores, positive) == 100
    with pytest.raises(UserError, match="no test image has a label"):
        eleven_point_map(scores, positive & False)


def test_what_is_not_finite_or_unknown_is_told():
    with pytest.raises(RunError, match="not finite"):
        classification_score("accuracy", torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))
    with pytest.raises(UserError, match="unknown metric 'f1'; known: accuracy"):
        classification_score("f1", torch.zeros(1, 2), torch.tensor([0]))
