"""MoCo v3's loss (Chen, Xie and He 2021, algorithm 1; facebookresearch/moco-v3, moco/builder.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.errors import UserError
from selfsight.nn.distributed import gather_without_grad, rank
from selfsight.nn.precision import full_precision


@full_precision
def contrast(q: Tensor, k: Tensor, *, temperature: float) -> Tensor:
    """Each query has to find the key of its image among the keys of all images on all processes.

    ``L = - 2 tau mean_i log( exp(q_i . k_i / tau) / sum_j exp(q_i . k_j / tau) )`` of unit vectors. The keys are those
    of the other view alone, and get no gradient. The factor 2 tau keeps the size of the gradient apart from the
    temperature; ``2 tau ln N`` where nothing is recognised.

    Args:
        q, k: ``[B, D]`` of this process, row i of both from the same image; B equal on all processes.

    Raises:
        UserError: the temperature is not positive.
    """
    if temperature <= 0:
        raise UserError(
            f"MoCo v3's temperature is {temperature}; it has to be above 0 (0.2 for ViTs, 1 for ResNet-50)."
        )
    keys = gather_without_grad(F.normalize(k, dim=1))  # [N, D]
    own = torch.arange(len(q), device=q.device) + rank() * len(q)
    return 2 * temperature * F.cross_entropy(F.normalize(q, dim=1) @ keys.T / temperature, own)
