"""Layer-wise adaptive SGD: LARS in the forms SimCLR and PixPro train with, and SwAV's LARC."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from selfsight.errors import UserError, nearest
from selfsight.optim.layerwise import LayerwiseOptimizer, norms, trust_ratios

Variant = Literal["classic", "popular", "torch"]


class LARS(LayerwiseOptimizer):
    """SGD with momentum, each tensor's step scaled by ``trust_coefficient |w| / (|g'| + eps)``.

    With ``g' = g + weight_decay w`` and ``r(.)`` that ratio (1 where a norm is zero), the variants are

    - ``classic``: ``v <- momentum v + lr r(g') g'``, ``w <- w - v``. SimCLR (lars_optimizer.py); You et al. 2017.
    - ``torch``: ``v <- momentum v + r(g') g'``, ``w <- w - lr v``. PixPro (contrast/lars.py), with eps 1e-8.
    - ``popular``: ``v <- momentum v + g'``, ``w <- w - lr r(v) v``. An option of SimCLR's.

    ``nesterov`` replaces the ``v`` that is subtracted by ``momentum v`` plus the term that was just added to it.
    Groups with ``plain=True`` take SGD steps: no decay, no ratio.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        nesterov: bool = False,
        variant: Variant = "classic",
    ) -> None:
        variants = get_args(Variant)
        if variant not in variants:
            raise UserError(
                f"The variant of LARS is '{variant}'; one of {', '.join(variants)}.{nearest(variant, variants)}"
            )
        defaults: dict[str, Any] = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient,
            "eps": eps, "nesterov": nesterov, "variant": variant, "plain": False,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _update(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        classic, adapted = group["variant"] == "classic", not group["plain"]
        if adapted:
            gradients = self._adapted(weights, gradients, group)
        if classic:
            gradients = list(torch._foreach_mul(gradients, group["lr"]))
        updates = self._with_momentum(weights, gradients, group)
        if adapted and group["variant"] == "popular":
            ratios = trust_ratios(weights, updates, group["trust_coefficient"], group["eps"])
            updates = list(torch._foreach_mul(updates, ratios))
        torch._foreach_add_(weights, updates, alpha=-1.0 if classic else -group["lr"])

    def _adapted(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Gradients with weight decay, scaled by the ratio unless that waits for the momentum."""
        if group["weight_decay"] != 0:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        if group["variant"] == "popular":
            return gradients
        return list(
            torch._foreach_mul(gradients, trust_ratios(weights, gradients, group["trust_coefficient"], group["eps"]))
        )

    def _with_momentum(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        momentum = group["momentum"]
        if momentum == 0:
            return gradients
        buffers = self._buffers(weights, "momentum_buffer")
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        return list(torch._foreach_add(gradients, buffers, alpha=momentum)) if group["nesterov"] else buffers


class LARC(LARS):
    """SGD on gradients ``a (g + weight_decay w)``, ``a = trust_coefficient |w| / (|g| + weight_decay |w| + eps)``.

    SwAV's optimiser (NVIDIA's apex/parallel/LARC.py around torch's SGD). Unlike LARS it takes the norm of the gradient
    before the decay is added, it does not decay a tensor whose norm or gradient is zero either, and with ``clip`` the
    learning rate bounds the local one, ``a <- min(a / lr, 1)``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        clip: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
            variant="torch",
        )
        self.clip = clip

    def _adapted(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        w, g, decay = norms(weights), norms(gradients), group["weight_decay"]
        local = group["trust_coefficient"] * w / (g + decay * w + group["eps"])
        if self.clip:
            local = (local / group["lr"]).clamp(max=1.0)
        both = (w > 0) & (g > 0)
        scaled = list(torch._foreach_mul(gradients, list(torch.where(both, local, 1.0).unbind())))
        if decay != 0:
            decays = torch._foreach_mul(weights, list(torch.where(both, local * decay, 0.0).unbind()))
            torch._foreach_add_(scaled, decays)
        return scaled
