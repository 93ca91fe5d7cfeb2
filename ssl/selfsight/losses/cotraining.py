"""The terms of deep co-training (Qiao et al. 2018, sections 3.2 and 3.3), for two networks f and g."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.nn.precision import full_precision


@full_precision
def agreement(f: Tensor, g: Tensor) -> Tensor:
    """``H((p_f + p_g) / 2) - (H(p_f) + H(p_g)) / 2``: Jensen-Shannon divergence of both predictions, averaged.

    Args:
        f, g: ``[M, C]`` logits of unlabelled images.
    """
    p, q = f.softmax(-1), g.softmax(-1)
    mean = (p + q) / 2
    own = _entropy(p, f.log_softmax(-1)) + _entropy(q, g.log_softmax(-1))
    return (_entropy(mean, mean.clamp(min=torch.finfo(mean.dtype).tiny).log()) - own / 2).mean()


@full_precision
def difference(f: Tensor, g: Tensor, f_on_g: Tensor, g_on_f: Tensor) -> Tensor:
    """Each network says of images that fool the other what the other says of them unspoilt.

    ``mean H(p_g(x), p_f(x_g)) + mean H(p_f(x), p_g(x_f))``, x_g being x made to fool g. Gradients reach both sides.

    Args:
        f, g: ``[N, C]`` logits of labelled and unlabelled images. f_on_g: f's logits of x_g. g_on_f: g's of x_f.
    """
    first = -(g.softmax(-1) * f_on_g.log_softmax(-1)).sum(-1).mean()
    return first - (f.softmax(-1) * g_on_f.log_softmax(-1)).sum(-1).mean()


def adversarial(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """``x + epsilon sign(dL/dx)``, L the cross-entropy summed over the batch (Goodfellow et al. 2015).

    Args:
        network: images to logits ``[B, C]``. labels: ``[B]`` int64.
    """
    x = images.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(network(x), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
    return images + epsilon * gradient.sign()


def _entropy(p: Tensor, log_p: Tensor) -> Tensor:
    return -(p * log_p).sum(-1)
