"""The terms of deep co-training (Qiao et al. 2018, sections 3.2 and 3.3), for two networks f and g."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.nn.precision import float32, full_precision


@full_precision
def agreement(f: Tensor, g: Tensor) -> Tensor:
    """``H((p_f + p_g) / 2) - (H(p_f) + H(p_g)) / 2``: Jensen-Shannon divergence of both predictions, averaged.

    Args:
        f, g: ``[M, C]`` logits of unlabelled images.
    """
    log_p, log_q = f.log_softmax(-1), g.log_softmax(-1)
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    # as divergences from the mean, whose terms are small where both agree; entropies would cancel
    apart = log_p.exp() * (log_p - log_mean) + log_q.exp() * (log_q - log_mean)
    return apart.sum(-1).mean() / 2


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

    The gradient is that of L times a factor, which its sign does not know: the factor is such that it does not vanish
    for networks that are sure of their answers.

    Args:
        network: images to logits ``[B, C]``. labels: ``[B]`` int64.
    """
    x = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = float32(network(x))
        right = F.one_hot(labels, logits.shape[1]).bool()
        # L = softplus(wrong - right answer), whose slope is a sigmoid
        margin = logits.masked_fill(right, -torch.inf).logsumexp(1) - logits[right]
        slope = F.logsigmoid(margin.detach())
        (gradient,) = torch.autograd.grad(((slope - slope.max()).exp() * margin).sum(), x)
    return images + epsilon * gradient.sign()
