"""Paged attention for Hopper GPUs (H100, H200) in Pallas Mosaic GPU; JAX 0.11 or later.

The kernels are in `mosaic_gpu_decode` and `mosaic_gpu_prefill`, what they share in
`mosaic_gpu_core`; docs/kernels-gpu.md has the picture.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from muxjax.pallas_kernels.gpu.tiles import ROWS, WIDTHS, choose_splits, choose_tiles
from muxjax.pallas_kernels.layout import KVLayout
from muxjax.pallas_kernels.metadata import AttentionRequest
from muxjax.pallas_kernels.target import current_target

FIRST_JAX = (0, 11)
"""The first JAX whose Mosaic GPU this is written for."""
HOPPER = ("H100", "H200", "H800", "H20", "GH200")
"""In the names of GPUs with `wgmma`. Blackwell has other instructions for its tensor cores."""
DTYPES = ("bfloat16", "float16", "float32")


def unsupported_reason(request: AttentionRequest) -> str | None:
    """Why the kernels cannot carry out a request, or None."""
    layout, group = request.layout, request.num_heads // request.layout.num_kv_heads
    if jax.__version_info__ < FIRST_JAX:
        return f"needs JAX {'.'.join(map(str, FIRST_JAX))} or later, this is {jax.__version__}"
    kind = request.target.device_kind
    if request.target.platform == "gpu" and not set(HOPPER) & set(kind.split()):
        return f"made for Hopper GPUs ({', '.join(HOPPER)}), not {kind}"
    if request.kv_dtype.name not in DTYPES:
        return f"takes pools of {', '.join(DTYPES)}, not {request.kv_dtype.name}"
    if layout.padded_head_dim > WIDTHS[-1]:
        return f"takes heads of up to {WIDTHS[-1]}, not {layout.padded_head_dim}"
    if request.decode and group > ROWS:
        return f"takes up to {ROWS} query heads for each KV head in decode, not {group}"
    return None


def paged_attention_mosaic_gpu(
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
    """See `paged_attention`. Queries are rounded to the pool's type."""
    # Imported here: `jax.experimental.pallas.mosaic_gpu` of older JAX lacks what the kernels use.
    from muxjax.pallas_kernels.gpu import core as mosaic_gpu_core
    from muxjax.pallas_kernels.gpu import decode as mosaic_gpu_decode
    from muxjax.pallas_kernels.gpu import prefill as mosaic_gpu_prefill

    target = current_target()
    tiles = choose_tiles(
        layout,
        kv.dtype,
        decode=decode,
        device_kind=target.device_kind,
        interpreted=target.platform != "gpu",
    )
    scores = mosaic_gpu_core.Scores(scale, softcap)
    pool = kv.reshape(kv.shape[0], *tiles.page_view)
    queries = q.astype(kv.dtype)
    if padding := tiles.width - layout.head_dim:
        queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padding)))
    layers = jnp.asarray(layer, jnp.int32).reshape(1)
    if decode:
        tokens = block_tables.shape[1] * layout.tokens_per_page
        out = mosaic_gpu_decode.decode(
            queries,
            pool,
            block_tables,
            kv_lens,
            layers,
            tiles=tiles,
            splits=choose_splits(tiles, q.shape[0], tokens),
            scores=scores,
            window=window,
        )
    else:
        out = mosaic_gpu_prefill.prefill(
            queries,
            pool,
            block_tables,
            kv_lens,
            query_starts,
            layers,
            tiles=tiles,
            scores=scores,
            window=window,
            out_dtype=q.dtype,
        )
    return out[..., : layout.head_dim].astype(q.dtype)
