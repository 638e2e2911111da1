"""Settings of the process that trains, which make a step faster on CPUs. Results don't change."""

from __future__ import annotations

import ctypes
import os

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# How long a thread waits busily for the next operation, about 30 µs. The default is about 100 times as long.
_SPINS = "10000"


def share_cores() -> None:
    """Threads that wait give their core away soon. Call it before torch is imported, which reads these variables.

    Without it a step takes up to twice as long while other processes want the cores.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def keep_freed_memory() -> None:
    """The process keeps freed memory for the next step. Otherwise each large tensor costs page faults. glibc only."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another system
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
