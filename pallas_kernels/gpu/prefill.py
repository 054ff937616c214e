"""Prefill on Hopper: ragged queries on the tensor cores.

A block computes one query head and up to `warpgroups * 64` consecutive queries of one sequence. Its
warpgroups share the tiles of keys and values that the producer fetches (as in FlashAttention-3,
Shah et al. 2024). Tiles that are visible to all queries of a warpgroup are computed without a mask.
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

_SEQUENCE, _START, _QUERIES, _POSITION, _LENGTH, _FIELDS = range(6)


def split_queries(
    kv_lens: Int[Array, " S"], query_starts: Int[Array, " S+1"], num_tokens: int, size: int
) -> Int[Array, "5 blocks"]:
    """Splits ragged queries into blocks of at most `size` queries of one sequence.

    The number of blocks is the maximum for `num_tokens` queries; unneeded blocks have no queries.
    Padding after the last sequence is treated as another sequence, without context; its output is
    zeros.

    Returns:
      For each block: sequence, first query, number of queries, position of the first query in its
      sequence, tokens of the sequence.
    """
    num_seqs = kv_lens.shape[0]
    ends = jnp.append(query_starts[1:], num_tokens)
    lengths = jnp.append(kv_lens, 0)
    counts = ends - query_starts
    blocks_before = jnp.cumulative_sum(pl.cdiv(counts, size), include_initial=True)
    block = jnp.arange(pl.cdiv(num_tokens, size) + num_seqs + 1, dtype=jnp.int32)
    s = jnp.searchsorted(blocks_before, block, side="right") - 1
    s = jnp.minimum(s, num_seqs)
    start = query_starts[s] + (block - blocks_before[s]) * size
    queries = jnp.clip(ends[s] - start, 0, size)
    position = lengths[s] - (ends[s] - start)
    table_row = jnp.minimum(s, num_seqs - 1)
    return jnp.stack([table_row, start, queries, position, lengths[s]]).astype(jnp.int32)


def prefill(
    q: Float[Array, "T N H"],
    pool: Float[Array, "P U C"],
    block_tables: Int[Array, "S B"],
    kv_lens: Int[Array, " S"],
    query_starts: Int[Array, " S+1"],
    layer: Int[Array, "1"],
    *,
    tiles: Tiles,
    scoring: core.Scoring,
    window: int | None,
    out_dtype: jnp.dtype,
) -> Float[Array, "T N H"]:
    """Causal attention of ragged queries.

    Args:
      q: queries in the pool's type, with heads of `tiles.width`.
      pool: the pool, with pages in `tiles.page_view`.
      block_tables: see `AttentionMetadata`.
      kv_lens: see `AttentionMetadata`.
      query_starts: see `AttentionMetadata`.
      layer: index of the layer.
      tiles: shapes.
      scoring: turns products into scores.
      window: see `AttentionOptions`.
      out_dtype: type of the result.
    """
    num_tokens, num_heads, width = q.shape
    group = num_heads // tiles.layout.num_kv_heads
    step = tiles.tokens
    work = split_queries(kv_lens, query_starts, num_tokens, tiles.warpgroups * ROWS)

    def kernel(*refs: Any) -> None:
        q_ref, pool_ref, table, work, layer_ref, out_ref, *shared = refs
        buffers = core.Buffers(*shared)
        block, head = lax.axis_index("block"), lax.axis_index("head")
        s, start, queries, position, length = (work[i, block] for i in range(_FIELDS))
        lowest = jnp.int32(0) if window is None else jnp.maximum(position - window + 1, 0)
        begin = lowest // step

        def end_of(queries: Scalar) -> Scalar:
            """One past the last tile that is visible to the block's first `queries` queries."""
            return jnp.where(length > 0, pl.cdiv(position + queries, step), begin)

        end = end_of(queries)

        def attend(warpgroup: Scalar) -> None:
            offset = warpgroup * ROWS
            rows = jnp.clip(queries - offset, 0, ROWS)
            warpgroup_end = jnp.where(rows > 0, end_of(offset + rows), begin)
            first_query = position + offset

            def mask(tile: Scalar) -> Bool[Array, "rows tokens"]:
                query, token = (
                    plgpu.broadcasted_iota(jnp.int32, (ROWS, step), axis, layout=plgpu.Layout.WGMMA)
                    for axis in (0, 1)
                )
                # Positions from a token to the query.
                distance = query - token + (first_query - tile * step)
                return distance >= 0 if window is None else (distance >= 0) & (distance < window)

            # Tiles from `full_begin` to `full_end` are visible to all queries of the warpgroup.
            full_end = jnp.clip((first_query + 1) // step, begin, warpgroup_end)
            if window is None:
                full_begin = begin
            else:
                oldest = first_query + ROWS - window  # the first position visible to the last query
                full_begin = jnp.clip(pl.cdiv(oldest, step), begin, full_end)

            @pl.when(rows > 0)
            def _compute() -> None:
                core.load_queries(
                    tiles,
                    buffers,
                    warpgroup,
                    ROWS,
                    lambda columns: q_ref.at[pl.ds(start + offset, ROWS), head, columns],
                )

                def attend_range(
                    first: Scalar, last: Scalar, masked: bool, state: core.State
                ) -> core.State:
                    return core.attend(
                        tiles,
                        buffers,
                        warpgroup,
                        scoring,
                        mask if masked else None,
                        begin,
                        first,
                        last,
                        state,
                    )

                state = core.initial_state(tiles)
                if window is not None:
                    state = attend_range(begin, full_begin, True, state)
                state = attend_range(full_begin, full_end, False, state)
                acc, _, denominator = attend_range(full_end, warpgroup_end, True, state)
                # A row with no context has a denominator of 0 and a weighted sum of 0.
                inverse = 1.0 / jnp.maximum(denominator, 1e-30)
                inverse = lax.broadcast_in_dim(inverse, acc.shape, [0])

                def store(block: Any, columns: Any) -> None:
                    # Later rows belong to another block: copies exactly `rows`, by powers of 2.
                    size = ROWS
                    while size:

                        @pl.when((rows & size) != 0)
                        def _copy(size: int = size) -> None:
                            done = rows & ~(2 * size - 1)
                            plgpu.copy_smem_to_gmem(
                                block.at[pl.ds(done, size)],
                                out_ref.at[pl.ds(start + offset + done, size), head, columns],
                            )

                        size //= 2

                core.store_output(buffers, warpgroup, acc * inverse, store)

            # Releases the tiles that only other warpgroups read.
            @pl.loop(warpgroup_end, end)
            def _skip(tile: Scalar) -> None:
                slot = lax.rem(tile - begin, tiles.stages)
                for which in range(2):
                    plgpu.barrier_wait(buffers.ready.at[which, slot])
                    plgpu.barrier_arrive(buffers.free.at[which, slot])

        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < tiles.warpgroups)
        def _attend() -> None:
            core.reallocate_registers(tiles, producer=False)
            attend(warpgroup)

        @pl.when(warpgroup == tiles.warpgroups)
        def _produce() -> None:
            core.reallocate_registers(tiles, producer=True)
            ContextProducer(
                tiles, table, pool_ref, s, layer_ref[0], head // group, lowest, length
            ).produce(buffers, begin, end)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, num_heads, width), out_dtype),
        scratch_types=core.scratch_types(tiles, out_dtype),
        grid=(work.shape[1], num_heads),
        grid_names=("block", "head"),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="muxjax_prefill",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, pool, block_tables, work, layer)
