"""Decode on Hopper: one query per sequence, with the context split over blocks (flash-decoding).

A block computes one sequence, one KV head and one of `splits` parts of the context. Its 64 rows of
scores are the query heads that share the KV head. The remaining rows are computed and dropped,
which takes no time because the kernel is bound by memory. XLA combines the parts afterwards
(Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from muxjax.pallas_kernels.gpu import core
from muxjax.pallas_kernels.gpu.core import Scalar
from muxjax.pallas_kernels.gpu.producer import ContextProducer
from muxjax.pallas_kernels.gpu.tiles import ROWS, Tiles


def decode(
    q: Float[Array, "S N H"],
    pool: Float[Array, "P U C"],
    block_tables: Int[Array, "S B"],
    kv_lens: Int[Array, " S"],
    layer: Int[Array, "1"],
    *,
    tiles: Tiles,
    splits: int,
    scoring: core.Scoring,
    window: int | None,
) -> Float[Array, "S N H"]:
    """Attention of one query per sequence, in float32.

    Args:
      q: queries in the pool's type, with heads of `tiles.width`.
      pool: the pool, with pages in `tiles.page_view`.
      block_tables: see `AttentionMetadata`.
      kv_lens: see `AttentionMetadata`.
      layer: index of the layer.
      tiles: shapes.
      splits: number of blocks that share a sequence's context.
      scoring: turns products into scores.
      window: see `AttentionOptions`.
    """
    num_seqs, num_heads, width = q.shape
    num_kv = tiles.layout.num_kv_heads
    group = num_heads // num_kv

    def kernel(*refs: Any) -> None:
        q_ref, pool_ref, table, lens, layer_ref, out_ref, stats_ref, *shared, stats = refs
        buffers = core.Buffers(*shared)
        s, split, kv_head = (lax.axis_index(name) for name in ("sequence", "split", "kv_head"))
        length = lens[s]
        lowest = jnp.int32(0) if window is None else jnp.maximum(length - window, 0)
        # The tiles with visible positions, and this block's share of them.
        begin = lowest // tiles.tokens
        end = pl.cdiv(length, tiles.tokens)
        share = pl.cdiv(end - begin, splits)
        first = jnp.minimum(begin + split * share, end)
        last = jnp.minimum(first + share, end)

        def mask(tile: Scalar) -> Bool[Array, "rows tokens"]:
            position = tile * tiles.tokens + plgpu.broadcasted_iota(
                jnp.int32, (ROWS, tiles.tokens), 1, layout=plgpu.Layout.WGMMA
            )
            return (position >= lowest) & (position < length)

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _attend() -> None:
            warpgroup = jnp.int32(0)
            heads = pl.ds(kv_head * group, group)
            core.load_queries(
                tiles, buffers, warpgroup, group, lambda columns: q_ref.at[s, heads, columns]
            )
            acc, maximum, denominator = core.attend(
                tiles,
                buffers,
                warpgroup,
                scoring,
                mask,
                first,
                first,
                last,
                core.initial_state(tiles),
            )
            stats[0] = maximum
            stats[1] = denominator
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stats, stats_ref.at[s, split, kv_head])

            def store(block: Any, columns: Any) -> None:
                plgpu.copy_smem_to_gmem(
                    block.at[pl.ds(0, group)], out_ref.at[s, split, heads, columns]
                )

            core.store_output(buffers, warpgroup, acc, store)

        @pl.when(lax.axis_index("warpgroup") == 1)
        def _produce() -> None:
            producer = ContextProducer(
                tiles, table, pool_ref, s, layer_ref[0], kv_head, lowest, length
            )
            producer.produce(buffers, first, last)

    acc, stats = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((num_seqs, splits, num_heads, width), jnp.float32),
            jax.ShapeDtypeStruct((num_seqs, splits, num_kv, 2, ROWS), jnp.float32),
        ),
        scratch_types=[
            *core.scratch_types(tiles, jnp.dtype(jnp.float32)),
            plgpu.SMEM((2, ROWS), jnp.float32),
        ],
        grid=(num_seqs, splits, num_kv),
        grid_names=("sequence", "split", "kv_head"),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="muxjax_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, pool, block_tables, kv_lens, layer)
    stats = stats[..., :group].transpose(3, 0, 1, 2, 4).reshape(2, num_seqs, splits, num_heads)
    maximum, denominator = stats  # S splits N
    weight = jnp.exp2(maximum - maximum.max(axis=1, keepdims=True))
    total = (denominator * weight).sum(axis=1)  # S N
    out = (acc * weight[..., None]).sum(axis=1)
    # A row with no context has a denominator of 0 and a weighted sum of 0.
    return out / jnp.maximum(total, 1e-30)[..., None]
