"""One language for everything that changes with the step: learning rate, weight decay, momenta, temperatures.

A schedule is a pure function of the step and of the run's `Clock`; it has no state, so that a resumed run continues
exactly where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Clock:
    """Lengths of a run: ``examples`` per epoch, global ``batch_size``, ``epochs``, ``steps_per_epoch``."""

    examples: int
    batch_size: int
    epochs: float
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        return max(1, round(self.epochs * self.steps_per_epoch))


class Schedule(Protocol):
    """Value used by the update of 0-based ``step``. Learning-rate schedules give a multiple of the peak."""

    def __call__(self, step: int, clock: Clock) -> float: ...
