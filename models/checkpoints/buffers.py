"""Host memory that a device may take over as it is."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

ALIGNMENT = 64
"""Bytes. XLA:CPU keeps host memory that begins at a multiple of them, and copies all other."""


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of unset numbers whose memory is `ALIGNMENT`-aligned; `np.empty`'s need not be."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
