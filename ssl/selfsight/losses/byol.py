"""BYOL's loss (Grill et al. 2020, equation 2; google-deepmind/deepmind-research, byol)."""

from __future__ import annotations

from torch import Tensor

from selfsight.losses.ntxent import unit
from selfsight.nn.precision import full_precision


@full_precision
def distances(p: Tensor, z: Tensor) -> Tensor:
    """``| p / |p| - z / |z| |^2 = 2 - 2 cos(p, z)`` row by row: 0 for equal directions, 2 for orthogonal ones.

    A norm is taken as at least 1e-6, as in the authors' code, which floors its square at 1e-12. No gradient reaches z.

    Args:
        p, z: ``[B, D]`` predictions, and projections by the target network.

    Returns:
        ``[B]``.
    """
    return (unit(p) - unit(z.detach())).square().sum(1)


@full_precision
def byol(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Each view's prediction against the target's projection of the other view.

    ``L = mean_b ( |p1 - z2'|^2 + |p2 - z1'|^2 )`` of unit vectors: the sum of both directions, from 0 to 8, and 4 where
    all are orthogonal.

    Args:
        p1, p2: ``[B, D]`` predictions of the online network. z1, z2: ``[B, D]`` projections of the target network.
    """
    return (distances(p1, z2) + distances(p2, z1)).mean()
