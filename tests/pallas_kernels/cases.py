"""Pools, tables and queries for the tests that every implementation of paged attention runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.reference import gather_tokens

GEOMETRIES = [
    (32, 8, 128),
    (32, 32, 128),
    (14, 2, 64),
    (9, 3, 64),
    (4, 1, 256),
    (64, 8, 128),
    (6, 6, 48),  # heads are padded to 64
    (8, 4, 80),  # heads lie across rows
]


_TOKENS = 16
"""Tokens of a page, about."""


def layout_of(geometry: tuple[int, int, int]) -> KVLayout:
    """A page of whole tiles (16 rows), with rows after the last whole token where that can be."""
    _, num_kv, head_dim = geometry
    r = KVLayout(10**6, num_kv, head_dim).rows_per_token
    rows = r * _TOKENS
    return KVLayout(rows + 16 if 16 % r else rows, num_kv, head_dim)


@dataclass(frozen=True)
class Case:
    """Arguments of `paged_attention` but for its options."""

    q: np.ndarray
    kv: np.ndarray
    block_tables: np.ndarray
    kv_lens: np.ndarray
    query_starts: np.ndarray
    layer: int
    layout: KVLayout

    def rounded(self) -> Case:
        """With queries and pool as bfloat16 holds them: rounding them is no implementation's."""
        q, kv = (x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (self.q, self.kv))
        return replace(self, q=q, kv=kv)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.q, self.kv, self.block_tables, self.kv_lens, self.query_starts


def make_case(
    geometry: tuple[int, int, int],
    kv_lens: list[int],
    query_lens: list[int],
    *,
    padding: int = 0,
    layout: KVLayout | None = None,
    seed: int = 0,
) -> Case:
    """Random sequences of two layers; every pool row that must not be read holds NaN.

    Args:
      geometry: (N, K, H).
      kv_lens: tokens of each context.
      query_lens: queries of each sequence; the rest of `q` (`padding` more) is NaN as well.
      layout: of the pool; by default `layout_of` the geometry.
    """
    num_heads, _, head_dim = geometry
    rng = np.random.default_rng(seed)
    layout = layout_of(geometry) if layout is None else layout
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
    return Case(q, kv, tables, np.array(kv_lens, np.int32), starts, layer, layout)


def dense(case: Case, scale: float, window: int | None, softcap: float | None) -> np.ndarray:
    """What the queries must give, by whole matrices in float64."""
    out = np.zeros(case.q.shape)
    group = case.q.shape[1] // case.layout.num_kv_heads
    for s, length in enumerate(case.kv_lens.tolist()):
        start, end = case.query_starts[s], case.query_starts[s + 1]
        if start == end or length == 0:
            continue
        k, v = gather_tokens(
            case.kv.astype(np.float64), case.block_tables[s], length, case.layer, case.layout
        )
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("qnh,tnh->nqt", case.q[start:end].astype(np.float64), k) * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        own = length - (end - start) + np.arange(end - start)[:, None]
        at = np.arange(length)
        seen = at <= own
        if window is not None:
            seen &= at > own - window
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[start:end] = np.einsum("nqt,tnh->qnh", weights, v)
    return out
