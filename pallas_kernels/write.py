"""Writing a step's keys and values into the pool."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from muxjax.pallas_kernels.layout import LANES, KVLayout


def write_kv(
    kv: Float[Array, "P rows 128"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    first_rows: Int[Array, " T"],
    *,
    layout: KVLayout,
) -> Float[Array, "P rows 128"]:
    """Writes each token's keys and values to its `R` rows; in place when `kv` is donated.

    Whole rows are written, and by one scatter, because that form alone is in place with every
    compiler tried (design, section 3: a head-major page copies the whole pool on TPU).

    Args:
      kv: the pool.
      k: new keys, rotated already.
      v: new values.
      first_rows: for each token the index, in `kv` seen as `[P * rows, 128]`, of its first row.
        Padding tokens point into the dummy block; several may point to the same row.
      layout: the model's geometry.
    """
    pad = layout.padded_head_dim - layout.head_dim
    both = jnp.concatenate([k, v], axis=1)  # T 2K H
    if pad:
        both = jnp.pad(both, ((0, 0), (0, 0), (0, pad)))
    rows = both.reshape(-1, LANES).astype(kv.dtype)  # T*R 128
    r = layout.rows_per_token
    ids = (first_rows[:, None] + jnp.arange(r, dtype=first_rows.dtype)).reshape(-1)
    flat = kv.reshape(-1, LANES)
    return flat.at[ids].set(rows, mode="promise_in_bounds").reshape(kv.shape)
