"""What LARS, LARC and LAMB share: a step over lists of tensors, and the ratio of a tensor's norm to its update's.

A parameter group with ``plain=True`` is left out of both weight decay and adaptation, whatever its ``weight_decay``
says; ``weight_decay=0`` alone keeps the adaptation. Norms are those of whole tensors, so parameters that are sharded
or flattened into one another will not do. Nothing here waits for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def norms(tensors: list[Tensor]) -> Tensor:
    """``[n]``: the L2 norm of each of ``n`` tensors."""
    return torch.stack(torch._foreach_norm(tensors))


def trust_ratios(
    weights: list[Tensor], updates: list[Tensor], coefficient: float = 1.0, eps: float = 0.0
) -> list[Tensor]:
    """``coefficient |w| / (|u| + eps)`` for every pair of tensors, and 1 where either norm is zero."""
    w, u = norms(weights), norms(updates)
    return list(torch.where((w > 0) & (u > 0), coefficient * w / (u + eps), 1.0).unbind())


class LayerwiseOptimizer(Optimizer, ABC):
    """Calls `_update` once per parameter group with the weights that have a gradient, after `_begin` with all."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; ``closure`` (forward and backward) is called first, so that the gradients are this step's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [(group, [w for w in group["params"] if w.grad is not None]) for group in self.param_groups]
        active = [(group, weights) for group, weights in active if weights]
        if active:
            self._begin([w.grad for _, weights in active for w in weights])
        for group, weights in active:
            self._update(weights, [w.grad for w in weights], group)
        return loss

    def _begin(self, gradients: list[Tensor]) -> None:
        """Sees every gradient of the step before the first update."""

    @abstractmethod
    def _update(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """Change ``weights`` in place; leave ``gradients`` as they are."""

    def _buffers(self, weights: list[Tensor], name: str) -> list[Tensor]:
        """State ``name`` of every weight, zeros at first."""
        for w in weights:
            if name not in self.state[w]:
                self.state[w][name] = torch.zeros_like(w, memory_format=torch.preserve_format)
        return [self.state[w][name] for w in weights]
