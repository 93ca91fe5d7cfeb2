"""Islands of full precision in a mixed-precision model: losses, Sinkhorn, similarities."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def float32(x: Tensor) -> Tensor:
    """``x`` in float32; float64 and non-floating tensors stay what they are. The gradient returns in x's type."""
    return x.float() if x.is_floating_point() and x.dtype != torch.float64 else x


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What layers compute in where ``x`` is; None without autocast."""
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else None


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: autocast is off inside, and half-precision tensors among the arguments arrive in float32."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        lifted: list[Any] = [_lift(a) for a in args]
        named: dict[str, Any] = {name: _lift(a) for name, a in kwargs.items()}
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*lifted, **named)

    return inside


def _lift(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return float32(argument)
    if type(argument) in (list, tuple):
        return type(argument)(_lift(a) for a in argument)
    return argument
