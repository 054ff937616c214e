"""Products with a weight matrix, in the form that is fastest on each backend.

A matrix `[O, I]` is kept in one of three forms (`stored_shape`):

- *In panels*, `[O / 32, I / p, 32, p]`, on a CPU that has kernels of its own (`native`).
- *In tiles*, `[O / TILE, I, TILE]`, on other CPUs from JAX 0.12 on. XLA:CPU takes such a tile as it
  is, where it packs a plain matrix anew in each call.
- *Plain*, elsewhere.

`benchmarks/native.py` compares the first two: tiles and panels for [3072, 576] in ms, JAX 0.12 on
two cores of a Zen 5 server:

| rows | float32 | bfloat16 |
|---|---|---|
| 1 | 0.24, 0.21 | 0.17, 0.09 |
| 16 | 0.33, 0.27 | 0.23, 0.13 |
| 128 | 1.96, 1.54 | 1.23, 0.97 |

On JAX 0.10 tiles are slower than plain matrices (0.47, 0.52 ms for 8 rows in float32 on Zen 4).
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
"""Outputs in a tile: the width that XLA:CPU's products work in."""
_MOST_TILED = 2**26
"""Numbers in a matrix that is tiled, at most. Each tile takes a copy of the inputs, for 8 rows an
eighth of the matrix in all: Gemma's head (2^27.3 numbers) would take 84 MB so for a step."""
_LEAST_ROWS_BFLOAT16 = 8
"""XLA:CPU takes ten times longer for one bfloat16 row than for eight."""
_LEAST_TILED_ROWS_BFLOAT16 = 2


def stored_shape(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[int, ...]:
    """The shape in which a matrix of this shape and type is kept where it is multiplied with; that
    of anything else is its own.
    """
    if len(shape) != 2 or current_target().platform != "cpu":
        return shape
    if native.is_enabled():
        return native.panel_shape(shape, jnp.dtype(dtype)) or shape
    faster = jax.__version_info__ >= (0, 12) and jnp.dtype(dtype) != jnp.int8
    if not faster or shape[0] % TILE or shape[0] * shape[1] > _MOST_TILED:
        return shape
    return (shape[0] // TILE, shape[1], TILE)


def put_matrix(weight: np.ndarray, device: jax.Device | None = None) -> Array:
    """Puts a parameter on a device in its `stored_shape`; see `put_on_device` on its memory."""
    shape = stored_shape(weight.shape, weight.dtype)
    # Views here, copies in XLA.
    if len(shape) == 4:
        outputs, inputs, width, packed = shape
        panels = weight.reshape(outputs, width, inputs, packed)
        return jax.device_put(panels, device).swapaxes(1, 2)
    if len(shape) == 3:
        return jax.device_put(weight.reshape(-1, TILE, shape[1]), device).swapaxes(1, 2)
    return jax.device_put(weight, device)


def rows_of(
    weight: Num[Array, "O I"]
    | Num[Array, "tiles I tile"]
    | Num[Array, "panels units width packed"],
    rows: Int[Array, " T"],
) -> Num[Array, "T I"]:
    """Rows of a matrix in any form, as an embedding looks them up.

    One row is looked up twice on a TPU: as a slice a TPU7x would copy the whole matrix first, 1 GB
    of Llama 3's, into the layout that it has for slices.
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
    """`x @ weight.T + bias`: inputs in the weight's type, sums and result in float32.

    `rounded` gives the product in the weight's type, though not on the CPU, which would take longer
    to round it than the memory is worth.

    On the CPU a plain weight is the left operand and the result is turned: XLA:CPU then reads the
    matrix as it lies instead of packing it first. 8 rows through [8192, 2048] in float32, on two
    cores: 2.5 against 4.8 ms; 128 rows on JAX 0.10.2: 20 against 59 ms. The barrier keeps XLA from
    turning the product back into the slower form.
    """
    rows = x.shape[0]
    if weight.ndim == 4:
        y = native.product(x, weight)
        return y if bias is None else y + bias
    x = x.astype(weight.dtype)
    if weight.ndim == 3:
        y = _tiled_product(x, weight)[:rows]
    elif current_target().platform == "cpu":
        if weight.dtype == jnp.bfloat16 and rows < _LEAST_ROWS_BFLOAT16:
            x = jnp.pad(x, ((0, _LEAST_ROWS_BFLOAT16 - rows), (0, 0)))
        turned = lax.dot_general(
            weight, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        y = lax.optimization_barrier(turned).T[:rows]
    else:
        dtype = weight.dtype if rounded else jnp.float32
        y = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return y if bias is None else y + bias


def _tiled_product(
    x: Float[Array, "T I"], weight: Float[Array, "tiles I tile"]
) -> Float[Array, "T2 O"]:
    rows = x.shape[0]
    if weight.dtype == jnp.bfloat16 and rows < _LEAST_TILED_ROWS_BFLOAT16:
        rows = _LEAST_TILED_ROWS_BFLOAT16
        x = jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
    # Without the barrier XLA computes x anew for each tile.
    x = lax.optimization_barrier(x)
    y = lax.dot_general(
        jnp.broadcast_to(x, (weight.shape[0], *x.shape)),
        weight,
        (((2,), (1,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )
    return y.swapaxes(0, 1).reshape(rows, -1)
