"""Several right classes an image: multi-instance prediction of fractals (Anderson and Farrell 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.nn.precision import full_precision


def multi_hot(labels: Tensor, num_classes: int) -> Tensor:
    """``[B, M]`` int64, -1 for none and a class any number of times, to ``[B, C]`` of 0 and 1 (int64)."""
    targets = torch.zeros(len(labels), num_classes + 1, dtype=torch.int64, device=labels.device)
    return targets.scatter_(1, torch.where(labels < 0, num_classes, labels), 1)[:, :num_classes]


@full_precision
def weighted_binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy over images and classes, the present classes of an image weighing as much as all C.

    A positive of a row with P of them weighs C / P, a negative 1.

    Args:
        logits: ``[B, C]``. targets: ``[B, C]`` of 0 and 1.
    """
    targets = targets.to(logits.dtype)
    positives = targets.sum(1, keepdim=True)
    weight = torch.where(positives > 0, logits.shape[1] / positives.clamp(min=1), 1.0)
    return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)
