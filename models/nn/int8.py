"""Products in int8: weights are quantized once, activations in each product.

A matrix `[O, I]` is stored as int8 numbers with one float32 scale per row. The activations of a
token share one scale. Both are symmetric, and sums are exact in int32. Before rounding, weights and
activations are rotated by the same orthogonal matrix, block-diagonal with Hadamard matrices of size
`BLOCK` (QuaRot, Ashkboos et al. 2024). This does not change the product. It spreads a
large activation over its block, which reduces the rounding error of the others. It needs no
calibration and costs 64 multiplications per activation.

docs/measurements/int8.md has accuracy and speed. Tiles, as in `linear`, are slower here.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int8

from muxjax.models.nn.linear import lookup_rows
from muxjax.pallas_kernels.cpu import native
from muxjax.pallas_kernels.target import current_target

BLOCK = 64
"""Inputs that are rotated together; fewer if `I` is not a multiple of this."""
_MAX_INT8 = 127
_MIN_ROWS = 2
"""Minimum rows of a product. For one row, XLA:CPU widens the whole matrix to int32."""
_MAX_OUTPUTS_LEFT = 8192
"""Maximum outputs of a matrix that is the left operand on the CPU; larger ones are faster on the
right."""
_CHUNK = 2**22
"""Elements of a matrix that are quantized at a time, which bounds the temporary memory."""


def quantize(
    weight: Float[np.ndarray, "O I"],
) -> tuple[Int8[np.ndarray, "O I"], Float32[np.ndarray, " O"]]:
    """Rotates and rounds a matrix for `linear_int8`: the int8 numbers, and each row's scale."""
    outputs, inputs = weight.shape
    numbers = np.empty((outputs, inputs), np.int8)
    scales = np.empty(outputs, np.float32)
    hadamard = _hadamard(inputs)
    step = max(1, _CHUNK // inputs)
    for start in range(0, outputs, step):
        rows = weight[start : start + step].astype(np.float32)
        rows = (rows.reshape(len(rows), -1, len(hadamard)) @ hadamard).reshape(rows.shape)
        scale = np.abs(rows).max(axis=1) / np.float32(_MAX_INT8)
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

    Args:
      x: activations.
      weight: the int8 numbers, in their `stored_shape`.
      scales: the scale of each row of the matrix.
      bias: added to the product.
      rounded: return the product in bfloat16; ignored on the CPU, as in `linear`.
    """
    if weight.ndim == 4:
        y = native.product_int8(x, weight, scales, len(_hadamard(x.shape[1])))
        return y if bias is None else y + bias
    rotated = _rotate(x.astype(jnp.float32))
    largest = jnp.max(jnp.abs(rotated), axis=1, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / _MAX_INT8)  # T 1
    sums = _product(jnp.round(rotated / scale).astype(jnp.int8), weight)
    y = sums.astype(jnp.float32) * scale * scales
    if rounded and current_target().platform != "cpu":
        y = y.astype(jnp.bfloat16)
    return y if bias is None else y + bias


def lookup_rows_int8(
    weight: Int8[Array, "V D"] | Int8[Array, "panels units width 4"],
    scales: Float[Array, " V"],
    rows: Int[Array, " T"],
) -> Float[Array, "T D"]:
    """Dequantized rows of a matrix, for an embedding."""
    # The rotation is its own inverse.
    return _rotate(lookup_rows(weight, rows).astype(jnp.float32) * scales[rows][:, None])


def _product(x: Int8[Array, "T I"], weight: Int8[Array, "O I"]) -> Int[Array, "T O"]:
    rows = x.shape[0]
    on_cpu = current_target().platform == "cpu"
    if rows < _MIN_ROWS:
        x = jnp.pad(x, ((0, _MIN_ROWS - rows), (0, 0)))
    if on_cpu and weight.shape[0] <= _MAX_OUTPUTS_LEFT:
        sums = lax.dot_general(
            weight, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )
        # Without the barrier XLA swaps the operands.
        return lax.optimization_barrier(sums).T[:rows]
    sums = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return sums[:rows]


def _rotate(x: Float[Array, "T I"]) -> Float[Array, "T I"]:
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
