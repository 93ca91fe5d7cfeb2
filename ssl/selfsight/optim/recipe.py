"""Binds an optimiser, the rule that scales its learning rate with the batch, and the schedules of a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from selfsight.errors import UserError, nearest
from selfsight.optim.groups import ParamGroup
from selfsight.optim.schedule import Clock, Schedule

SCALINGS = ("none", "linear", "sqrt")


@dataclass
class OptimizationRecipe:
    """
    Attributes:
        optimizer: called as ``optimizer(groups, lr=peak)``.
        lr: learning rate for the reference batch.
        schedules: by name. ``lr`` is a multiple of the peak rate; every other one gives the value itself.
            ``weight_decay`` reaches the optimiser; the rest is for the method (``self.scheduled[name]``).
        scaling: ``linear`` (lr B / reference), ``sqrt`` (lr sqrt(B)) or ``none``.
        fused: one kernel for all parameters, where the optimiser has such a thing.
    """

    optimizer: Callable[..., Optimizer]
    lr: float
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    scaling: str = "none"
    reference_batch: int = 256
    fused: bool = False

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise UserError(
                f"schedule.scaling is '{self.scaling}'; one of {', '.join(SCALINGS)}.{nearest(self.scaling, SCALINGS)}"
            )
        if not 0 <= self.lr < math.inf:
            raise UserError(f"optimizer.lr is {self.lr:g}; a learning rate is 0 or more.")

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate after scaling; the one place where batch size and learning rate meet."""
        if self.scaling == "linear":
            return self.lr * batch_size / self.reference_batch
        if self.scaling == "sqrt":
            return self.lr * math.sqrt(batch_size)
        return self.lr

    def told(self, batch_size: int) -> str:
        """The learning rate for a person: ``0.0047 (0.3 scaled to the batch: linear)``."""
        scaled = "" if self.scaling == "none" else f" ({self.lr:g} scaled to the batch: {self.scaling})"
        return f"{self.peak_lr(batch_size):.4g}{scaled}"

    def build(self, groups: list[ParamGroup], clock: Clock) -> Optimizer:
        options = {"fused": True} if self.fused and "fused" in inspect.signature(self.optimizer).parameters else {}
        optimizer = self.optimizer(groups, lr=self.peak_lr(clock.batch_size), **options)
        self.apply(optimizer, self.values(0, clock))
        return optimizer

    def values(self, step: int, clock: Clock) -> dict[str, float]:
        """Every scheduled value at ``step``, ``lr`` in full."""
        values = {name: schedule(step, clock) for name, schedule in self.schedules.items()}
        values["lr"] = self.peak_lr(clock.batch_size) * values.get("lr", 1.0)
        return values

    @staticmethod
    def apply(optimizer: Optimizer, values: Mapping[str, Any]) -> None:
        """Write learning rate and weight decay into the groups.

        A group's ``lr_scale`` multiplies the rate; one with ``constant_lr`` stays at the peak; one with ``plain`` keeps
        its own weight decay.
        """
        for group in optimizer.param_groups:
            if not group.get("constant_lr", False):
                group["lr"] = values["lr"] * group.get("lr_scale", 1.0)
            if "weight_decay" in values and not group.get("plain", False):
                group["weight_decay"] = values["weight_decay"]
