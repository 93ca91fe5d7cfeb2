"""Two ways to the same result, run in turn: medians of CPU and wall time, and the memory each takes at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Comparison:
    """What one benchmark found. Times are of CPU, per ``unit``; ``ratio`` above 1 means that ours is the faster.

    Attributes:
        spread: half the distance between the quartiles of the ratios of single rounds.
        wall: ratio of wall times. memory: MiB above what was there before, ours and the peer's.
        check: in which way the results were found to agree.
    """

    name: str
    ours: float
    peer: float
    unit: str
    wall: float
    spread: float
    memory: tuple[float, float]
    check: str
    target: float | None = None

    @property
    def ratio(self) -> float:
        return self.peer / self.ours


def compare(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    items: int,
    unit: str,
    check: str,
    rounds: int,
    target: float | None = None,
) -> Comparison:
    """Run ``peer`` and ``ours`` alternately, ``rounds`` times each after one round that is not counted.

    Args:
        items: how many units (images, queries) one call handles; ``unit`` names the result, such as "ms/image".
    """
    cpu: dict[str, list[float]] = {"ours": [], "peer": []}
    wall: dict[str, list[float]] = {"ours": [], "peer": []}
    memory = {}
    for turn in range(rounds + 1):
        for side, work in (("peer", peer), ("ours", ours)):
            if turn == 1:
                trim()
                before = memory_mib("VmRSS")
            start_cpu, start_wall = time.process_time(), time.perf_counter()
            work()
            if turn:
                cpu[side].append(time.process_time() - start_cpu)
                wall[side].append(time.perf_counter() - start_wall)
            if turn == 1:
                memory[side] = max(0.0, memory_mib("VmHWM") - before)
    middle = {side: statistics.median(values) for side, values in cpu.items()}
    ratios = [b / a for a, b in zip(cpu["ours"], cpu["peer"], strict=True)]
    scale = 1e3 / items if unit.startswith("ms") else 1 / items
    return Comparison(
        name,
        ours=middle["ours"] * scale,
        peer=middle["peer"] * scale,
        unit=unit,
        wall=statistics.median(wall["peer"]) / statistics.median(wall["ours"]),
        spread=_spread(ratios),
        memory=(memory["ours"], memory["peer"]),
        check=check,
        target=target,
    )


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    quarters = statistics.quantiles(values, n=4, method="inclusive")
    return (quarters[2] - quarters[0]) / 2


def trim() -> None:
    """Give freed memory back, and start the peak anew from what is left (Linux; elsewhere memory reads as zero)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass


def exact_heap() -> None:
    """From here on give memory back at once when it is freed, so that peaks are of what is held (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD


def memory_mib(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
