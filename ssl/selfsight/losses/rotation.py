"""The loss of rotation prediction (Gidaris, Singh, Komodakis 2018, equations 2 and 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from selfsight.nn.precision import full_precision


@full_precision
def rotation_loss_per_image(logits: Tensor, labels: Tensor) -> Tensor:
    """``l(x) = - 1/K sum_y log softmax(logits of x turned by y)_y``: cross-entropy averaged over an image's K copies.

    Args:
        logits: ``[K B, K]``, the K copies of an image next to each other. labels: ``[K B]`` int64.
    Returns:
        ``[B]``.
    """
    K = logits.shape[1]
    return F.cross_entropy(logits, labels, reduction="none").unflatten(0, (-1, K)).mean(1)


def rotation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of `rotation_loss_per_image`; ``ln K`` where nothing is recognised."""
    return rotation_loss_per_image(logits, labels).mean()
