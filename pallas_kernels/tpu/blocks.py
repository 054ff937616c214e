"""Block sizes of the TPU kernels: measured where they are in the table, else worked out.

The table is filled by `benchmarks/tune_attention.py` on the device it names.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from muxjax.pallas_kernels.layout import KVLayout


class BlockGeometry(NamedTuple):
    """What a measured size holds for.

    Attributes:
      device_kind: as JAX names it.
      kind: 'decode' or 'prefill'.
      num_heads, num_kv_heads, head_dim: `N`, `K`, `H`.
      rows: of a page.
      dtype: of the pool.
    """

    device_kind: str
    kind: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rows: int
    dtype: str


class Sizes(NamedTuple):
    """Sizes of the blocks.

    Attributes:
      pages: copied and computed at a time.
      queries: tokens of a block of queries; 1 in decode.
      vmem_bytes: limit of what the kernel may take.
    """

    pages: int
    queries: int
    vmem_bytes: int


TUNED: dict[BlockGeometry, tuple[int, int]] = {}
"""Pages and queries that were measured to be fastest. Empty: no TPU was at hand yet."""

_VMEM = {"TPU7x": 48 << 20}
_DEFAULT_VMEM = 64 << 20
"""Half of the VMEM of a v5e or v6e core, three quarters of a TPU7x's (64 MiB)."""

_COPY_BYTES = {
    "TPU v4": 1 << 20,
    "TPU v5": 1 << 21,
    "TPU v5 lite": 1 << 19,
    "TPU v6 lite": 1 << 20,
    "TPU7x": 1 << 21,
}
_DEFAULT_COPY_BYTES = 1 << 19
"""Bytes of a block of pages in decode: what must be on its way to cover the latency of about a
microsecond (Little's law: 1230, 2765, 819, 1640, 3690 GB/s a core), with two buffers."""

_PREFILL_TOKENS = 256
"""Tokens of a block of pages in prefill, about: two or more columns of the MXU."""
_PREFILL_ROWS = 4096
"""Rows, `N Q`, of a block of queries: 2 MiB of float32 sums at 128 lanes."""
_FEWEST_QUERIES = 64
"""The same at least, where there are so many: 256 operations for each byte of a context with four
query heads to a KV head, about what a v5e has for each byte of its HBM."""
_MOST_QUERIES = 256
"""Tokens of a block of queries. More would see a context's pages fewer times, but compute more of
what causality then masks."""
_SCORE_BYTES = 4 << 20
"""At most, of one array of scores in float32."""


def decode_sizes(device_kind: str, layout: KVLayout, num_heads: int, dtype: jnp.dtype) -> Sizes:
    """Sizes for decode."""
    limit = _VMEM.get(device_kind, _DEFAULT_VMEM)
    if found := TUNED.get(_geometry(device_kind, "decode", layout, num_heads, dtype)):
        return Sizes(*found, limit)
    page = layout.rows * 128 * jnp.dtype(dtype).itemsize
    by_copy = _COPY_BYTES.get(device_kind, _DEFAULT_COPY_BYTES) // page
    by_scores = _SCORE_BYTES // (num_heads * layout.rows * 4)
    return Sizes(max(1, min(by_copy, by_scores)), 1, limit)


def prefill_sizes(
    device_kind: str,
    layout: KVLayout,
    num_heads: int,
    num_tokens: int,
    num_seqs: int,
    dtype: jnp.dtype,
) -> Sizes:
    """Sizes for ragged queries, of which there are `num_tokens` at most."""
    limit = _VMEM.get(device_kind, _DEFAULT_VMEM)
    if found := TUNED.get(_geometry(device_kind, "prefill", layout, num_heads, dtype)):
        return Sizes(*found, limit)
    queries = 16
    # Each sequence may leave a block all but empty, and empty queries take memory too.
    even = max(num_tokens // num_seqs, _FEWEST_QUERIES)
    most = min(num_tokens, even, _PREFILL_ROWS // num_heads, _MOST_QUERIES)
    while 2 * queries <= most:
        queries *= 2
    pages = max(1, _PREFILL_TOKENS // layout.tokens_per_page)
    return Sizes(pages, queries, limit)


def _geometry(
    device_kind: str, kind: str, layout: KVLayout, num_heads: int, dtype: jnp.dtype
) -> BlockGeometry:
    return BlockGeometry(
        device_kind,
        kind,
        num_heads,
        layout.num_kv_heads,
        layout.head_dim,
        layout.rows,
        jnp.dtype(dtype).name,
    )
