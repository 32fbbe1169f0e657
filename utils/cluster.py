"""Real points that stand for clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.errors import UserError

# Above this many points full k-means takes minutes; mini-batches find centres nearly as good in seconds.
_MANY = 20_000


def nearest_to_centres(features: Tensor, k: int, seed: int) -> Tensor:
    """(k,) long: distinct indices of the points nearest to the k-means centres of `features` (N, D).

    Two centres never share a point: the second takes its nearest one that is left. Equal input and seed give equal
    indices. UserError unless 1 ≤ k ≤ N.
    """
    if not 1 <= k <= len(features):
        raise UserError(f"cannot choose {k} of {len(features)} points; the number must be 1 to {len(features)}")
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    points = features.detach().cpu().float()
    kmeans = MiniBatchKMeans if len(points) > _MANY else KMeans
    # One thread: with several the order of summation, and so the last bits of a centre, depends on their race.
    with threadpool_limits(limits=1):
        found = kmeans(n_clusters=k, n_init=1, random_state=seed % 2**32).fit(points.numpy())
    centres = torch.from_numpy(found.cluster_centers_).float()

    taken = torch.zeros(len(points), dtype=torch.bool)
    chosen = []
    for some in centres.split(64):
        for distance in torch.cdist(some, points, compute_mode="donot_use_mm_for_euclid_dist"):  # (N,)
            nearest = int(distance.masked_fill_(taken, torch.inf).argmin())
            taken[nearest] = True
            chosen.append(nearest)
    return torch.tensor(chosen)
