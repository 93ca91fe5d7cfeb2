"""Gradients made shorter tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from selfsight.optim.layerwise import norms


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradient of every tensor by itself to a norm of at most ``max_norm``, in place (DINO, utils.py).

    ``g <- g min(1, max_norm / (|g| + 1e-6))``. A bound on the norm of all gradients together, the usual one, is another
    rule.

    Returns:
        ``[n]``: the norms before, of the parameters that have a gradient.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(0)
    lengths = norms(gradients)
    torch._foreach_mul_(gradients, list((max_norm / (lengths + 1e-6)).clamp(max=1.0).unbind()))
    return lengths
