"""Products with weight matrices, stored in the fastest shape for each backend.

A matrix `[O, I]` is stored in one of three shapes (`stored_shape`):

- *In panels*, `[O / 32, I / p, 32, p]`, on CPUs with the C++ kernels (`pallas_kernels.cpu.native`).
- *In tiles*, `[O / TILE, I, TILE]`, on other CPUs from JAX 0.12 on. XLA:CPU reads such tiles in
  place, but repacks a plain matrix in each call.
- *Plain*, elsewhere.

docs/measurements/cpu-kernels.md and xla-cpu.md compare them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num
from numpy.typing import DTypeLike

from muxjax.pallas_kernels.cpu import native
from muxjax.pallas_kernels.target import current_target

TILE = 64
"""Outputs in a tile: the width of XLA:CPU's products."""
_MAX_TILED_SIZE = 2**26
"""Maximum elements of a tiled matrix. Each tile copies the inputs: 8 rows copy one eighth of the
matrix's size, which is too much for large output heads."""
_MIN_ROWS_BFLOAT16 = 8
"""Minimum rows of a bfloat16 product with a plain matrix; XLA:CPU is slower with fewer
(docs/measurements/xla-cpu.md)."""
_MIN_TILED_ROWS_BFLOAT16 = 2
"""Minimum rows of a bfloat16 product with tiles."""


def stored_shape(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[int, ...]:
    """The shape in which a matrix is stored on the device that is traced for.

    The shape of an array that is not a matrix is unchanged.
    """
    if len(shape) != 2 or current_target().platform != "cpu":
        return shape
    if native.is_enabled():
        return native.panel_shape(shape, jnp.dtype(dtype)) or shape
    faster = jax.__version_info__ >= (0, 12) and jnp.dtype(dtype) != jnp.int8
    if not faster or shape[0] % TILE or shape[0] * shape[1] > _MAX_TILED_SIZE:
        return shape
    return (shape[0] // TILE, shape[1], TILE)


def device_put_matrix(weight: np.ndarray, device: jax.Device | None = None) -> Array:
    """Puts a parameter on a device in its `stored_shape`.

    The device may use the array's memory without a copy (`weight_format.put_on_device`).
    """
    shape = stored_shape(weight.shape, weight.dtype)
    # The host array is only reshaped; XLA makes the copy.
    if len(shape) == 4:
        outputs, inputs, width, packed = shape
        panels = weight.reshape(outputs, width, inputs, packed)
        return jax.device_put(panels, device).swapaxes(1, 2)
    if len(shape) == 3:
        return jax.device_put(weight.reshape(-1, TILE, shape[1]), device).swapaxes(1, 2)
    return jax.device_put(weight, device)


def lookup_rows(
    weight: Num[Array, "O I"]
    | Num[Array, "tiles I tile"]
    | Num[Array, "panels units width packed"],
    rows: Int[Array, " T"],
) -> Num[Array, "T I"]:
    """Rows of a matrix in any stored shape, for an embedding.

    On a TPU, a single row is looked up twice. XLA would compile a single lookup to a slice, and a
    TPU7x would copy the whole matrix to another layout for it.
    """
    if rows.shape[0] == 1 and current_target().platform == "tpu":
        return weight[jnp.repeat(rows, 2)][:1]
    if weight.ndim == 2:
        return weight[rows]
    width = weight.shape[2]
    return weight[rows // width, :, rows % width].reshape(rows.shape[0], -1)


def linear(
    x: Float[Array, "T I"],
    weight: Float[Array, "O I"]
    | Float[Array, "tiles I tile"]
    | Float[Array, "panels units width packed"],
    bias: Float[Array, " O"] | None = None,
    *,
    rounded: bool = False,
) -> Float[Array, "T O"]:
    """`x @ weight.T + bias`, with inputs in the weight's type, and sums and result in float32.

    On the CPU, a plain weight is the left operand and the result is transposed: XLA:CPU then reads
    the matrix in place instead of repacking it (docs/measurements/xla-cpu.md). A barrier keeps XLA
    from transposing the product back.

    Args:
      x: activations.
      weight: the matrix in its `stored_shape`.
      bias: added to the product.
      rounded: return the product in the weight's type. Ignored on the CPU, where rounding is
        slower.
    """
    rows = x.shape[0]
    if weight.ndim == 4:
        y = native.product(x, weight)
        return y if bias is None else y + bias
    x = x.astype(weight.dtype)
    if weight.ndim == 3:
        y = _tiled_product(x, weight)[:rows]
    elif current_target().platform == "cpu":
        if weight.dtype == jnp.bfloat16 and rows < _MIN_ROWS_BFLOAT16:
            x = jnp.pad(x, ((0, _MIN_ROWS_BFLOAT16 - rows), (0, 0)))
        transposed = lax.dot_general(
            weight, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        y = lax.optimization_barrier(transposed).T[:rows]
    else:
        dtype = weight.dtype if rounded else jnp.float32
        y = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return y if bias is None else y + bias


def _tiled_product(
    x: Float[Array, "T I"], weight: Float[Array, "tiles I tile"]
) -> Float[Array, "T2 O"]:
    rows = x.shape[0]
    if weight.dtype == jnp.bfloat16 and rows < _MIN_TILED_ROWS_BFLOAT16:
        rows = _MIN_TILED_ROWS_BFLOAT16
        x = jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
    # Without the barrier XLA recomputes x for each tile.
    x = lax.optimization_barrier(x)
    y = lax.dot_general(
        jnp.broadcast_to(x, (weight.shape[0], *x.shape)),
        weight,
        (((2,), (1,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )
    return y.swapaxes(0, 1).reshape(rows, -1)
