"""One language for everything that changes with the step: learning rate, weight decay, momenta, temperatures.

A schedule is a pure function of the step and of the run's `Clock`; it has no state, so that a resumed run continues
exactly where it stopped. Learning-rate schedules give multiples of the peak rate, all others the value itself.

A stretch of ``n`` steps (or epochs) is walked from its start, at 0, to its end, at 1. Which of the two ends its steps
touch is where published code differs, so it is spelled out as ``ends``:

- ``left``: step k stands at ``k / n``; the end belongs to whatever follows.
- ``right``: step k stands at ``(k + 1) / n``; the last step reaches the end.
- ``both``: step k stands at ``k / (n - 1)``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

Ends = Literal["left", "right", "both"]


@dataclass(frozen=True)
class Clock:
    """Lengths of a run.

    Attributes:
        examples: per epoch. batch_size: over all devices. epochs: may be a fraction.
        steps_per_epoch: optimiser steps.
        total: optimiser steps of the whole run, where they are not those of the epochs.
        batches_cross_epochs: the data come as one endless stream, so that lengths follow from examples, not from whole
            batches per epoch (SimCLR, tf1 model_util.py: a run has ``examples epochs // batch_size + 1`` steps).
        start: step the current stretch begins with; `Warmup` sets it for what follows it.
    """

    examples: int
    batch_size: int
    epochs: float
    steps_per_epoch: int
    total: int | None = None
    batches_cross_epochs: bool = False
    start: int = 0

    @property
    def total_steps(self) -> int:
        if self.total is not None:
            return self.total
        if self.batches_cross_epochs:
            return int(self.epochs * self.examples // self.batch_size) + 1
        return max(1, round(self.epochs * self.steps_per_epoch))

    def steps(self, epochs: float) -> int:
        """Whole steps nearest to ``epochs``."""
        if self.batches_cross_epochs:
            return round(epochs * self.examples // self.batch_size)
        return round(epochs * self.steps_per_epoch)


class Schedule(Protocol):
    """Value used by the update of 0-based ``step``. Learning-rate schedules give a multiple of the peak."""

    def __call__(self, step: int, clock: Clock) -> float: ...


@dataclass(frozen=True)
class Constant:
    """``value`` throughout."""

    value: float

    def __call__(self, step: int, clock: Clock) -> float:
        return self.value


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from ``start`` to ``end`` over the run, or over what a warm-up leaves of it.

    ``per="epoch"`` keeps the value for a whole epoch. After the last step the value stays where it ended.
    """

    start: float
    end: float
    per: Literal["step", "epoch"] = "step"
    ends: Ends = "left"

    def __call__(self, step: int, clock: Clock) -> float:
        x = min(1.0, _position(step, clock, self.per, self.ends))
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * x)) / 2


@dataclass(frozen=True)
class CosineArc:
    """``cos(pi cycles x)`` over the run, never below 0: FixMatch and USB use 7/16 of a cycle, which ends at 0.195."""

    cycles: float

    def __call__(self, step: int, clock: Clock) -> float:
        return max(0.0, math.cos(math.pi * self.cycles * _position(step, clock, "step", "left")))


@dataclass(frozen=True)
class Ramp:
    """From ``start`` to ``end`` in the first ``share`` of the run, and ``end`` from there on.

    ``linear``, a straight line from ``start``; ``exp``, ``end exp(-5 (1 - x)^2)``, which begins at 0.7 % of ``end``
    (Laine and Aila 2017; Mean Teacher).
    """

    start: float
    end: float
    share: float
    shape: Literal["linear", "exp"] = "linear"

    def __call__(self, step: int, clock: Clock) -> float:
        n = self.share * clock.total_steps
        x = min(1.0, step / n) if n > 0 else 1.0
        rise = math.exp(-5 * (1 - x) ** 2) if self.shape == "exp" else x
        return self.start + (self.end - self.start) * rise


@dataclass(frozen=True)
class Milestones:
    """``start``, multiplied by ``factor`` from every one of the ``epochs`` on (0-based, counted from the first)."""

    start: float
    factor: float
    epochs: Sequence[int]

    def __call__(self, step: int, clock: Clock) -> float:
        return self.start * self.factor ** bisect_right(sorted(self.epochs), step // clock.steps_per_epoch)


@dataclass(frozen=True)
class Table:
    """``rows`` of (first epoch the row no longer holds for, value), in order; the last value stays (RotNet)."""

    rows: Sequence[tuple[float, float]]

    def __call__(self, step: int, clock: Clock) -> float:
        epoch = step // clock.steps_per_epoch
        return next((value for until, value in self.rows if epoch < until), self.rows[-1][1])


@dataclass(frozen=True)
class Warmup:
    """A straight line from ``start`` to the first value of ``then``, and ``then`` from there on.

    ``per="epoch"`` keeps each value of the line for a whole epoch (DINO's temperature). ``overlap=True`` lets ``then``
    run from the first step, hidden by the line, which leads to its value at the last hidden step (SupContrast).
    """

    warmup_epochs: float
    start: float
    then: Schedule
    ends: Ends = "left"
    overlap: bool = False
    per: Literal["step", "epoch"] = "step"

    def __call__(self, step: int, clock: Clock) -> float:
        n = clock.steps(self.warmup_epochs)
        after = clock if self.overlap else replace(clock, start=clock.start + n)
        k = step - clock.start
        if k >= n:
            return self.then(step, after)
        peak = self.then(clock.start + (n - 1 if self.overlap else n), after)
        unit = 1 if self.per == "step" else clock.steps_per_epoch
        return self.start + (peak - self.start) * _fraction(k // unit, n // unit, self.ends)


def _fraction(k: float, n: float, ends: Ends) -> float:
    if ends == "both":
        return k / (n - 1) if n > 1 else 0.0
    return (k + 1) / n if ends == "right" else k / n


def _position(step: int, clock: Clock, per: Literal["step", "epoch"], ends: Ends) -> float:
    """Where ``step`` stands between the start of its stretch, at 0, and the end of the run, at 1.

    A stretch that begins only where the run ends is never walked: 0, so that its first value is what warms up.
    """
    unit = 1 if per == "step" else clock.steps_per_epoch
    n = (clock.total_steps - clock.start) / unit
    return _fraction(step // unit - clock.start / unit, n, ends) if n > 0 else 0.0


@dataclass(frozen=True)
class RunningAverage:
    """``min(1 - 1 / (k + 1), limit)`` at step k: the momentum of an average of all steps so far, up to ``limit``."""

    limit: float

    def __call__(self, step: int, clock: Clock) -> float:
        return min(1 - 1 / (step + 1), self.limit)


def iterations_per_epoch(examples: int, world_size: int, batch_per_process: int) -> int:
    """Whole batches of a process whose share of the examples is padded to that of the others (SwAV)."""
    return math.ceil(examples / world_size) // batch_per_process


def iterations_in(epochs: float, examples: int, world_size: int, batch_per_process: int) -> int:
    """Steps in ``epochs`` if no example were dropped, cut to whole steps once at the end (PixPro)."""
    return int(examples / world_size / batch_per_process * epochs)


def teacher_momentum(momentum: float) -> Schedule:
    """SimMatchV2's rule (main.py): above 0.996 the momentum is constant, else it rises to 1 along a cosine."""
    return Constant(momentum) if momentum > 0.996 else Cosine(momentum, 1.0, ends="right")
