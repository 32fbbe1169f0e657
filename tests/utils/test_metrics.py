"""Recall against sorting, ties, the facts of the papers; mean ± std."""

import pytest
import torch

from utils.errors import RunError, UserError
from utils.metrics import format_bytes, format_mean_std, mean_std, recall_at_k, retrieval_recall

KS = (1, 2, 3, 5, 10)


def sorted_recall(scores, positive, ties="against"):
    """The slow obvious twin: sort each query's candidates, see where its first positive stands."""
    ranks = []
    for row, is_positive in zip(scores.tolist(), positive.tolist(), strict=True):
        last = ties == "against"  # what a tie puts last: the positives or the negatives
        order = sorted(zip(row, is_positive, strict=True), key=lambda pair: (-pair[0], pair[1] == last))
        ranks.append([hit for _, hit in order].index(True))
    return {k: 100 * sum(rank < k for rank in ranks) / len(ranks) for k in KS}


@pytest.mark.parametrize("ties", ["against", "for"])
@pytest.mark.parametrize("seed", range(10))
def test_recall_equals_sorting_with_many_ties(seed, ties):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (60, 25), generator=rng).float() / 8
    positive = torch.rand(60, 25, generator=rng) < 0.1
    positive[torch.arange(60), torch.randint(25, (60,), generator=rng)] = True
    assert recall_at_k(scores, positive, KS, ties) == sorted_recall(scores, positive, ties)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rounding", [1, 64])  # small integers make ties nearly everywhere
def test_retrieval_equals_sorting(seed, rounding):
    rng = torch.Generator().manual_seed(seed)
    count = torch.randint(5, 7, (30,), generator=rng)  # 5 or 6 captions an image
    image_of = torch.arange(30).repeat_interleave(count)
    image_of = image_of[torch.randperm(len(image_of), generator=rng)]  # in no order
    images = (torch.randn(30, 4, generator=rng) * rounding).round() / rounding
    texts = ((images[image_of] + torch.randn(len(image_of), 4, generator=rng)) * rounding).round() / rounding
    scores, owns = images @ texts.T, image_of == torch.arange(30)[:, None]
    tr, ir = sorted_recall(scores, owns), sorted_recall(scores.T, owns.T)

    found = retrieval_recall(images, texts, image_of, KS)
    assert {k: found[f"tr@{k}"] for k in KS} == tr
    assert {k: found[f"ir@{k}"] for k in KS} == ir
    assert 0 < tr[1] < 100 or rounding == 1


def test_blocks_of_rows_join():
    # 1,200 images x 1,200 texts exceed one block of 2**20 scores; the last block is smaller than the first.
    embeddings = torch.randn(1200, 8, generator=torch.Generator().manual_seed(0))
    texts = embeddings.roll(1, 0) + embeddings
    scores, owns = embeddings @ texts.T, torch.eye(1200, dtype=torch.bool)
    found = retrieval_recall(embeddings, texts, torch.arange(1200))
    expected = {f"tr@{k}": value for k, value in recall_at_k(scores, owns).items()}
    expected |= {f"ir@{k}": value for k, value in recall_at_k(scores.T, owns).items()}
    assert expected.items() <= found.items()


# Spec fact 10.1: three images, four captions; captions 0 and 1 describe image 0.
SCORES = torch.tensor([[0.9, 0.2, 0.8, 0.1], [0.3, 0.7, 0.6, 0.5], [0.4, 0.1, 0.65, 0.45]])
IMAGE_OF = torch.tensor([0, 0, 1, 2])


def test_worked_example():
    owns = torch.arange(3)[:, None] == IMAGE_OF
    tr, ir = recall_at_k(SCORES, owns, (1, 2)), recall_at_k(SCORES.T, owns.T, (1, 2, 3))
    assert tr == pytest.approx({1: 100 / 3, 2: 100})
    assert ir == {1: 25, 2: 75, 3: 100}
    # The same scores as embeddings: the image matrix is the scores, the texts are unit vectors.
    found = retrieval_recall(SCORES, torch.eye(4), IMAGE_OF, (1, 2))
    assert found == pytest.approx(
        {"ir@1": 25, "ir@2": 75, "tr@1": 100 / 3, "tr@2": 100, "ir_mean": 50, "tr_mean": 200 / 3, "r_mean": 175 / 3}
    )


def test_two_equal_scores():
    scores, positive = torch.tensor([[0.5, 0.5]]), torch.tensor([[True, False]])
    assert recall_at_k(scores, positive, (1, 2)) == {1: 0, 2: 100}
    assert recall_at_k(scores, positive, (1, 2), ties="for") == {1: 100, 2: 100}
    # The reference sorts upwards and reverses, so that of two equals the later wins; counting prefers neither.
    assert scores[0].argsort(stable=True).flip(0).tolist() == [1, 0]
    for truth in ([True, False], [False, True]):
        assert recall_at_k(scores, torch.tensor([truth]), (1,), ties="for") == {1: 100}
        assert recall_at_k(scores, torch.tensor([truth]), (1,)) == {1: 0}
    # Two positives that tie with one another lose nothing.
    assert recall_at_k(scores, torch.tensor([[True, True]]), (1,)) == {1: 100}


def test_collapsed_encoder_scores_nothing():
    found = retrieval_recall(torch.ones(20, 3), torch.ones(100, 3), torch.arange(100) % 20)
    assert set(found.values()) == {0}


def test_perfect_and_default_keys():
    found = retrieval_recall(torch.eye(20), torch.eye(20), torch.arange(20))
    names = ["ir@1", "ir@5", "ir@10", "tr@1", "tr@5", "tr@10", "ir_mean", "tr_mean", "r_mean"]
    assert found == dict.fromkeys(names, 100)


def test_r_mean_is_the_mean_of_the_six():
    rng = torch.Generator().manual_seed(3)
    found = retrieval_recall(
        torch.randn(50, 4, generator=rng), torch.randn(250, 4, generator=rng), torch.arange(250) // 5
    )
    six = [found[f"{way}@{k}"] for way in ("ir", "tr") for k in (1, 5, 10)]
    assert found["r_mean"] == pytest.approx(sum(six) / 6)


def test_k_beyond_the_candidates():
    scores = torch.tensor([[0.1, 0.9, 0.9]])
    assert recall_at_k(scores, torch.tensor([[True, False, False]]), (2, 3, 10)) == {2: 0, 3: 100, 10: 100}


def test_half_precision_embeddings_are_scored_in_float32():
    embeddings = torch.eye(12).half() * 300  # products of 90,000 overflow float16
    assert retrieval_recall(embeddings, embeddings, torch.arange(12))["r_mean"] == 100


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("side", [0, 1])
def test_embeddings_that_are_not_finite(bad, side):
    sides = [torch.ones(3, 2), torch.ones(3, 2)]
    if bad == 1e30:  # finite, yet their product is not
        sides[1 - side][1, 1] = bad
    sides[side][1, 1] = bad
    with pytest.raises(RunError, match="embeddings are not finite"):
        retrieval_recall(*sides, torch.arange(3))


def test_mistakes():
    with pytest.raises(UserError, match=r"1 of 3 images have no caption, e\.g\. image 1"):
        retrieval_recall(torch.ones(3, 2), torch.ones(2, 2), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="image_of names image 0 to 3 of 3"):
        retrieval_recall(torch.ones(3, 2), torch.ones(2, 2), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="expected"):
        retrieval_recall(torch.ones(3, 2), torch.ones(2, 3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="at least one positive"):
        recall_at_k(torch.ones(2, 2), torch.tensor([[True, False], [False, False]]))
    with pytest.raises(ValueError, match="one"):
        recall_at_k(torch.ones(2, 2), torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="'against' or 'for'"):
        recall_at_k(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), ties="none")
    with pytest.raises(RunError, match="embeddings are not finite"):
        recall_at_k(torch.tensor([[0.1, torch.nan]]), torch.tensor([[True, False]]))


def test_mean_std_is_the_population_one():
    assert mean_std([1, 2, 3, 4]) == pytest.approx((2.5, 1.25**0.5))
    assert mean_std(iter([torch.tensor(7.0)])) == (7, 0)
    assert format_mean_std(9.94, 0.26) == "9.9 ± 0.3"
    assert format_mean_std(9.94, 0.26, digits=2) == "9.94 ± 0.26"
    assert format_mean_std(-0.04, 0.3) == "0.0 ± 0.3" and format_mean_std(-0.06, 0.3) == "-0.1 ± 0.3"
    with pytest.raises(ValueError, match="no values"):
        mean_std([])


def test_bytes_are_told_in_thousands():
    told = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_949: "999.9 kB", 999_950: "1.0 MB", 59_921_540: "59.9 MB"}
    told |= {2_500_000_000: "2.5 GB", 7_000_000_000_000: "7000.0 GB"}
    assert {count: format_bytes(count) for count in told} == told
