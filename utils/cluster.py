"""Clusters of points, the points that belong to none, and real points that stand for clusters.

scikit-learn does the work on one thread: with several the order of summation, and so the last bits of a centre, depends
on their race.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

# Above this many points full k-means takes minutes; mini-batches find centres nearly as good in seconds.
_MANY = 20_000


def inliers(features: Tensor, contamination: float, neighbours: int = 10) -> Tensor:
    """(N,) bool: all points of `features` (N, D) but the share `contamination` that lies loosest among its neighbours.

    About that share goes, whether it is far out or not: 130 of 1300 at 0.1; 0 keeps all. Loose is what has a high local
    outlier factor (Breunig et al., 2000) among `neighbours` points, or among all others where these are fewer, and then
    a far point may well be missed. UserError above 0.5.
    """
    if not 0 <= contamination <= 0.5:
        raise UserError(f"a share of {contamination} cannot be outliers; it must be 0 (keep all) to 0.5")
    if contamination == 0 or len(features) < 2:
        return torch.ones(len(features), dtype=torch.bool)
    from sklearn.neighbors import LocalOutlierFactor

    factor = LocalOutlierFactor(n_neighbors=min(neighbours, len(features) - 1), contamination=contamination)
    return torch.from_numpy(_on_one_thread(factor.fit_predict, features) == 1)


def outliers(count: int, contamination: float) -> int:
    """How many of `count` points `inliers` leaves out, if no two are equally loose."""
    if count < 3:
        return 0  # two are always
    return math.ceil(contamination * (count - 1) - 1e-9)  # those below a percentile between points


def kmeans(features: Tensor, k: int, seed: int, restarts: int = 10) -> tuple[Tensor, Tensor]:
    """The cluster of each point of `features` (N, D), (N,) long, and the mean of each cluster, (k, D) float32.

    The best of `restarts` runs of full k-means. Where fewer than k points differ, some clusters have no point. Equal
    input and seed give equal clusters. UserError unless 1 ≤ k ≤ N.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Number of distinct clusters")  # as said above
        found = _fitted(features, k, seed, restarts)
    labels, centres = torch.from_numpy(found.labels_).long(), torch.from_numpy(found.cluster_centers_).float()
    points = features.detach().cpu()
    for cluster in labels.unique().tolist():  # its last step moves the points, not the centres
        centres[cluster] = points[labels == cluster].double().mean(0)
    return labels, centres


def nearest_to_centres(features: Tensor, k: int, seed: int) -> Tensor:
    """(k,) long: distinct indices of the points nearest to the k-means centres of `features` (N, D).

    Two centres never share a point: the second takes its nearest one that is left. Equal input and seed give equal
    indices. UserError unless 1 ≤ k ≤ N.
    """
    found = _fitted(features, k, seed, 1, len(features) > _MANY)
    centres = torch.from_numpy(found.cluster_centers_).float()
    points = features.detach().cpu().float()
    taken = torch.zeros(len(points), dtype=torch.bool)
    chosen = []
    for some in centres.split(64):
        for distance in torch.cdist(some, points, compute_mode="donot_use_mm_for_euclid_dist"):  # (N,)
            nearest = int(distance.masked_fill_(taken, torch.inf).argmin())
            taken[nearest] = True
            chosen.append(nearest)
    return torch.tensor(chosen)


def _fitted(features: Tensor, k: int, seed: int, restarts: int, in_batches: bool = False) -> Any:
    """scikit-learn's k-means of these points."""
    if not 1 <= k <= len(features):
        raise UserError(f"cannot choose {k} of {len(features)} points; the number must be 1 to {len(features)}")
    from sklearn.cluster import KMeans, MiniBatchKMeans

    kind = MiniBatchKMeans if in_batches else KMeans
    return _on_one_thread(kind(n_clusters=k, n_init=restarts, random_state=seed % 2**32).fit, features)


def _on_one_thread(fit: Any, features: Tensor) -> Any:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        return fit(features.detach().cpu().float().numpy())
