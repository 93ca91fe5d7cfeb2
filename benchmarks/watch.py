"""What a training takes, seen from the outside: time of steps, processor time, memory; its workers included."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

MIB = 2**20
LAUNCHED = "BENCHMARK_LAUNCHED"  #: environment variable: when the process was started, in seconds since the epoch
LOOKS = 3  #: first steps after which the memory of worker processes is looked at


class Watch:
    """Told where each step begins and ends; the first ``warmup`` ones do not count."""

    def __init__(self, warmup: int = 1) -> None:
        self.warmup, self.steps = warmup, 0
        self.launched = float(os.environ[LAUNCHED])
        self.first_step: float | None = None
        self.waited = self.workers_mib = 0.0
        self.began = self.ended = (0.0, 0.0)

    def begin(self) -> None:
        if self.first_step is None:
            self.first_step = time.time() - self.launched
        if self.steps == self.warmup:
            self.began = time.perf_counter(), cpu_seconds()
        elif self.steps > self.warmup:
            self.waited += time.perf_counter() - self.ended[0]

    def end(self) -> None:
        self.steps += 1
        self.ended = time.perf_counter(), cpu_seconds()
        if self.steps <= LOOKS:
            private = sum(memory(process).get("Private_Dirty", 0) for process in workers())
            self.workers_mib = max(self.workers_mib, private / MIB)

    @property
    def seconds(self) -> float:
        """Since the process was started."""
        return time.time() - self.launched

    def figures(self, batch: int) -> dict[str, float]:
        """
        Args:
            batch: images a step.

        Returns:
            ``images_s``; ``cpu_image``, seconds of all processes; ``wait``, the share of time between one step and the
            next: waiting for data, finishing views, the trainer's own work; ``first_step``, seconds from the start of
            the process; ``peak_mib``, of the process and what its workers have for themselves; ``steps``. The first
            three are 0 where time was over before a step that counts.
        """
        images = batch * (self.steps - self.warmup)
        wall, cpu = (after - before for before, after in zip(self.began, self.ended, strict=True))
        rates = (images / wall, cpu / images, self.waited / wall) if images > 0 else (0.0, 0.0, 0.0)
        return {
            **dict(zip(("images_s", "cpu_image", "wait"), rates, strict=True)), "steps": self.steps,
            "first_step": self.first_step or 0.0, "peak_mib": peak_mib() + self.workers_mib,
        }  # fmt: skip

    def write(self, file: str, batch: int, **others: float) -> None:
        Path(file).write_text(json.dumps(self.figures(batch) | others))


def workers() -> Iterator[str]:
    """The child processes of this one (Linux; elsewhere none)."""
    for task in Path("/proc/self/task").glob("*"):
        yield from (task / "children").read_text().split()


def memory(process: str) -> dict[str, int]:
    """Bytes of a process by kind, from ``/proc``; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}


def cpu_seconds() -> float:
    """Of this process and its children, those that have ended included."""
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system + sum(map(_seconds_of, workers()))


def _seconds_of(process: str) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
