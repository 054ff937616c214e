"""Products with a weight matrix, in the form that is fastest on each backend.

A matrix `[O, I]` may lie in memory in tiles of `TILE` outputs, `[O / TILE, I, TILE]`. XLA:CPU takes
such a tile as it is, where it packs a plain matrix anew in each call. One product with [3072, 576],
JAX 0.12 on two cores, plain and tiled, in ms:

| rows | float32 | bfloat16 |
|---|---|---|
| 1 (2 in bfloat16) | 0.42, 0.26 | 0.37, 0.30 |
| 8 | 0.49, 0.33 | 0.51, 0.34 |
| 128 | 2.55, 3.08 | 1.74, 1.49 |

On JAX 0.10 tiles are slower (0.47, 0.52 ms for 8 rows in float32).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from muxjax.pallas_kernels.target import current_target

TILE = 64
"""Outputs in a tile: the width that XLA:CPU's products work in."""
_MOST_TILED = 2**26
"""Numbers in a matrix that is tiled, at most. Each tile takes a copy of the inputs, for 8 rows an
eighth of the matrix in all: Gemma's head (2^27.3 numbers) would take 84 MB so for a step."""
_LEAST_ROWS_BFLOAT16 = 8
"""XLA:CPU takes ten times longer for one bfloat16 row than for eight."""
_LEAST_TILED_ROWS_BFLOAT16 = 2


def tiled_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a parameter of this shape is kept: `[O / TILE, I, TILE]` for a matrix of
    whole tiles where tiles are faster (the CPU, JAX 0.12 and later), otherwise as it is.
    """
    faster = current_target().platform == "cpu" and jax.__version_info__ >= (0, 12)
    if not faster or len(shape) != 2 or shape[0] % TILE or shape[0] * shape[1] > _MOST_TILED:
        return shape
    return (shape[0] // TILE, shape[1], TILE)


def put_tiled(weight: np.ndarray, device: jax.Device | None = None) -> Array:
    """Puts a parameter on a device in its `tiled_shape`; see `kept.put_on_device` on its memory."""
    if tiled_shape(weight.shape) == weight.shape:
        return jax.device_put(weight, device)
    tiles = weight.reshape(-1, TILE, weight.shape[1])  # a view here, a copy in XLA
    return jax.device_put(tiles, device).swapaxes(1, 2)


def rows_of(
    weight: Float[Array, "O I"] | Float[Array, "tiles I tile"], rows: Int[Array, " T"]
) -> Float[Array, "T I"]:
    """Rows of a matrix, plain or tiled, as an embedding looks them up.

    One row is looked up twice on a TPU: as a slice a TPU7x would copy the whole matrix first, 1 GB
    of Llama 3's, into the layout that it has for slices.
    """
    if rows.shape[0] == 1 and current_target().platform == "tpu":
        return weight[jnp.repeat(rows, 2)][:1]
    return weight[rows] if weight.ndim == 2 else weight[rows // TILE, :, rows % TILE]


def linear(
    x: Float[Array, "T I"],
    weight: Float[Array, "O I"] | Float[Array, "tiles I tile"],
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
