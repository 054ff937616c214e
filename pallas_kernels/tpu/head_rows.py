"""The rows and lanes of each head of a token in the pool, and queries in the same layout.

A row of the pool has 128 lanes: a whole head, half of a large one, or several small ones. A query
is therefore spread over one segment of 128 lanes for each row that contains a part of its KV head,
with zeros in the lanes of other heads. For every head size, a product with a row then gives this
row's part of the score. Weighted values have the same layout, and `select_outputs` extracts the
lanes of each query head's KV head.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from muxjax.pallas_kernels.layout import LANES, KVLayout


@dataclass(frozen=True)
class HeadRows:
    """First row and lane of each KV head's keys and values, relative to its token's first row.

    Attributes:
      key_rows, value_rows, key_lanes, value_lanes: one entry per KV head.
      segments: maximum number of rows that contain parts of one head's keys, or of its values.
    """

    key_rows: tuple[int, ...]
    value_rows: tuple[int, ...]
    key_lanes: tuple[int, ...]
    value_lanes: tuple[int, ...]
    segments: int

    @staticmethod
    def from_layout(layout: KVLayout) -> HeadRows:
        """The rows and lanes of a model's heads."""
        width, count = layout.padded_head_dim, layout.num_kv_heads
        keys = [head * width for head in range(count)]
        values = [(count + head) * width for head in range(count)]
        return HeadRows(
            key_rows=tuple(offset // LANES for offset in keys),
            value_rows=tuple(offset // LANES for offset in values),
            key_lanes=tuple(offset % LANES for offset in keys),
            value_lanes=tuple(offset % LANES for offset in values),
            segments=max(-(-(offset % LANES + width) // LANES) for offset in keys + values),
        )


def spread_queries(q: Float[Array, "T N H"], rows: HeadRows) -> Float[Array, "T N C"]:
    """Spreads queries over `C = segments * 128` lanes: zeros except in their KV head's lanes."""
    num_heads, head_dim = q.shape[1:]
    width = rows.segments * LANES
    spread = jnp.zeros((*q.shape[:2], width), q.dtype)
    for lane in sorted(set(rows.key_lanes)):
        placed = jnp.pad(q, ((0, 0), (0, 0), (lane, width - lane - head_dim)))
        spread = jnp.where(_heads_at_lane(lane, rows.key_lanes, num_heads), placed, spread)
    return spread


def select_outputs(
    out: Float[Array, "T N C"], rows: HeadRows, layout: KVLayout
) -> Float[Array, "T N H"]:
    """Extracts from spread outputs the lanes of each query head's KV head."""
    num_heads = out.shape[1]
    selected = jnp.zeros((*out.shape[:2], layout.head_dim), out.dtype)
    for lane in sorted(set(rows.value_lanes)):
        values = out[..., lane : lane + layout.head_dim]
        selected = jnp.where(_heads_at_lane(lane, rows.value_lanes, num_heads), values, selected)
    return selected


def _heads_at_lane(lane: int, lanes: tuple[int, ...], num_heads: int) -> np.ndarray:
    """Mask of the query heads whose KV head begins at this lane, `[1, N, 1]`."""
    return np.repeat(np.array(lanes) == lane, num_heads // len(lanes))[None, :, None]
