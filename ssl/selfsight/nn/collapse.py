"""Whether embeddings have collapsed: the number that methods without negatives watch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.nn.distributed import gather_without_grad
from selfsight.nn.precision import full_precision


@full_precision
@torch.no_grad()
def embedding_std(z: Tensor) -> Tensor:
    """Spread of unit embeddings: 1 on the whole sphere, near 0 when all have become one.

    The standard deviation of each dimension over the images of all processes, averaged, times ``sqrt(D)`` (SimSiam's
    figure 2 without the factor).

    Args:
        z: ``[B, D]`` of this process, of any length.
    """
    u = gather_without_grad(F.normalize(z, dim=1))
    return u.std(dim=0, correction=0).mean() * u.shape[1] ** 0.5
