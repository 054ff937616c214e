"""Read bandwidth and matrix-product rate of this device, to compare measurements with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import jax
import jax.numpy as jnp

_READ_BYTES = 512 * 2**20
_MATMUL = (512, 2048, 2048)  # rows of activations, inputs, outputs


@dataclass
class DeviceRates:
    """Rates of this device, sampled repeatedly during a benchmark.

    The speed of a shared machine changes from minute to minute: each `measure` adds a sample, and
    results are compared with the medians.
    """

    reads: list[float] = field(default_factory=list)
    matmuls: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._big = jnp.ones(_READ_BYTES // 4, jnp.float32)
        self._sum = jax.jit(jnp.sum)
        self._dot = jax.jit(
            # The weight is the left operand, as in `muxjax.models.nn.linear`.
            lambda w, x: jax.lax.dot_general(
                w,
                x,
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.int32 if w.dtype == jnp.int8 else jnp.float32,
            )
        )

    def measure(self, precision: str | None = None) -> None:
        """Samples the read bandwidth and, with a precision, the matrix-product rate."""
        self.reads.append(_READ_BYTES / _seconds(lambda: self._sum(self._big)))
        if precision is not None:
            rows, inputs, outputs = _MATMUL
            w, x = jnp.ones((outputs, inputs), precision), jnp.ones((rows, inputs), precision)
            seconds = _seconds(lambda: self._dot(w, x))
            self.matmuls.setdefault(precision, []).append(2 * rows * inputs * outputs / seconds)

    @property
    def bandwidth(self) -> float:
        """Bytes per second read by a sum over 512 MiB."""
        return median(self.reads)

    def matmul_rate(self, precision: str) -> float:
        """Operations per second of a product [512, 2048] x [2048, 2048]."""
        return median(self.matmuls[precision])


def _seconds(call: Callable[[], jax.Array], repeats: int = 5) -> float:
    call().block_until_ready()
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        call().block_until_ready()
        samples.append(time.perf_counter() - began)
    return median(samples)
