"""Paged attention for TPUs by Pallas's Mosaic backend: block sizes, and the choice of the kernel.

Two kernels over the pool as it lies: `mosaic_tpu_decode` for one query a sequence, and
`mosaic_tpu_prefill` for ragged queries of any lengths. See docs/kernels.md.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from muxjax.pallas_kernels.layout import KVLayout
from muxjax.pallas_kernels.metadata import AttentionRequest
from muxjax.pallas_kernels.target import current_target
from muxjax.pallas_kernels.tpu.blocks import decode_sizes, prefill_sizes
from muxjax.pallas_kernels.tpu.decode import decode as decode_kernel
from muxjax.pallas_kernels.tpu.head_rows import HeadRows, select_outputs, spread_queries
from muxjax.pallas_kernels.tpu.pages import TILE
from muxjax.pallas_kernels.tpu.prefill import prefill as prefill_kernel

_DTYPES = ("bfloat16", "float32")


def unsupported_reason(request: AttentionRequest) -> str | None:
    """Why the kernels cannot carry out a request, or None."""
    if request.kv_dtype.name not in _DTYPES:
        return f"takes pools of {' and '.join(_DTYPES)}, not {request.kv_dtype.name}"
    if request.layout.rows % TILE:
        return f"takes pages of a multiple of {TILE} rows, not {request.layout.rows}"
    return None


def paged_attention_mosaic_tpu(
    q: Float[Array, "T N H"],
    kv: Float[Array, "P rows 128"],
    block_tables: Int[Array, "S B"],
    kv_lens: Int[Array, " S"],
    query_starts: Int[Array, " S+1"],
    layer: Int[Array, ""] | int,
    *,
    layout: KVLayout,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    decode: bool = False,
) -> Float[Array, "T N H"]:
    """See `paged_attention`; products are in the pool's type with sums in float32."""
    num_tokens, num_heads, _ = q.shape
    rows, layer = HeadRows.of(layout), jnp.asarray(layer, jnp.int32)
    spread = spread_queries((q.astype(jnp.float32) * scale).astype(kv.dtype), rows)
    kind = current_target().device_kind
    if decode:
        sizes = decode_sizes(kind, layout, num_heads, kv.dtype)
        # Whole tiles of query heads.
        spread = jnp.pad(spread, ((0, 0), (0, -num_heads % TILE), (0, 0)))
        out = decode_kernel(
            spread,
            kv,
            block_tables,
            kv_lens,
            layer,
            num_heads=num_heads,
            layout=layout,
            window=window,
            softcap=softcap,
            pages=sizes.pages,
            vmem_bytes=sizes.vmem_bytes,
        )[:, :num_heads]
    else:
        num_seqs = kv_lens.shape[0]
        sizes = prefill_sizes(kind, layout, num_heads, num_tokens, num_seqs, kv.dtype)
        out = prefill_kernel(
            spread,
            kv,
            block_tables,
            kv_lens,
            query_starts,
            layer,
            layout=layout,
            window=window,
            softcap=softcap,
            pages=sizes.pages,
            queries=sizes.queries,
            vmem_bytes=sizes.vmem_bytes,
        )
    return select_outputs(out, rows, layout).astype(q.dtype)
