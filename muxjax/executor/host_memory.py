"""Makes the C library keep freed memory for later allocations."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_MAX_RETAINED = 256 << 20
"""Bytes of freed memory that the process keeps."""
_MIN_MMAP = 64 << 20
"""Minimum bytes of an allocation that is mapped separately, and unmapped when it is freed."""
_HEAP_GROWTH = 16 << 20
"""Bytes by which the heap grows at a time."""


def keep_freed_memory() -> bool:
    """Makes the C library retain up to 256 MB of freed memory for later allocations.

    XLA:CPU allocates a program's temporaries and results in each step. By default glibc returns
    large blocks to the system when they are freed, so the next step pays a page fault for each of
    their pages. Allocations of 64 MB and more are still returned.

    Returns:
      Whether the C library accepted the settings; only glibc has them.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {
        _TRIM_THRESHOLD: _MAX_RETAINED,
        _TOP_PAD: _HEAP_GROWTH,
        _MMAP_THRESHOLD: _MIN_MMAP,
    }
    accepted = [mallopt(option, value) == 1 for option, value in settings.items()]
    return all(accepted)
