"""Memory that a process has freed stays with it: on a CPU, asking for it anew costs a tenth of a training step."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 32 * 2**20  # bytes; glibc takes no higher M_MMAP_THRESHOLD


def keep_freed_memory(spare: int = 2**30) -> bool:
    """Tell the C library to keep up to ``spare`` bytes of freed memory and to reuse them for tensors up to `LARGEST`.

    By default glibc hands freed blocks of megabytes back to the system, so that the next step's activations and
    gradients, or the next image, are mapped and zeroed anew, page by page. Affects the whole process.

    Returns:
        Whether the C library has taken it; False without glibc, where nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, spare))
