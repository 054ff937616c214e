"""Paged attention for Hopper GPUs (H100, H200): supported requests and the choice of the kernel.

The kernels are in `gpu.decode` and `gpu.prefill`, and their common parts in `gpu.core` and
`gpu.producer`. See docs/guides/kernels-gpu.md.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from muxjax.pallas_kernels.gpu.tiles import ROWS, WIDTHS, choose_splits, choose_tiles
from muxjax.pallas_kernels.metadata import AttentionMetadata, AttentionOptions, AttentionRequest
from muxjax.pallas_kernels.target import current_target

HOPPER = ("H100", "H200", "H800", "H20", "GH200")
"""Words in the device kinds of GPUs with `wgmma`; Blackwell's tensor cores have no `wgmma`."""
DTYPES = ("bfloat16", "float16", "float32")
"""Types of a pool that the kernels support."""


def unsupported_reason(request: AttentionRequest) -> str | None:
    """Why the kernels do not support a request, or None."""
    layout, group = request.layout, request.num_heads // request.layout.num_kv_heads
    kind = request.target.device_kind
    if request.target.platform == "gpu" and not set(HOPPER) & set(kind.split()):
        return f"needs a Hopper GPU ({', '.join(HOPPER)}), not {kind}"
    if request.kv_dtype.name not in DTYPES:
        return f"needs a pool of {', '.join(DTYPES)}, not {request.kv_dtype.name}"
    if layout.padded_head_dim > WIDTHS[-1]:
        return f"supports head sizes up to {WIDTHS[-1]}, not {layout.padded_head_dim}"
    if request.decode and group > ROWS:
        return f"supports up to {ROWS} query heads per KV head in decode, not {group}"
    return None


def paged_attention_mosaic_gpu(
    q: Float[Array, "T N H"],
    kv: Float[Array, "P rows 128"],
    metadata: AttentionMetadata,
    options: AttentionOptions,
    layer: Int[Array, ""] | int,
) -> Float[Array, "T N H"]:
    """See `paged_attention`. Queries are rounded to the pool's type."""
    # Imported here, because Mosaic GPU's import is slow and only GPUs need it.
    from muxjax.pallas_kernels.gpu import core
    from muxjax.pallas_kernels.gpu.decode import decode
    from muxjax.pallas_kernels.gpu.prefill import prefill

    layout, block_tables = metadata.layout, metadata.block_tables
    target = current_target()
    tiles = choose_tiles(
        layout,
        kv.dtype,
        decode=metadata.decode,
        device_kind=target.device_kind,
        interpreted=target.platform != "gpu",
    )
    scoring = core.Scoring(options.scale, options.softcap)
    pool = kv.reshape(kv.shape[0], *tiles.page_view)
    queries = q.astype(kv.dtype)
    if padding := tiles.width - layout.head_dim:
        queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padding)))
    layers = jnp.asarray(layer, jnp.int32).reshape(1)
    if metadata.decode:
        tokens = block_tables.shape[1] * layout.tokens_per_page
        out = decode(
            queries,
            pool,
            block_tables,
            metadata.kv_lens,
            layers,
            tiles=tiles,
            splits=choose_splits(tiles, q.shape[0], tokens),
            scoring=scoring,
            window=options.window,
        )
    else:
        out = prefill(
            queries,
            pool,
            block_tables,
            metadata.kv_lens,
            metadata.query_starts,
            layers,
            tiles=tiles,
            scoring=scoring,
            window=options.window,
            out_dtype=q.dtype,
        )
    return out[..., : layout.head_dim].astype(q.dtype)
