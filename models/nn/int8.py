"""Products of int8 with int8: weights quantised once, activations as they come.

A matrix `[O, I]` is kept as int8 numbers and one float32 scale a row; a token's activations get one
scale for all of them; both are symmetric, and the sums are exact in int32. Before they are rounded,
weights and activations are turned by the same orthogonal matrix, a Hadamard matrix of `BLOCK` on
the diagonal (QuaRot, Ashkboos et al. 2024), which leaves the product as it is and spreads a large
activation over its block: without it SmolLM2-135M loses 3.5 % in perplexity, with it under 1 %
(benchmarks/perplexity.py). It needs no calibration and costs 64 multiplications an activation.

On the CPU, JAX 0.12 on two cores, ms for a product with [3072, 576] whose weights come from memory:

| rows | float32 | bfloat16 | int8, weight left | int8, weight right |
|---|---|---|---|---|
| 1 | 0.32 | 2.7 | 2.5 | 3.0 |
| 2 | 0.29 | 0.35 | 0.15 | 0.22 |
| 8 | 0.45 | 0.36 | 0.15 | 0.27 |
| 128 | 2.6 | 1.3 | 0.89 | 0.86 |

Tiles as for floats (`linear`) take longer. With many outputs the weight is better to the right: 8
rows through [262144, 640] take 16 ms so, 73 ms with the weight left. JAX 0.10: 0.23 to 0.29 ms for
2 and 8 rows, 2.0 for 128.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int8

from muxjax.models.nn.linear import rows_of
from muxjax.pallas_kernels.cpu import native
from muxjax.pallas_kernels.target import current_target

BLOCK = 64
"""Inputs that are turned together; fewer where `I` is no multiple of it."""
_MOST = 127
_LEAST_ROWS = 2
"""XLA:CPU widens the whole matrix to int32 for one row."""
_MOST_OUTPUTS_LEFT = 8192
_CHUNK = 2**22
"""Numbers of a matrix that are quantised at once, which bounds the memory for it."""


def quantize(
    weight: Float[np.ndarray, "O I"],
) -> tuple[Int8[np.ndarray, "O I"], Float32[np.ndarray, " O"]]:
    """A matrix as `linear_int8` takes it: turned, rounded, and each row's scale."""
    outputs, inputs = weight.shape
    numbers = np.empty((outputs, inputs), np.int8)
    scales = np.empty(outputs, np.float32)
    hadamard = _hadamard(inputs)
    step = max(1, _CHUNK // inputs)
    for start in range(0, outputs, step):
        rows = weight[start : start + step].astype(np.float32)
        rows = (rows.reshape(len(rows), -1, len(hadamard)) @ hadamard).reshape(rows.shape)
        scale = np.abs(rows).max(axis=1) / np.float32(_MOST)
        scale[scale == 0] = 1
        scales[start : start + step] = scale
        np.rint(rows / scale[:, None], out=rows)
        numbers[start : start + step] = rows
    return numbers, scales


def linear_int8(
    x: Float[Array, "T I"],
    weight: Int8[Array, "O I"] | Int8[Array, "panels units width 4"],
    scales: Float[Array, " O"],
    bias: Float[Array, " O"] | None = None,
    *,
    rounded: bool = False,
) -> Float[Array, "T O"]:
    """`x @ W.T + bias` in float32, where `weight, scales` are `quantize(W)`.

    `rounded` gives the product in bfloat16, though not on the CPU (as in `linear`).
    """
    if weight.ndim == 4:
        y = native.product_int8(x, weight, scales, len(_hadamard(x.shape[1])))
        return y if bias is None else y + bias
    turned = _turn(x.astype(jnp.float32))
    most = jnp.max(jnp.abs(turned), axis=1, keepdims=True)
    scale = jnp.where(most == 0, 1, most / _MOST)  # T 1
    sums = _product(jnp.round(turned / scale).astype(jnp.int8), weight)
    y = sums.astype(jnp.float32) * scale * scales
    if rounded and current_target().platform != "cpu":
        y = y.astype(jnp.bfloat16)
    return y if bias is None else y + bias


def rows_of_int8(
    weight: Int8[Array, "V D"] | Int8[Array, "panels units width 4"],
    scales: Float[Array, " V"],
    rows: Int[Array, " T"],
) -> Float[Array, "T D"]:
    """Rows of the matrix that was quantised, as an embedding looks them up."""
    # The turn undoes itself.
    return _turn(rows_of(weight, rows).astype(jnp.float32) * scales[rows][:, None])


def _product(x: Int8[Array, "T I"], weight: Int8[Array, "O I"]) -> Int[Array, "T O"]:
    rows = x.shape[0]
    on_cpu = current_target().platform == "cpu"
    if rows < _LEAST_ROWS:
        x = jnp.pad(x, ((0, _LEAST_ROWS - rows), (0, 0)))
    if on_cpu and weight.shape[0] <= _MOST_OUTPUTS_LEFT:
        sums = lax.dot_general(
            weight, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )
        # Without the barrier XLA turns the product round.
        return lax.optimization_barrier(sums).T[:rows]
    sums = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return sums[:rows]


def _turn(x: Float[Array, "T I"]) -> Float[Array, "T I"]:
    hadamard = _hadamard(x.shape[1])
    blocks = x.reshape(-1, len(hadamard))
    return jnp.matmul(blocks, hadamard, precision=lax.Precision.HIGHEST).reshape(x.shape)


def _hadamard(inputs: int) -> Float32[np.ndarray, "b b"]:
    """Sylvester's Hadamard matrix, scaled to be orthogonal; it is its own inverse."""
    size = min(BLOCK, inputs & -inputs)
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(size**0.5)
