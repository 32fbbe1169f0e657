"""Outliers, clusters, and the points nearest to their centres."""

import warnings

import pytest
import torch

from utils import cluster
from utils.cluster import inliers, kmeans, nearest_to_centres, outliers
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


# Two corners of three points, and one point far from both.
CORNERS = torch.tensor([(0, 0), (0, 1), (1, 0), (10, 10), (10, 11), (11, 10)], dtype=torch.float32)
FAR = torch.cat([CORNERS, torch.tensor([[100.0, 100.0]])])


class TestKMeans:
    def test_two_corners(self):
        labels, centres = kmeans(CORNERS, 2, seed=0)
        assert labels.dtype == torch.long and centres.dtype == torch.float32
        assert torch.allclose(centres.sort(0).values, torch.tensor([[1 / 3] * 2, [31 / 3] * 2]))
        assert float((CORNERS - centres[labels]).square().sum()) == pytest.approx(8 / 3)

    def test_rows_may_come_in_any_order(self):
        labels, centres = kmeans(CORNERS, 2, seed=0)
        for seed in range(10):
            order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
            others, moved = kmeans(CORNERS[order], 2, seed=0)
            assert torch.allclose(moved[others], centres[labels][order])

    def test_one_outlier_eats_a_prototype(self):
        centres = kmeans(FAR, 2, seed=0)[1]
        assert torch.allclose(centres.sort(0).values, torch.tensor([[16 / 3] * 2, [100.0] * 2]))

    def test_a_centre_is_the_mean_of_its_points(self):
        points = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
        labels, centres = kmeans(points, 7, seed=3)
        for number in range(7):
            assert torch.equal(centres[number], points[labels == number].double().mean(0).float())
        again = kmeans(points, 7, seed=3)
        assert torch.equal(labels, again[0]) and torch.equal(centres, again[1])

    def test_far_from_the_origin(self):
        labels, centres = kmeans(blobs(), 4, seed=0)
        assert [len(set(some.tolist())) for some in labels.view(4, 30)] == [1] * 4
        assert centres[labels[::30]].sub(blobs().double().view(4, 30, 5).mean(1)).abs().max() < 1e-4

    @pytest.mark.filterwarnings("error")
    def test_points_at_two_places_only(self):
        labels, centres = kmeans(torch.cat([torch.zeros(6, 2), torch.ones(6, 2)]), 5, seed=0)
        assert len(labels.unique()) == 2 and centres.shape == (5, 2) and torch.isfinite(centres).all()

    @pytest.mark.parametrize("k", [0, 5])
    def test_impossible_numbers(self, k):
        with pytest.raises(UserError, match=f"cannot choose {k} of 3 points; the number must be 1 to 3"):
            kmeans(torch.zeros(3, 2), k, seed=0)


class TestInliers:
    def test_the_far_point_goes(self):
        kept = inliers(FAR, 0.1, neighbours=2)
        assert kept.dtype == torch.bool and kept.tolist() == [True] * 6 + [False]

    def test_among_too_few_points_it_may_stay(self):
        """Ten neighbours are six here: everybody is as loose as anybody, and sklearn says nothing."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert inliers(FAR, 0.1).all()

    def test_the_factors_behind_both(self):
        """Two neighbours tell the far point; ten are all the others of seven points, and tell none."""
        from sklearn.neighbors import LocalOutlierFactor

        two, all_others = (
            -LocalOutlierFactor(n_neighbors=count).fit(FAR.numpy()).negative_outlier_factor_ for count in (2, 6)
        )
        assert two[6] == pytest.approx(104.9, abs=0.05)
        assert two[:6].min() == pytest.approx(0.927, abs=1e-3) and two[:6].max() == pytest.approx(1.172, abs=1e-3)
        assert all_others.min() >= 0.99 and all_others.max() < 1.015

    @pytest.mark.parametrize("count, gone", [(10, 1), (11, 1), (20, 2), (50, 5), (100, 10), (1300, 130)])
    def test_about_the_share_goes(self, count, gone):
        points = torch.randn(count, 8, generator=torch.Generator().manual_seed(count))
        assert int((~inliers(points, 0.1)).sum()) == gone

    @pytest.mark.parametrize(
        "count, share", [(2, 0.3), (3, 0.3), (7, 0.1), (11, 0.1), (30, 0.2), (31, 1 / 3), (60, 0.5)]
    )
    def test_how_many_will_go_is_known_before(self, count, share):
        points = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
        assert int((~inliers(points, share)).sum()) == outliers(count, share)

    def test_none_goes(self):
        assert inliers(FAR, 0).all() and inliers(FAR[:1], 0.5).tolist() == [True]

    @pytest.mark.parametrize("share", [-0.1, 0.51, float("nan")])
    def test_impossible_shares(self, share):
        with pytest.raises(UserError, match="cannot be outliers; it must be 0"):
            inliers(FAR, share)
