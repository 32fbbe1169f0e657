"""Points nearest to k-means centres."""

import pytest
import torch

from utils import cluster
from utils.cluster import nearest_to_centres
from utils.errors import UserError


def blobs(count=4, each=30, seed=0):
    rng = torch.Generator().manual_seed(seed)
    centres = 20 * torch.eye(count, 5)
    points = centres.repeat_interleave(each, 0) + torch.randn(count * each, 5, generator=rng)
    return points + 1000  # far from the origin: a careless |x|² − 2xc + |c|² would lose its digits


@pytest.mark.parametrize("many", [10, 20_000])  # mini-batches, full k-means
def test_one_point_of_each_cluster_the_nearest_to_its_mean(many, monkeypatch):
    monkeypatch.setattr(cluster, "_MANY", many)
    points = blobs()
    chosen = nearest_to_centres(points, 4, seed=1)
    assert chosen.dtype == torch.long and chosen.shape == (4,)
    assert sorted((chosen // 30).tolist()) == [0, 1, 2, 3]
    if many == 20_000:
        own = points.double().view(4, 30, 5)
        nearest = (own - own.mean(1, keepdim=True)).square().sum(2).argmin(1) + 30 * torch.arange(4)
        assert sorted(chosen.tolist()) == nearest.tolist()


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_centres_never_share_a_point():
    # Twelve centres, but points at two places only: taken points must be passed over.
    points = torch.cat([torch.zeros(6, 2), torch.ones(6, 2)])
    assert len(set(nearest_to_centres(points, 12, seed=0).tolist())) == 12


def test_the_seed_decides():
    points = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    first = nearest_to_centres(points, 20, seed=5)
    assert torch.equal(first, nearest_to_centres(points, 20, seed=5))
    assert not torch.equal(first, nearest_to_centres(points, 20, seed=6))
    assert len(nearest_to_centres(points, 3, seed=2**62)) == 3  # as long as derive_seed makes them


def test_all_points():
    assert sorted(nearest_to_centres(blobs(), 120, seed=0).tolist()) == list(range(120))


@pytest.mark.parametrize("k", [0, 121])
def test_impossible_numbers(k):
    with pytest.raises(UserError, match=f"cannot choose {k} of 120 points; the number must be 1 to 120"):
        nearest_to_centres(blobs(), k, seed=0)
