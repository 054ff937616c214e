"""Writes a step's keys and values into the pool."""

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

    Scatters whole rows, so that XLA:CPU, XLA:GPU and XLA:TPU update a donated pool in place. With
    head-major pages, XLA:TPU would copy the whole pool.

    Args:
      kv: the pool.
      k: new keys, after the rotary embedding.
      v: new values.
      first_rows: for each token, the index of its first row in `kv` viewed as `[P * rows, 128]`.
        Padding tokens point into the dummy block, and may share rows.
      layout: the model's geometry in the pool.
    """
    pad = layout.padded_head_dim - layout.head_dim
    keys_and_values = jnp.concatenate([k, v], axis=1)  # T 2K H
    if pad:
        keys_and_values = jnp.pad(keys_and_values, ((0, 0), (0, 0), (0, pad)))
    rows = keys_and_values.reshape(-1, LANES).astype(kv.dtype)  # T*R 128
    offsets = jnp.arange(layout.rows_per_token, dtype=first_rows.dtype)
    indices = (first_rows[:, None] + offsets).reshape(-1)  # T*R
    flat = kv.reshape(-1, LANES)
    return flat.at[indices].set(rows, mode="promise_in_bounds").reshape(kv.shape)
