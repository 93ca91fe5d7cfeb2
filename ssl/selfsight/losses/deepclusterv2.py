"""DeepCluster-v2: k-means on the sphere and the loss on its clusters (Caron et al. 2020, appendix D)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.nn.distributed import all_reduce_sum, mean_count
from selfsight.nn.precision import full_precision

#: cluster of an image that no embedding is known of
UNASSIGNED = -100
#: dot products computed at a time
BLOCK = 2**26


@full_precision
@torch.no_grad()
def spherical_kmeans(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Clusters of directions: assign to the largest dot product, average, put the mean back on the sphere.

    An empty cluster keeps its centroid (authors' main_deepclusterv2.py), and so does one whose mean has no direction.

    Args:
        x: ``[N, D]`` unit rows of this process; sums run over all processes.
        centroids: ``[K, D]`` to start from, the same on every process.
    Returns:
        centroids ``[K, D]`` and the nearest of them for each row, ``[N]`` int64.
    """
    K, D = centroids.shape
    for _ in range(iterations):
        nearest = _nearest(x, centroids)
        total = all_reduce_sum(x.new_zeros(K, D).index_add_(0, nearest, x))
        # the length of the mean drops out, and with it the number of rows
        centroids = F.normalize(torch.where(total.any(1, keepdim=True), total, centroids), dim=1)
    return centroids, _nearest(x, centroids)


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """``[N]``: row of the largest dot product; some rows at a time, since a million images times 3,000 are 12 GB."""
    rows = max(1, BLOCK // len(centroids))
    return torch.cat([(part @ centroids.T).argmax(dim=1) for part in x.split(rows)])


@full_precision
def cluster_prediction(scores: Sequence[Tensor], clusters: Tensor, *, temperature: float) -> Tensor:
    """Cross entropy of every crop with the cluster of its image, mean over the heads.

    ``L = 1/H sum_h CE(scores_h / temperature, clusters_h)`` over the ``M B`` crops whose image has a cluster; 0 when no
    image has one.

    Args:
        scores: for each of H heads ``[M B, K_h]``, crop by crop.
        clusters: ``[H, B]`` int64, `UNASSIGNED` where there is none.
    """
    losses = []
    for s, c in zip(scores, clusters, strict=True):
        target = c.repeat(len(s) // len(c))
        total = F.cross_entropy(s / temperature, target, ignore_index=UNASSIGNED, reduction="sum")
        losses.append(total / mean_count(target != UNASSIGNED))
    return torch.stack(losses).mean()
