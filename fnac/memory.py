"""Memory that a training step frees is kept for the next one, where the C library can be told so."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT, LARGEST = (1 << 31) - 1, 1 << 30


def keep_freed_memory() -> bool:
    """Make this process keep freed memory, up to 2 GiB of it, in blocks of up to 1 GiB.

    glibc gives large blocks back to the system as soon as they are freed, and a training step on the CPU, which
    allocates gigabytes, then waits for fresh pages at every layer. Nothing is changed where the environment already
    says how malloc should behave (``MALLOC_TRIM_THRESHOLD_`` and its like, ``GLIBC_TUNABLES``) or where the C library
    is not glibc.

    Returns:
        Whether the process keeps what it frees.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, KEPT))
