"""Paged attention over the shared KV pool: one entry point, several implementations.

`paged_attention` reads the pool; `write_kv` writes the step's new keys and values into it.
"""

from muxjax.pallas_kernels.api import IMPLEMENTATIONS, paged_attention
from muxjax.pallas_kernels.layout import LANES, KVLayout
from muxjax.pallas_kernels.metadata import AttentionMetadata, AttentionOptions
from muxjax.pallas_kernels.write import write_kv

__all__ = [
    "IMPLEMENTATIONS",
    "LANES",
    "AttentionMetadata",
    "AttentionOptions",
    "KVLayout",
    "paged_attention",
    "write_kv",
]
