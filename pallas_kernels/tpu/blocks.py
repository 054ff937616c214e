"""Block sizes of the TPU kernels, from the table of measured sizes or else by rule.

`benchmarks/tune_attention.py` measures the entries of the table on a device.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from muxjax.pallas_kernels.layout import KVLayout


class BlockGeometry(NamedTuple):
    """Key of a measured size.

    Attributes:
      device_kind: JAX's name of the device.
      kind: 'decode' or 'prefill'.
      num_heads, num_kv_heads, head_dim: `N`, `K`, `H`.
      rows: rows in a page.
      dtype: type of the pool.
    """

    device_kind: str
    kind: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rows: int
    dtype: str


class BlockSizes(NamedTuple):
    """Block sizes of a kernel.

    Attributes:
      pages: pages copied and computed at a time.
      queries: tokens per block of queries; 1 in decode.
      vmem_bytes: maximum VMEM of the kernel, in bytes.
    """

    pages: int
    queries: int
    vmem_bytes: int


TUNED: dict[BlockGeometry, tuple[int, int]] = {}
"""The fastest measured pages and queries. Empty: no device has been tuned yet."""

_VMEM_BYTES = {"TPU7x": 48 << 20}
_DEFAULT_VMEM_BYTES = 64 << 20
"""Half of the VMEM of a v5e or v6e core, and three quarters of a TPU7x core's 64 MiB."""

_COPY_BYTES = {
    "TPU v4": 1 << 20,
    "TPU v5": 1 << 21,
    "TPU v5 lite": 1 << 19,
    "TPU v6 lite": 1 << 20,
    "TPU7x": 1 << 21,
}
_DEFAULT_COPY_BYTES = 1 << 19
"""Bytes of a block of pages in decode. Copies in flight of this size hide an HBM latency of about
1 us (Little's law: 1230, 2765, 819, 1640, 3690 GB/s per core)."""

_PREFILL_TOKENS = 256
"""Approximate tokens of a block of pages in prefill: at least the width of the MXU."""
_PREFILL_ROWS = 4096
"""Maximum rows, `N Q`, of a block of queries: 2 MiB of float32 sums at 128 lanes."""
_MIN_QUERIES = 64
"""Minimum tokens of a block of queries, if the step has enough. With four query heads per KV head,
this gives 256 operations per byte of context, about a v5e's ratio of operations to HBM bytes."""
_MAX_QUERIES = 256
"""Maximum tokens of a block of queries. Larger blocks read a context's pages less often, but
compute more masked scores."""
_MAX_SCORE_BYTES = 4 << 20
"""Maximum bytes of one float32 array of scores."""


def decode_sizes(
    device_kind: str, layout: KVLayout, num_heads: int, dtype: jnp.dtype
) -> BlockSizes:
    """Chooses the block sizes of decode."""
    limit = _VMEM_BYTES.get(device_kind, _DEFAULT_VMEM_BYTES)
    if tuned := TUNED.get(_table_key(device_kind, "decode", layout, num_heads, dtype)):
        return BlockSizes(*tuned, limit)
    page = layout.rows * 128 * jnp.dtype(dtype).itemsize
    by_copy = _COPY_BYTES.get(device_kind, _DEFAULT_COPY_BYTES) // page
    by_scores = _MAX_SCORE_BYTES // (num_heads * layout.rows * 4)
    return BlockSizes(max(1, min(by_copy, by_scores)), 1, limit)


def prefill_sizes(
    device_kind: str,
    layout: KVLayout,
    num_heads: int,
    num_tokens: int,
    num_seqs: int,
    dtype: jnp.dtype,
) -> BlockSizes:
    """Chooses the block sizes of prefill for up to `num_tokens` queries of `num_seqs` sequences."""
    limit = _VMEM_BYTES.get(device_kind, _DEFAULT_VMEM_BYTES)
    if tuned := TUNED.get(_table_key(device_kind, "prefill", layout, num_heads, dtype)):
        return BlockSizes(*tuned, limit)
    queries = 16
    # A sequence's last block may be almost empty, and empty queries also need memory.
    average = max(num_tokens // num_seqs, _MIN_QUERIES)
    limit_queries = min(num_tokens, average, _PREFILL_ROWS // num_heads, _MAX_QUERIES)
    while 2 * queries <= limit_queries:
        queries *= 2
    pages = max(1, _PREFILL_TOKENS // layout.tokens_per_page)
    return BlockSizes(pages, queries, limit)


def _table_key(
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
