"""How much memory there is, so that images are only kept in it when they fit."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger("selfsight")


def fits_in_memory(size: int, what: str) -> bool:
    """Whether ``size`` bytes may be taken (four fifths of what is free); says so when not."""
    free = available_memory()
    if free is None or size <= 0.8 * free:
        return True
    log.warning(
        f"{what} would take {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: they are read as needed."
    )
    return False


def available_memory() -> int | None:
    """Bytes that a process may still take on this machine and in this container; None where nobody says."""
    limits = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):  # no Linux, no container, or one without a limit
        pass
    return min(limits, default=None)
