"""The native CPU matrix products relative to XLA's: milliseconds, GB/s of weights, and the ratio.

    python benchmarks/native.py
    python benchmarks/native.py --matrix 8192x2048 --rows 1 16 --json

Each program multiplies by several matrices of the same shape, which together exceed the cache.
Rounds alternate between both implementations, so that a change of the machine's speed affects both.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.bench.machine import describe_machine
from muxjax.bench.script_output import print_json, print_table
from muxjax.models.nn.int8 import linear_int8, quantize
from muxjax.models.nn.linear import device_put_matrix, linear
from muxjax.pallas_kernels.cpu import native

BYTES = 200e6
"""Total bytes of the matrices, larger than the cache."""
Form = tuple[jax.Array, ...]


def main() -> None:
    """Measures all products and prints the result."""
    parser = argparse.ArgumentParser(description="Compare native matrix products with XLA's.")
    parser.add_argument("--matrix", default="3072x576", help="outputs x inputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 128, 512])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if reason := native.unavailable_reason():
        sys.exit(f"no native kernels for this CPU: {reason}")
    outputs, inputs = map(int, arguments.matrix.split("x"))
    rows = [
        compare(precision, outputs, inputs, size, arguments.rounds)
        for size in arguments.rows
        for precision in ("float32", "bfloat16", "int8")
    ]
    if arguments.json:
        print_json({"surroundings": describe_machine(), "matrix": arguments.matrix, "rows": rows})
        return
    print_table(f"products with [{outputs}, {inputs}]", list(rows[0]), rows)


def compare(precision: str, outputs: int, inputs: int, size: int, rounds: int) -> dict[str, Any]:
    """Measures one kind of product with both implementations."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((outputs, inputs)) / inputs**0.5).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((size, inputs)), jnp.float32)
    copies = max(2, int(BYTES / weight.nbytes))
    with mock.patch.object(native, "is_enabled", return_value=False):
        xla = _program(_form(precision, weight), copies)
        xla(x)  # compiles while the native kernels are disabled
    native_program = _program(_form(precision, weight), copies)
    native_program(x)
    times: dict[Any, list[float]] = {native_program: [], xla: []}
    for _ in range(rounds):
        for program, durations in times.items():
            began = time.perf_counter()
            program(x)
            durations.append((time.perf_counter() - began) / copies)
    native_seconds, xla_seconds = median(times[native_program]), median(times[xla])
    itemsize = {"float32": 4, "bfloat16": 2, "int8": 1}[precision]
    return {
        "rows": size,
        "precision": precision,
        "xla_ms": round(1e3 * xla_seconds, 3),
        "native_ms": round(1e3 * native_seconds, 3),
        "GB/s": round(outputs * inputs * itemsize / native_seconds / 1e9, 1),
        "GFLOP/s": round(2 * size * outputs * inputs / native_seconds / 1e9),
        "times_xla": round(xla_seconds / native_seconds, 2),
    }


def _form(precision: str, weight: np.ndarray) -> Form:
    if precision == "int8":
        numbers, scales = quantize(weight)
        return device_put_matrix(numbers), jnp.asarray(scales)
    return (device_put_matrix(weight.astype(jnp.dtype(precision))),)


def _program(form: Form, copies: int) -> Callable[[jax.Array], None]:
    matrices = [tuple(jnp.array(part) for part in form) for _ in range(copies)]

    @jax.jit
    def run(x: jax.Array, matrices: Sequence[Form]) -> jax.Array:
        for parts in matrices:
            y = linear(x, *parts) if len(parts) == 1 else linear_int8(x, *parts)
            x = x + 1e-9 * y[:, :1]  # the next product depends on this one
        return x

    def wait(x: jax.Array) -> None:
        jax.block_until_ready(run(x, matrices))

    return wait


if __name__ == "__main__":
    main()
