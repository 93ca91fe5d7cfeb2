"""The few differences between numpy and torch that code written for both has to know."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = Any  # numpy array or torch tensor


def namespace(x: Array) -> Any:
    """The library ``x`` belongs to: torch or numpy."""
    return torch if isinstance(x, torch.Tensor) else np


def constant(values: Any, like: Array) -> Array:
    """Nested numbers as an array of the library, type and device of ``like``."""
    if isinstance(like, torch.Tensor):
        return torch.tensor(values, dtype=like.dtype, device=like.device)
    return np.asarray(values, dtype=like.dtype)


def arange(n: int, like: Array) -> Array:
    """0 .. n - 1 in the library, type and device of ``like``."""
    if isinstance(like, torch.Tensor):
        return torch.arange(n, dtype=like.dtype, device=like.device)
    return np.arange(n, dtype=like.dtype)
