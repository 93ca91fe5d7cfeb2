"""Rows of length 1, from rows of any finite length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shrunk(x: Tensor, dim: int) -> Tensor:
    """``x`` divided along ``dim`` by its largest entry where that is above 1: squares of the result do not overflow.

    The divisor is a constant for autograd. The direction is that of x, and so is its gradient.
    """
    return x / x.detach().abs().amax(dim, keepdim=True).clamp(min=1)


def normalise(x: Tensor, dim: int = 1, eps: float = 1e-12) -> Tensor:
    """``x / max(|x|, eps)`` along ``dim``: `F.normalize`, which makes zeros of float32 entries above 1e19."""
    return F.normalize(shrunk(x, dim), dim=dim, eps=eps)


@torch.no_grad()
def directions(x: Tensor, dim: int = 1) -> Tensor:
    """``x / |x|`` along ``dim`` for finite rows of any length, the smallest included; rows of zeros stay zeros.

    For frozen features, of which only the direction counts; rows of a usual size are those of `F.normalize`.
    """
    largest = x.abs().amax(dim, keepdim=True)
    unusual = (largest > 0) & ((largest < 1e-8) | (largest > 1e15))
    return F.normalize(x / largest.where(unusual, torch.ones_like(largest)) if unusual.any() else x, dim=dim)
