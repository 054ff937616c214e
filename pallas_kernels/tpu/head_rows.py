"""Where the heads of a token lie among its pool rows, and queries to match.

A kernel that reads the pool's rows as they lie sees 128 lanes at a time: a whole head, half of a
large one, or several small ones. A query is therefore spread over as many segments of 128 lanes as
its KV head touches rows, with zeros where other heads lie. A product with a row then gives the part
of the score that this row holds, whatever the head size, and the values come out in the same form:
`select_outputs` takes the own head's lanes from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from muxjax.pallas_kernels.layout import LANES, KVLayout


@dataclass(frozen=True)
class HeadRows:
    """For each KV head the first row and lane, within its token, of its keys and of its values.

    Attributes:
      key_rows, value_rows, key_lanes, value_lanes: one number a KV head.
      segments: the most rows that the keys, or the values, of one head touch.
    """

    key_rows: tuple[int, ...]
    value_rows: tuple[int, ...]
    key_lanes: tuple[int, ...]
    value_lanes: tuple[int, ...]
    segments: int

    @staticmethod
    def of(layout: KVLayout) -> HeadRows:
        width, count = layout.padded_head_dim, layout.num_kv_heads
        keys = [head * width for head in range(count)]
        values = [(count + head) * width for head in range(count)]
        return HeadRows(
            key_rows=tuple(at // LANES for at in keys),
            value_rows=tuple(at // LANES for at in values),
            key_lanes=tuple(at % LANES for at in keys),
            value_lanes=tuple(at % LANES for at in values),
            segments=max(-(-(at % LANES + width) // LANES) for at in keys + values),
        )


def spread_queries(q: Float[Array, "T N H"], rows: HeadRows) -> Float[Array, "T N C"]:
    """Queries over `C = segments * 128` lanes, each at its KV head's place, zeros elsewhere."""
    num_heads, head_dim = q.shape[1:]
    width = rows.segments * LANES
    spread = jnp.zeros((*q.shape[:2], width), q.dtype)
    for lane in sorted(set(rows.key_lanes)):
        placed = jnp.pad(q, ((0, 0), (0, 0), (lane, width - lane - head_dim)))
        spread = jnp.where(_heads_at(lane, rows.key_lanes, num_heads), placed, spread)
    return spread


def select_outputs(
    out: Float[Array, "T N C"], rows: HeadRows, layout: KVLayout
) -> Float[Array, "T N H"]:
    """Undoes the spreading of values: the lanes of each query head's own KV head."""
    num_heads = out.shape[1]
    selected = jnp.zeros((*out.shape[:2], layout.head_dim), out.dtype)
    for lane in sorted(set(rows.value_lanes)):
        own = out[..., lane : lane + layout.head_dim]
        selected = jnp.where(_heads_at(lane, rows.value_lanes, num_heads), own, selected)
    return selected


def _heads_at(lane: int, lanes: tuple[int, ...], num_heads: int) -> np.ndarray:
    """Which query heads belong to a KV head that begins at this lane: `[1, N, 1]`."""
    return np.repeat(np.array(lanes) == lane, num_heads // len(lanes))[None, :, None]
