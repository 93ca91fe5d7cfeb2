"""LAMB: Adam whose steps are scaled to the norm of each weight tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from selfsight.optim.layerwise import LayerwiseOptimizer, norms, trust_ratios


class LAMB(LayerwiseOptimizer):
    """LAMB as SparK runs it (pretrain/utils/lamb.py, after timm 0.5); You et al. 2020.

    All gradients are first divided by ``max(1, |all gradients| / max_grad_norm)``. With Adam's moments ``m, v`` the
    update of a tensor is ``u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w``, and
    ``w <- w - lr |w| / |u| u`` (ratio 1 where a norm is zero). Groups with ``plain=True`` take Adam steps: no decay,
    and no ratio unless ``always_adapt``.

    Args:
        grad_averaging: False adds gradients to ``beta1 m`` as they are, and not times ``1 - beta1``.
        trust_clip: ratios are at most 1, so that no step is longer than Adam's. Both are options of the authors' file.

    Attributes:
        gradient_norm: 0-d tensor, norm of all gradients of the last step before clipping; None before the first.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float | None,
        eps: float = 1e-6,
        bias_correction: bool = True,
        always_adapt: bool = False,
        grad_averaging: bool = True,
        trust_clip: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "step": 0,
            "bias_correction": bias_correction, "always_adapt": always_adapt, "plain": False,
        }  # fmt: skip
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self.grad_averaging, self.trust_clip = grad_averaging, trust_clip
        self.gradient_norm: Tensor | None = None

    def _begin(self, gradients: list[Tensor]) -> None:
        self.gradient_norm = torch.linalg.vector_norm(norms(gradients))

    def _update(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        if self.max_grad_norm is not None and self.gradient_norm is not None:
            excess = (self.gradient_norm / self.max_grad_norm).clamp(min=1.0)
            gradients = list(torch._foreach_div(gradients, excess))
        (beta1, beta2), t = group["betas"], group["step"] + 1
        group["step"] = t
        m, v = self._buffers(weights, "exp_avg"), self._buffers(weights, "exp_avg_sq")
        if self.grad_averaging:
            torch._foreach_lerp_(m, gradients, 1 - beta1)
        else:
            torch._foreach_mul_(m, beta1)
            torch._foreach_add_(m, gradients)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)

        corrections = (1 - beta1**t, 1 - beta2**t) if group["bias_correction"] else (1.0, 1.0)
        denominators = list(torch._foreach_sqrt(v))
        torch._foreach_div_(denominators, math.sqrt(corrections[1]))
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(denominators, corrections[0])
        updates = list(torch._foreach_div(m, denominators))
        if not group["plain"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        if group["always_adapt"] or not group["plain"]:
            ratios = trust_ratios(weights, updates)
            torch._foreach_mul_(updates, [r.clamp(max=1.0) for r in ratios] if self.trust_clip else ratios)
        torch._foreach_add_(weights, updates, alpha=-group["lr"])
