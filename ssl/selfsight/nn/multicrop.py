"""A backbone on crops of several sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def multi_crop(backbone: nn.Module, crops: Sequence[Tensor]) -> Tensor:
    """Pooled features of all crops, with one forward for each run of neighbouring crops of equal size.

    BatchNorm therefore sees every resolution by itself, and all crops of a resolution together (SwAV, src/resnet50.py);
    a forward per crop trains another network.

    Args:
        crops: M tensors ``[B, 3, h, w]``.
    Returns:
        ``[M B, F]``, crop by crop: row ``v B + b`` belongs to crop v of image b.
    """
    runs = itertools.groupby(crops, key=lambda crop: crop.shape[-2:])
    return torch.cat([backbone(torch.cat(list(run))) for _, run in runs])
