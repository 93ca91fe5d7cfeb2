"""What methods without negatives watch: whether embeddings have collapsed, and whether there is a network to train."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.errors import UserError
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


def refuse_frozen(backbone: nn.Module, method: str) -> None:
    """
    Raises:
        UserError: no parameter of the backbone is trained, so that a predictor would learn what does not change.
    """
    trained = [p.requires_grad for p in backbone.parameters()]
    if trained and not any(trained):
        raise UserError(
            f"{method} was given a frozen backbone, which its predictor would learn to copy; unfreeze it with "
            "requires_grad_(True), or measure it as it is with `selfsight linear`."
        )
