"""The native CPU matrix products relative to XLA's: milliseconds, GB/s of weights, and the ratio.

    python benchmarks/native.py
    python benchmarks/native.py --matrix 8192x2048 --rows 1 16 --json

Each program multiplies with several matrices of the same shape, enough that they are read from
memory and not from the cache. Rounds alternate between both, so that a change of the machine's
speed affects both.
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
"""Of all matrices together: more than a cache holds."""
Form = tuple[jax.Array, ...]


def main() -> None:
    """Measures all products and prints the result."""
    parser = argparse.ArgumentParser(description="Compare products with XLA's.")
    parser.add_argument("--matrix", default="3072x576", help="outputs x inputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 128, 512])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if reason := native.unavailable_reason():
        sys.exit(f"there are no kernels of this CPU's own: {reason}")
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
    with mock.patch.object(native, "used", return_value=False):
        theirs = _program(_form(precision, weight), copies)
        theirs(x)  # compiled while XLA's form is chosen
    ours = _program(_form(precision, weight), copies)
    ours(x)
    times: dict[Any, list[float]] = {ours: [], theirs: []}
    for _ in range(rounds):
        for program, taken in times.items():
            began = time.perf_counter()
            program(x)
            taken.append((time.perf_counter() - began) / copies)
    own, other = median(times[ours]), median(times[theirs])
    itemsize = {"float32": 4, "bfloat16": 2, "int8": 1}[precision]
    return {
        "rows": size,
        "precision": precision,
        "xla_ms": round(1e3 * other, 3),
        "native_ms": round(1e3 * own, 3),
        "GB/s": round(outputs * inputs * itemsize / own / 1e9, 1),
        "GFLOP/s": round(2 * size * outputs * inputs / own / 1e9),
        "times_xla": round(other / own, 2),
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
            x = x + 1e-9 * y[:, :1]  # the next product waits for this one
        return x

    def wait(x: jax.Array) -> None:
        jax.block_until_ready(run(x, matrices))

    return wait


if __name__ == "__main__":
    main()
