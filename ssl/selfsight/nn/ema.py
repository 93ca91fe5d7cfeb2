"""A slowly moving copy of a network: the target network, momentum encoder or mean teacher."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfsight.errors import UserError, nearest

BUFFERS = ("copy", "ema", "keep")


class EMATeacher(nn.Module):
    """``teacher <- m teacher + (1 - m) student``, parameter by parameter, without gradient.

    What happens to the buffers (the running statistics of BatchNorm) decides the mode the teacher runs in:

    - ``keep``: it gathers statistics of its own, so it follows the mode of the model it sits in (PixPro; SimMatchV2).
    - ``copy``: it takes over the student's and stays in eval mode (USB's model for evaluation).
    - ``ema``: floating-point buffers are averaged like parameters, counters copied; it stays in eval mode (EMAN).

    Attributes:
        module: deep copy of ``student``; its parameters need no gradient.
        momentum: used by `update` where no other is given.
    """

    def __init__(
        self, student: nn.Module, momentum: float = 0.999, buffers: Literal["copy", "ema", "keep"] = "copy"
    ) -> None:
        super().__init__()
        if buffers not in BUFFERS:
            raise UserError(
                f"The teacher's buffers are '{buffers}'; one of {', '.join(BUFFERS)}.{nearest(buffers, BUFFERS)}"
            )
        self.module = copy.deepcopy(student).requires_grad_(False)
        self.momentum, self.buffers_rule = momentum, buffers
        self.train(self.module.training)

    def train(self, mode: bool = True) -> EMATeacher:
        super().train(mode)
        self.module.train(mode and self.buffers_rule == "keep")
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float | None = None) -> None:
        """One step towards ``student``, which has the structure of the module it was copied from."""
        weight = 1.0 - (self.momentum if momentum is None else momentum)
        slow: list[Tensor] = list(self.module.parameters())
        fast: list[Tensor] = list(student.parameters())
        if self.buffers_rule != "keep":
            for t, s in zip(self.module.buffers(), student.buffers(), strict=True):
                if self.buffers_rule == "ema" and t.is_floating_point():
                    slow.append(t)
                    fast.append(s)
                else:
                    t.copy_(s)
        if slow:
            torch._foreach_lerp_(slow, fast, weight)
