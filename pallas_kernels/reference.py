"""Reference paged attention in NumPy: loops over sequences, queries and heads, in float64.

Runs on the host and is slow. All other implementations are tested against it.
"""

from __future__ import annotations

import numpy as np

from muxjax.pallas_kernels.layout import KVLayout
from muxjax.pallas_kernels.metadata import AttentionMetadata, AttentionOptions


def gather_tokens(
    kv: np.ndarray, blocks: np.ndarray, length: int, layer: int, layout: KVLayout
) -> tuple[np.ndarray, np.ndarray]:
    """Gathers the first `length` keys and values of one sequence, each `[length, K, H]`.

    Args:
      kv: the pool, `[P, rows, 128]`.
      blocks: first page of each block of the sequence.
      length: number of tokens.
      layer: index of the layer.
      layout: the model's geometry in the pool.
    """
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
    metadata: AttentionMetadata,
    options: AttentionOptions,
    layer: int,
) -> np.ndarray:
    """See `paged_attention`. All arrays are NumPy arrays; the result is `[T, N, H]` in float64."""
    layout, window, softcap = metadata.layout, options.window, options.softcap
    out = np.zeros(q.shape, np.float64)
    group = q.shape[1] // layout.num_kv_heads
    for s, length in enumerate(np.asarray(metadata.kv_lens).tolist()):
        start, end = int(metadata.query_starts[s]), int(metadata.query_starts[s + 1])
        if start == end or length == 0:
            continue
        blocks = np.asarray(metadata.block_tables)[s]
        k, v = gather_tokens(kv.astype(np.float64), blocks, length, layer, layout)
        for t in range(start, end):
            last = length - (end - t)  # position of this query
            first = 0 if window is None else max(0, last - window + 1)
            for n in range(q.shape[1]):
                keys = k[first : last + 1, n // group]
                scores = keys @ q[t, n].astype(np.float64) * options.scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[t, n] = weights @ v[first : last + 1, n // group] / weights.sum()
    return out
