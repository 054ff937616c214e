"""Paged attention for TPUs: supported requests, block sizes, and the choice of the kernel.

Two kernels in Pallas's Mosaic backend read the pool in its stored layout: `tpu.decode` for one
query per sequence, and `tpu.prefill` for ragged queries. See docs/guides/kernels.md.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from muxjax.pallas_kernels.metadata import AttentionMetadata, AttentionOptions, AttentionRequest
from muxjax.pallas_kernels.target import current_target
from muxjax.pallas_kernels.tpu.blocks import decode_sizes, prefill_sizes
from muxjax.pallas_kernels.tpu.decode import decode as decode_kernel
from muxjax.pallas_kernels.tpu.head_rows import HeadRows, select_outputs, spread_queries
from muxjax.pallas_kernels.tpu.pages import TILE
from muxjax.pallas_kernels.tpu.prefill import prefill as prefill_kernel

DTYPES = ("bfloat16", "float32")
"""Types of a pool that the kernels support."""


def unsupported_reason(request: AttentionRequest) -> str | None:
    """Why the kernels do not support a request, or None."""
    if request.kv_dtype.name not in DTYPES:
        return f"needs a pool of {' or '.join(DTYPES)}, not {request.kv_dtype.name}"
    if request.layout.rows % TILE:
        return f"needs pages of a multiple of {TILE} rows, not {request.layout.rows}"
    return None


def paged_attention_mosaic_tpu(
    q: Float[Array, "T N H"],
    kv: Float[Array, "P rows 128"],
    metadata: AttentionMetadata,
    options: AttentionOptions,
    layer: Int[Array, ""] | int,
) -> Float[Array, "T N H"]:
    """See `paged_attention`; products are in the pool's type with sums in float32."""
    num_tokens, num_heads, _ = q.shape
    layout, kv_lens = metadata.layout, metadata.kv_lens
    rows, layer = HeadRows.from_layout(layout), jnp.asarray(layer, jnp.int32)
    spread = spread_queries((q.astype(jnp.float32) * options.scale).astype(kv.dtype), rows)
    kind = current_target().device_kind
    if metadata.decode:
        sizes = decode_sizes(kind, layout, num_heads, kv.dtype)
        # The kernel needs whole tiles of query heads.
        spread = jnp.pad(spread, ((0, 0), (0, -num_heads % TILE), (0, 0)))
        out = decode_kernel(
            spread,
            kv,
            metadata.block_tables,
            kv_lens,
            layer,
            num_heads=num_heads,
            layout=layout,
            window=options.window,
            softcap=options.softcap,
            pages=sizes.pages,
            vmem_bytes=sizes.vmem_bytes,
        )[:, :num_heads]
    else:
        num_seqs = kv_lens.shape[0]
        sizes = prefill_sizes(kind, layout, num_heads, num_tokens, num_seqs, kv.dtype)
        out = prefill_kernel(
            spread,
            kv,
            metadata.block_tables,
            kv_lens,
            metadata.query_starts,
            layer,
            layout=layout,
            window=options.window,
            softcap=options.softcap,
            pages=sizes.pages,
            queries=sizes.queries,
            vmem_bytes=sizes.vmem_bytes,
        )
    return select_outputs(out, rows, layout).astype(q.dtype)
