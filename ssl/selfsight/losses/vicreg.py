"""VICReg's loss (Bardes, Ponce and LeCun 2022, section 4.1; facebookresearch/vicreg, main_vicreg.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.errors import UserError
from selfsight.nn.distributed import gather
from selfsight.nn.precision import full_precision

#: added to the variance under the root
EPSILON = 1e-4


@full_precision
def vicreg(x: Tensor, y: Tensor, *, batch_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance and covariance of the embeddings of two views, each to be weighted and summed.

    - invariance ``s = mean_{b,d} (x - y)^2`` of this process
    - variance ``v = ( mean_d relu(1 - S(x_d)) + mean_d relu(1 - S(y_d)) ) / 2``, ``S = sqrt(Var + 1e-4)``, over the N
      images of all processes. The code halves, the paper (equation 1 and section 4.1) adds.
    - covariance ``c = 1/D sum_{i != j} C(x)_ij^2 + 1/D sum_{i != j} C(y)_ij^2``, ``C(x) = x^T x / (N - 1)`` of centred
      columns, over all processes; not halved.

    Args:
        x, y: ``[B, D]`` of this process, row i of both from the same image; B equal on all processes.
        batch_size: N of the covariance, as the authors' code takes the one of the configuration; None: the images there
            are. They differ in an incomplete batch.

    Returns:
        three scalars.

    Raises:
        UserError: a single image, of which no variance can be taken.
    """
    X, Y = gather(x), gather(y)  # [N, D]
    if len(X) < 2:
        raise UserError(
            "VICReg got a batch of one image and takes variances over a batch; set batch_size to 2 or more."
        )
    N, D = batch_size or len(X), X.shape[1]
    invariance = F.mse_loss(x, y)
    variance = torch.stack([F.relu(1 - (e.var(0) + EPSILON).sqrt()).mean() for e in (X, Y)]).mean()
    return invariance, variance, _off_diagonal(X, N) / D + _off_diagonal(Y, N) / D


def _off_diagonal(x: Tensor, N: int) -> Tensor:
    """Squared entries of the covariance ``[D, D]`` of the columns of ``[n, D]``, summed without the diagonal."""
    x = x - x.mean(0)
    C = x.T @ x / (N - 1)
    return C.square().sum() - C.diagonal().square().sum()
