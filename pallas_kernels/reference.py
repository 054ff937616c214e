"""Paged attention as plainly as it can be said: numpy, a loop over sequences, queries and heads.

Slow, on the host, in float64. Every other implementation is tested against it.
"""

from __future__ import annotations

import numpy as np

from muxjax.pallas_kernels.layout import KVLayout


def gather_tokens(
    kv: np.ndarray, blocks: np.ndarray, length: int, layer: int, layout: KVLayout
) -> tuple[np.ndarray, np.ndarray]:
    """The first `length` tokens of one sequence: keys and values, each `[length, K, H]`."""
    keys, values = [], []
    r = layout.rows_per_token
    for position in range(length):
        page = blocks[position // layout.tokens_per_page] + layer
        row = (position % layout.tokens_per_page) * r
        token = kv[page, row : row + r].reshape(2, layout.num_kv_heads, layout.padded_head_dim)
        keys.append(token[0, :, : layout.head_dim])
        values.append(token[1, :, : layout.head_dim])
    return np.stack(keys), np.stack(values)


def paged_attention_reference(
    q: np.ndarray,
    kv: np.ndarray,
    block_tables: np.ndarray,
    kv_lens: np.ndarray,
    query_starts: np.ndarray,
    layer: int,
    *,
    layout: KVLayout,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """See `paged_attention`; `q` is `[T, N, H]`, the result `[T, N, H]` in float64."""
    out = np.zeros(q.shape, np.float64)
    group = q.shape[1] // layout.num_kv_heads
    for s in range(len(kv_lens)):
        start, end = int(query_starts[s]), int(query_starts[s + 1])
        if start == end or kv_lens[s] == 0:
            continue
        k, v = gather_tokens(kv.astype(np.float64), block_tables[s], int(kv_lens[s]), layer, layout)
        for t in range(start, end):
            last = int(kv_lens[s]) - (end - t)  # this query's own position
            first = 0 if window is None else max(0, last - window + 1)
            for n in range(q.shape[1]):
                scores = k[first : last + 1, n // group] @ q[t, n].astype(np.float64) * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[t, n] = weights @ v[first : last + 1, n // group] / weights.sum()
    return out
