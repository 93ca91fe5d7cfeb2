"""Parameter groups: what is decayed and layer-adapted, and what is not."""

from __future__ import annotations

from typing import Any

from torch import nn

ParamGroup = dict[str, Any]


def decayed_and_plain(module: nn.Module) -> list[ParamGroup]:
    """Two groups: kernels (weight decay and layer adaptation) and the rest (``plain``: neither).

    Plain are all tensors with at most one dimension: biases, normalisation scales and shifts.
    """
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups: list[ParamGroup] = [{"params": decayed, "plain": False}, {"params": plain, "plain": True, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
