"""Herding, k-center and forgetting against numbers worked by hand and against slow, obvious twins."""

import subprocess
import sys

import pytest
import torch

from methods.core import coresets
from methods.core.coresets import DEFINITIONS, NEVER, CoresetConfig, forgetting, herding, k_center
from tests.conftest import ROOT
from utils.errors import UserError

LINE = torch.tensor([[0.0], [1.0], [2.0], [9.0]])  # its mean is 3


def points(count=200, width=7, seed=0, far=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + far


def herding_by_trying(features, count):
    """Every sample is tried at every pick, in float64."""
    features, chosen = features.double(), []
    for _ in range(count):
        gaps = [
            torch.inf if i in chosen else float((features.mean(0) - features[[*chosen, i]].mean(0)).norm())
            for i in range(len(features))
        ]
        chosen.append(min(range(len(gaps)), key=gaps.__getitem__))
    return chosen


def k_center_by_matrix(features, count):
    """From all distances between samples, in float64."""
    features = features.double()
    apart = (features[:, None] - features).norm(dim=2)
    chosen = [int((features - features.mean(0)).norm(dim=1).argmin())]
    while len(chosen) < count:
        left = [i for i in range(len(features)) if i not in chosen]
        chosen.append(max(left, key=lambda i: float(apart[i, chosen].min())))
    return chosen


def test_herding_by_hand():
    # 2 is nearest to 3. With 0, 1 or 9 the mean becomes 1, 1.5 or 5.5: 1 it is. Then 0 gives 1 and 9 gives 4.
    assert herding(LINE, 4).tolist() == [2, 1, 3, 0]


def test_k_center_by_hand():
    # 2 is nearest to 3; 9 is 7 away; then 0 is 2 away from the nearest chosen, and 1 only 1.
    assert k_center(LINE, 4).tolist() == [2, 3, 0, 1]


TWINS = [(herding, herding_by_trying), (k_center, k_center_by_matrix)]
BOTH = pytest.mark.parametrize("choose", [herding, k_center])


@pytest.mark.parametrize("far", [0.0, 1000.0])  # far from the origin: |x|² − 2xp + |p|² would lose its digits there
@pytest.mark.parametrize(("choose", "slow"), TWINS)
def test_equals_its_slow_twin(choose, slow, far):
    features = points(far=far)
    chosen = choose(features, 40)
    assert chosen.dtype == torch.long and chosen.tolist() == slow(features, 40)


@BOTH
def test_blocks_change_nothing(choose, monkeypatch):
    features = points(99, 33)
    whole = choose(features, 50)
    for rows in (1, 7, 98):
        monkeypatch.setattr(coresets, "_ROWS", rows)
        assert torch.equal(choose(features, 50), whole)


@BOTH
def test_fewer_are_the_beginning_of_more(choose):
    assert torch.equal(choose(points(), 30)[:10], choose(points(), 10))


@BOTH
def test_equal_samples_are_chosen_once_each_the_lower_index_first(choose):
    assert choose(torch.ones(5, 3), 5).tolist() == [0, 1, 2, 3, 4]
    # Two places, as far off as cancellation needs; both are taken before any comes again.
    two = 300 + torch.tensor([[0.001], [0.0], [0.001], [0.0]]).expand(4, 50)
    chosen = choose(two.contiguous(), 4).tolist()
    assert sorted(chosen) == [0, 1, 2, 3]
    assert {index % 2 for index in chosen[:2]} == {0, 1}


@BOTH
def test_all_samples_and_a_single_one(choose):
    assert sorted(choose(points(64), 64).tolist()) == list(range(64))
    assert choose(points(1), 1).tolist() == [0]


@BOTH
def test_features_stay_as_they_are(choose):
    features = points()
    before = features.clone()
    choose(features, 20)
    assert torch.equal(features, before)


@BOTH
@pytest.mark.parametrize("count", [0, 201])
def test_impossible_numbers(choose, count):
    with pytest.raises(UserError, match=f"cannot choose {count} of 200 samples; the number must be 1 to 200"):
        choose(points(), count)


@BOTH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_no_numbers(choose, bad):
    features = points()
    features[3, 2] = bad
    with pytest.raises(UserError, match="some features are not finite"):
        choose(features, 5)


# Sample by sample over four epochs: flips 2, 0 (never wrong), never right, 1, 1, 0 (learned late).
HISTORY = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 1]]).T.bool()


def test_forgetting_by_hand():
    assert forgetting(HISTORY, 6).tolist() == [2, 0, 3, 4, 1, 5]
    assert forgetting(HISTORY, 5, never="drop").tolist() == [0, 3, 4, 1, 5]
    assert forgetting(HISTORY, 1).tolist() == [2]


def test_ties_of_forgetting_are_in_the_order_of_a_seed_and_only_ties():
    found = {tuple(forgetting(HISTORY, 6, rng=torch.Generator().manual_seed(seed)).tolist()) for seed in range(30)}
    assert found == {(2, 0, *middle, *last) for middle in ((3, 4), (4, 3)) for last in ((1, 5), (5, 1))}
    history = torch.rand(5, 500, generator=torch.Generator().manual_seed(0)) < 0.5
    history[0] = True  # nobody is never right
    flips = (history[:-1] & ~history[1:]).sum(0)
    assert forgetting(history, 400, "drop").tolist() == sorted(range(500), key=lambda i: (-flips[i], i))[:400]
    few, many = (forgetting(history, n, "drop", torch.Generator().manual_seed(1)) for n in (100, 300))
    assert torch.equal(few, many[:100])


def test_too_few_to_forget():
    with pytest.raises(UserError, match="cannot choose 7 of 6 samples; the number must be 1 to 6"):
        forgetting(HISTORY, 7)
    with pytest.raises(UserError, match="cannot choose 6 of 5 samples that were ever right; take --never_learned most"):
        forgetting(HISTORY, 6, never="drop")
    with pytest.raises(UserError, match="forgetting compares epochs, 1 is too few"):
        forgetting(HISTORY[:1], 2)


def test_each_has_a_sentence_for_reports():
    assert list(DEFINITIONS) == ["herding", "kcenter", "forgetting"] and list(NEVER) == ["most", "drop"]


def test_which_need_experts():
    expert, raw = CoresetConfig(), CoresetConfig(coreset_features="raw")
    assert expert.needs_experts(["random", "herding"]) and expert.needs_experts(["kcenter"])
    assert raw.needs_experts(["herding", "forgetting"]) and not raw.needs_experts(["herding", "kcenter"])
    assert not expert.needs_experts(["distilled", "random", "full"])


def test_what_nothing_would_read():
    expert, raw = CoresetConfig(), CoresetConfig(coreset_features="raw")
    assert set(expert.idle_for(["distilled"])) == {"buffer_path", "coreset_features", "never_learned"}
    assert set(expert.idle_for(["herding"])) == {"never_learned"}
    assert set(raw.idle_for(["kcenter"])) == {"never_learned", "buffer_path"}
    assert set(raw.idle_for(["forgetting"])) == {"coreset_features"}


@pytest.mark.slow
@pytest.mark.parametrize("choose", ["herding", "k_center"])
def test_memory_at_scale(choose):
    """145,000 features of 400 bytes: a copy would be 58 MB, a matrix of distances 84 GB."""
    code = f"""
import resource, torch
from methods.core.coresets import {choose}
torch.set_num_threads(1)
{choose}(torch.rand(3000, 100), 2)
features = torch.empty(145_000, 100).uniform_()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
{choose}(features, 20)
print((peak() - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 12  # MB: a block, and some vectors of 0.6
