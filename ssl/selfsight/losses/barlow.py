"""The loss of Barlow Twins (Zbontar et al. 2021, equations 1 and 2; facebookresearch/barlowtwins, main.py)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from selfsight.errors import UserError
from selfsight.nn.distributed import sum_over_ranks, world_size
from selfsight.nn.precision import full_precision


class BarlowTerms(NamedTuple):
    """Both sums of the loss, and the matrix ``C [D, D]`` they are taken from."""

    on_diagonal: Tensor
    off_diagonal: Tensor
    C: Tensor


@full_precision
def barlow_twins(z1: Tensor, z2: Tensor, *, batch_size: int | None = None) -> BarlowTerms:
    """The cross-correlation of two views' embeddings should be the identity.

    ``L = sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2`` with ``C = z1^T z2 / N``, the sum over the images of all
    processes. Both sums are returned, for the caller to weigh. Constant embeddings have C = 0 and ``L = D``.

    Args:
        z1, z2: ``[B, D]`` of this process, row i of both from the same image, each column of zero mean and unit
            variance over all processes (a BatchNorm without scale and shift).
        batch_size: N, as the authors' code takes the one of the configuration; None: the images there are. They differ
            in an incomplete batch.

    Raises:
        UserError: a single image, of which no correlation can be taken.
    """
    images = len(z1) * world_size()
    if images < 2:
        raise UserError(
            "Barlow Twins got a batch of one image and correlates over a batch; set batch_size to 2 or more."
        )
    C = sum_over_ranks(z1.T @ z2 / (batch_size or images))
    diagonal = C.diagonal()
    off_diagonal = C.square().sum() - diagonal.square().sum()
    return BarlowTerms((diagonal - 1).square().sum(), off_diagonal, C)
