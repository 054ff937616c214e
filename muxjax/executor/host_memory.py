"""What the C library does with memory that a program frees."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_KEPT = 256 << 20
_MAPPED_FROM = 64 << 20
_GROWN_BY = 16 << 20


def keep_freed_memory() -> bool:
    """Makes the C library keep what is freed, up to 256 MB, for what is allocated next.

    XLA:CPU allocates a program's temporaries and results anew in each step. glibc gives what is
    larger than some 128 kB to 32 MB back to the system when it is freed, and the next step's first
    touch of each page is a fault: 13 % of decoding Gemma 3 270M, whose logits are 8 MB, and a third
    of its prefill. Allocations from 64 MB on are given back as before.

    Returns:
      Whether the C library could be told so; only glibc can.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_TRIM_THRESHOLD: _KEPT, _TOP_PAD: _GROWN_BY, _MMAP_THRESHOLD: _MAPPED_FROM}
    told = [mallopt(option, value) == 1 for option, value in settings.items()]
    return all(told)
