"""Host memory that a device can use without a copy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

ALIGNMENT = 64
"""Bytes. XLA:CPU uses host memory without a copy if its address is a multiple of this."""


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An uninitialized array whose memory is aligned to `ALIGNMENT`."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
