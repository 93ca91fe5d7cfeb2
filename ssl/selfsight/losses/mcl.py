"""Multistage contrastive learning (Zhang et al. 2024, arXiv 2402.11816): negatives from one's own cluster alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.nn.precision import full_precision
from selfsight.nn.sphere import normalise


@full_precision
def cluster_ntxent(z1: Tensor, z2: Tensor, clusters: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent whose negatives are the other images of the anchor's cluster, in both views; per anchor.

    What batches of one cluster each come to, for batches that mix clusters. An image alone in its cluster costs 0. The
    formula is the paper's; its authors change the batches and not the loss.

    Args:
        z1, z2: ``[B, D]`` unit rows. clusters: ``[B]`` int64.

    Returns:
        ``[2B]``, the first view's anchors first.
    """
    B, z = len(z1), torch.cat([z1, z2])
    similarity = z @ z.T / temperature  # [2B, 2B]
    own = clusters.repeat(2)
    apart = (own[:, None] != own) | torch.eye(2 * B, dtype=torch.bool, device=z.device)
    positive = torch.arange(2 * B, device=z.device).roll(B)
    return F.cross_entropy(similarity.masked_fill(apart, -torch.inf), positive, reduction="none")


@full_precision
def concatenated(features: Tensor) -> Tensor:
    """Features ``[S, N, D]`` of all stages side by side, divided by the norm of the whole: ``[N, S D]``."""
    return normalise(features.transpose(0, 1).flatten(1))
