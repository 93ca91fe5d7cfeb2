"""The loss of CLIP and ALIGN: two embeddings of one thing find each other in the batch, both ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.nn.distributed import gather, rank
from selfsight.nn.precision import full_precision


@full_precision
def pair_contrast(a: Tensor, b: Tensor, *, scale: float, normalize: bool = True) -> Tensor:
    """``( mean CE(s a b^T) + mean CE(s b a^T) ) / 2`` over the pairs of all processes, row i being right for row i.

    Args:
        a, b: ``[B, D]`` of this process. scale: s, one over the temperature.
        normalize: False compares rows as they are.
    """
    if normalize:
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    own = torch.arange(len(a), device=a.device) + rank() * len(a)
    both = F.cross_entropy(scale * a @ gather(b).T, own) + F.cross_entropy(scale * b @ gather(a).T, own)
    return both / 2
