"""Pools, tables and queries for tests of paged attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from muxjax.pallas_kernels import AttentionMetadata, KVLayout
from muxjax.pallas_kernels.reference import gather_tokens

GEOMETRIES = [
    (32, 8, 128),
    (32, 32, 128),
    (14, 2, 64),
    (9, 3, 64),
    (4, 1, 256),
    (64, 8, 128),
    (6, 6, 48),  # heads are padded to 64
    (8, 4, 80),  # heads extend across rows
]
"""(N, K, H)."""
_TOKENS = 16
"""Approximate number of tokens in a page."""


def build_layout(geometry: tuple[int, int, int]) -> KVLayout:
    """Pages of whole tiles (16 rows), with unused rows after the last token where possible."""
    _, num_kv, head_dim = geometry
    r = KVLayout(10**6, num_kv, head_dim).rows_per_token
    rows = r * _TOKENS
    return KVLayout(rows + 16 if 16 % r else rows, num_kv, head_dim)


@dataclass(frozen=True)
class AttentionCase:
    """Arguments of `paged_attention` except its options, as NumPy arrays."""

    q: np.ndarray
    kv: np.ndarray
    metadata: AttentionMetadata
    layer: int

    @property
    def layout(self) -> KVLayout:
        """The model's geometry in the pool."""
        return self.metadata.layout

    @property
    def kv_lens(self) -> np.ndarray:
        """Tokens in each context, `[S]`."""
        return np.asarray(self.metadata.kv_lens)

    @property
    def query_starts(self) -> np.ndarray:
        """Cumulative counts of queries, `[S + 1]`."""
        return np.asarray(self.metadata.query_starts)

    def rounded(self) -> AttentionCase:
        """The case with queries and pool rounded to bfloat16, so that bfloat16 inputs are exact."""
        q, kv = (x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (self.q, self.kv))
        return replace(self, q=q, kv=kv)


def build_case(
    geometry: tuple[int, int, int],
    kv_lens: list[int],
    query_lens: list[int],
    *,
    padding: int = 0,
    layout: KVLayout | None = None,
    seed: int = 0,
    decode: bool = False,
) -> AttentionCase:
    """Builds random sequences of two layers; pool rows that must not be read contain NaN.

    Args:
      geometry: (N, K, H).
      kv_lens: tokens of each context.
      query_lens: queries of each sequence.
      padding: rows of NaN after the last query.
      layout: the pool's layout; by default `build_layout(geometry)`.
      seed: seed of the random numbers.
      decode: whether each sequence has one query.
    """
    num_heads, _, head_dim = geometry
    rng = np.random.default_rng(seed)
    layout = build_layout(geometry) if layout is None else layout
    rows, tokens_per_page = layout.rows, layout.tokens_per_page
    layers, layer = 2, 1
    blocks = [-(-length // tokens_per_page) for length in kv_lens]
    width = max(1, *blocks) + 1
    count = sum(blocks) + 1  # the dummy block is the first
    kv = np.full((count * layers, rows, 128), np.nan, np.float32)
    free = list(rng.permutation(np.arange(1, count)) * layers)
    tables = np.zeros((len(kv_lens), width), np.int32)
    for s, length in enumerate(kv_lens):
        for b in range(blocks[s]):
            tables[s, b] = free.pop()
        used = layout.rows_per_token
        for position in range(length):
            row = position % tokens_per_page * used
            page = tables[s, position // tokens_per_page] + layer
            kv[page, row : row + used] = rng.standard_normal((used, 128))
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    q = np.full((starts[-1] + padding, num_heads, head_dim), np.nan, np.float32)
    q[: starts[-1]] = rng.standard_normal((starts[-1], num_heads, head_dim))
    lens = np.array(kv_lens, np.int32)
    return AttentionCase(q, kv, AttentionMetadata(tables, lens, starts, layout, decode), layer)


def compute_dense(
    case: AttentionCase, scale: float, window: int | None, softcap: float | None
) -> np.ndarray:
    """The expected output, `[T, N, H]` in float64, from complete score matrices."""
    out = np.zeros(case.q.shape)
    group = case.q.shape[1] // case.layout.num_kv_heads
    for s, length in enumerate(case.kv_lens.tolist()):
        start, end = case.query_starts[s], case.query_starts[s + 1]
        if start == end or length == 0:
            continue
        blocks = np.asarray(case.metadata.block_tables)[s]
        k, v = gather_tokens(case.kv.astype(np.float64), blocks, length, case.layer, case.layout)
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("qnh,tnh->nqt", case.q[start:end].astype(np.float64), k) * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        query_position = length - (end - start) + np.arange(end - start)[:, None]
        position = np.arange(length)
        visible = position <= query_position
        if window is not None:
            visible &= position > query_position - window
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[start:end] = np.einsum("nqt,tnh->qnh", weights, v)
    return out
