"""SimSiam's loss (Chen and He 2021, equation 2; facebookresearch/simsiam)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from selfsight.nn.precision import full_precision


@full_precision
def simsiam(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Minus the mean cosine of each view's prediction and the other view's projection, which gets no gradient.

    ``L = - (mean_b cos(p1, z2) + mean_b cos(p2, z1)) / 2``, from -1 (they agree) to 1. A norm is taken as at least
    1e-8.

    Args:
        p1, p2: ``[B, D]`` predictions. z1, z2: ``[B, D]`` projections.
    """
    cosines = [F.cosine_similarity(p, z.detach(), eps=1e-8).mean() for p, z in ((p1, z2), (p2, z1))]
    return -(cosines[0] + cosines[1]) / 2
