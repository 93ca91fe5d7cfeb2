"""The few differences between numpy and torch that code written for both has to know."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = Any  # numpy array or torch tensor


def namespace(x: Array) -> Any:
    """The library ``x`` belongs to: torch or numpy."""
    return torch if isinstance(x, torch.Tensor) else np


def constant(values: Any, like: Array) -> Array:
    """Nested numbers as an array of the library, type and device of ``like``; not to be written to.

    A tensor is made once and kept: to bring numbers over in each step would wait for the device.
    """
    if isinstance(like, torch.Tensor):
        return _part_of_the_graph(_hashable(values), like.dtype, like.device)
    return np.asarray(values, dtype=like.dtype)


def _hashable(values: Any) -> Any:
    return tuple(_hashable(value) for value in values) if isinstance(values, list | tuple) else values


@torch.compiler.assume_constant_result
def _part_of_the_graph(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return _kept(values, dtype, device)


@functools.cache
@torch.inference_mode(False)
def _kept(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def arange(n: int, like: Array) -> Array:
    """0 .. n - 1 in the library, type and device of ``like``."""
    if isinstance(like, torch.Tensor):
        return torch.arange(n, dtype=like.dtype, device=like.device)
    return np.arange(n, dtype=like.dtype)
