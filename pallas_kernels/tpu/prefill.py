"""Attention of ragged queries on a TPU: chunks of prompts, mixed with single tokens.

The queries of each sequence are split into blocks of `Q`. One grid step computes one block over its
visible context, with an online softmax (FlashAttention, Dao et al. 2022). All `G` query heads of a
KV head form one operand, `[G Q, lanes]`, which fills the MXU.

Keys and values of a head are every `R`-th row of a page. A block of pages is converted to float32
in VMEM once, with zeros in rows that must not be read. Each head's rows are then loaded with a
stride of `R`. Mosaic supports strided loads of 32-bit rows only, and packed bfloat16 rows could be
split only if `R` is even.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from muxjax.pallas_kernels.layout import LANES, KVLayout
from muxjax.pallas_kernels.tpu.head_rows import HeadRows
from muxjax.pallas_kernels.tpu.pages import TILE, PageBlock, PageCopies, zero_rows_outside

MASKED = -1e30
_NO_TOKEN = 1 << 30
_SUBLANES = 8


class _QueryBlocks(NamedTuple):
    """Packed queries split into blocks of one sequence."""

    seq: Int[Array, " blocks"]  # index of the sequence
    position: Int[Array, " blocks"]  # position of the first query in the sequence
    filled: Int[Array, " blocks"]  # number of queries; 0 for an unneeded block
    source: Int[Array, "blocks Q"]  # index of each query among the packed queries
    slot: Int[Array, " T"]  # index of each packed query among the blocks' queries
    is_query: Bool[Array, " T"]  # False for padding


def prefill(
    q: Float[Array, "T N C"],
    kv: Float[Array, "P rows 128"],
    block_tables: Int[Array, "S B"],
    kv_lens: Int[Array, " S"],
    query_starts: Int[Array, " S+1"],
    layer: Int[Array, ""],
    *,
    layout: KVLayout,
    window: int | None,
    softcap: float | None,
    pages: int,
    queries: int,
    vmem_bytes: int,
) -> Float[Array, "T N C"]:
    """Attention of packed queries, scaled and spread (`head_rows.spread_queries`).

    Args:
      q: queries in the pool's type.
      kv: the pool.
      block_tables: see `AttentionMetadata`.
      kv_lens: see `AttentionMetadata`.
      query_starts: see `AttentionMetadata`.
      layer: index of the layer.
      layout: the model's geometry in the pool.
      window: see `AttentionOptions`.
      softcap: see `AttentionOptions`.
      pages: pages copied and computed at a time.
      queries: `Q`, tokens per block of queries.
      vmem_bytes: maximum VMEM of the kernel, in bytes.

    Returns:
      Outputs in the pool's type, in the layout of spread values (`head_rows.select_outputs`); zeros
      where `q` is padding.
    """
    num_tokens, num_heads, width = q.shape
    num_kv = layout.num_kv_heads
    group = num_heads // num_kv
    blocks = _split_queries(num_tokens, kv_lens, query_starts, queries)
    num_blocks = blocks.seq.shape[0]
    split = q[blocks.source].reshape(num_blocks, queries, num_kv, group, width)
    split = split.transpose(0, 2, 3, 1, 4).reshape(num_blocks, num_kv, group * queries, width)
    out = _call_kernel(
        split,
        kv,
        block_tables[:, None, :],  # a block in SMEM must span the last two axes
        blocks,
        layer,
        layout=layout,
        window=window,
        softcap=softcap,
        pages=pages,
        vmem_bytes=vmem_bytes,
    )
    out = out.reshape(num_blocks, num_kv, group, queries, width).transpose(0, 3, 1, 2, 4)
    packed = out.reshape(num_blocks * queries, num_heads, width)[blocks.slot]
    return jnp.where(blocks.is_query[:, None, None], packed, 0.0)


def _split_queries(
    num_tokens: int,
    kv_lens: Int[Array, " S"],
    query_starts: Int[Array, " S+1"],
    queries: int,
) -> _QueryBlocks:
    """Splits each sequence's queries into blocks; unneeded blocks come last."""
    num_seqs = kv_lens.shape[0]
    counts = jnp.where(kv_lens > 0, query_starts[1:] - query_starts[:-1], 0)
    ends = jnp.cumsum((counts + queries - 1) // queries)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])

    index = jnp.arange(num_tokens // queries + num_seqs, dtype=jnp.int32)
    seq = jnp.searchsorted(ends, index, side="right", method="compare_all")
    seq = jnp.minimum(seq, num_seqs - 1).astype(jnp.int32)
    offset = (index - starts[seq]) * queries
    filled = jnp.where(index < ends[-1], jnp.clip(counts[seq] - offset, 0, queries), 0)
    within = jnp.arange(queries, dtype=jnp.int32)
    source = query_starts[seq][:, None] + offset[:, None] + within

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    owner = jnp.searchsorted(query_starts[1:], token, side="right", method="compare_all")
    owner = jnp.minimum(owner, num_seqs - 1)
    slot = starts[owner] * queries + token - query_starts[owner]
    return _QueryBlocks(
        seq=seq,
        position=(kv_lens[seq] - counts[seq] + offset).astype(jnp.int32),
        filled=filled.astype(jnp.int32),
        source=jnp.clip(source, 0, num_tokens - 1),
        slot=jnp.clip(slot, 0, index.shape[0] * queries - 1),
        is_query=(token < query_starts[-1]) & (counts[owner] > 0),
    )


def _call_kernel(
    q: Float[Array, "blocks K GQ C"],
    kv: Float[Array, "P rows 128"],
    tables: Int[Array, "S 1 B"],
    blocks: _QueryBlocks,
    layer: Int[Array, ""],
    *,
    layout: KVLayout,
    window: int | None,
    softcap: float | None,
    pages: int,
    vmem_bytes: int,
) -> Float[Array, "blocks K GQ C"]:
    num_blocks, num_kv, rows, width = q.shape
    queries = blocks.source.shape[1]
    heads = HeadRows.from_layout(layout)
    block = PageBlock(layout, pages)
    padded = _padded_tokens(layout)
    # The token of each column of scores, and the query of each row, within their blocks.
    in_page = np.arange(padded)
    in_page = np.where(in_page < layout.tokens_per_page, in_page, _NO_TOKEN)
    token = np.minimum(np.arange(pages)[:, None] * layout.tokens_per_page + in_page, _NO_TOKEN)
    token = np.tile(token.reshape(1, -1).astype(np.int32), (_SUBLANES, 1))
    query = np.tile(np.tile(np.arange(queries, dtype=np.int32), rows // queries)[:, None], LANES)

    def current(b: Any, *_: Any) -> tuple[Any, int, int, int]:
        return b, 0, 0, 0

    def table(step: int) -> pl.BlockSpec:
        def index(b: Any, seq: Any, *_: Any) -> tuple[Any, int, int]:
            return seq[jnp.minimum(b + step, num_blocks - 1)], 0, 0

        return pl.BlockSpec((1, 1, tables.shape[2]), index, memory_space=pltpu.SMEM)

    def constant(array: np.ndarray) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda *_: (0, 0))

    # A strided load of the last page's padded tokens extends past its end.
    overrun = (padded - layout.tokens_per_page) * layout.rows_per_token
    return pl.pallas_call(
        partial(
            _kernel,
            heads=heads,
            block=block,
            window=window,
            softcap=softcap,
            tile_rows=_tile_rows(rows),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_blocks,),
            in_specs=[
                table(0),
                table(1),
                pl.BlockSpec((1, num_kv, rows, width), current),
                constant(token),
                constant(query),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=pl.BlockSpec((1, num_kv, rows, width), current),
            scratch_shapes=[
                pltpu.VMEM((2, block.rows, LANES), kv.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((-(-(block.rows + overrun) // TILE) * TILE, LANES), jnp.float32),
                pltpu.VMEM((num_kv, rows, LANES), jnp.float32),
                pltpu.VMEM((num_kv, rows, LANES), jnp.float32),
                pltpu.VMEM((num_kv, rows, width), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_bytes
        ),
        name=f"paged_prefill_{num_kv * rows // queries}_{num_kv}_{layout.head_dim}",
    )(
        blocks.seq,
        blocks.position,
        blocks.filled,
        layer.reshape(1),
        tables,
        tables,
        q,
        token,
        query,
        kv,
    )


def _tile_rows(rows: int) -> int:
    """Rows of queries computed at a time: the largest divisor of `rows` up to 128.

    Mosaic unrolls operations over an array, so large tiles take long to compile.
    """
    return max(size for size in range(TILE, 129, TILE) if rows % size == 0)


def _padded_tokens(layout: KVLayout) -> int:
    """Tokens loaded from a page: its tokens, rounded up to whole vectors."""
    return -(-layout.tokens_per_page // _SUBLANES) * _SUBLANES


def _kernel(
    seq: Any,  # SMEM blocks
    position: Any,  # SMEM blocks: position of the first query
    filled: Any,  # SMEM blocks: number of queries; 0 for an unneeded block
    layer: Any,  # SMEM 1
    table: Any,  # SMEM 1 1 B: this block's sequence's
    next_table: Any,  # SMEM 1 1 B: the next block's sequence's
    q: Any,  # VMEM 1 K GQ C
    token: Any,  # VMEM 8 t: the token of a column, within the block of pages
    query: Any,  # VMEM GQ 128: the query of a row, within the block of queries
    kv: Any,  # HBM P rows 128
    out: Any,  # VMEM 1 K GQ C
    buffers: Any,  # VMEM 2 X 128
    semaphores: Any,  # 2
    next_buffer: Any,  # SMEM 1: the buffer of the next block
    wide: Any,  # VMEM X+ 128: the block in float32, zeros in rows that must not be read
    maximum: Any,  # VMEM K GQ 128, all lanes equal
    denominator: Any,  # VMEM K GQ 128, all lanes equal
    weighted: Any,  # VMEM K GQ C
    *,
    heads: HeadRows,
    block: PageBlock,
    window: int | None,
    softcap: float | None,
    tile_rows: int,
) -> None:
    del seq
    b, num_blocks = pl.program_id(0), pl.num_programs(0)
    copies = PageCopies(block, kv, buffers, semaphores, layer[0])
    layout = block.layout
    precision = lax.Precision.HIGHEST if buffers.dtype == jnp.float32 else None
    product = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def visible_range(block_index: Any) -> tuple[Any, Any]:
        """The positions visible to a block of queries: first, and one past the last."""
        low = 0 if window is None else jnp.maximum(position[block_index] - window + 1, 0)
        return jnp.int32(low), position[block_index] + filled[block_index]

    low, length = visible_range(b)

    @pl.when(b == 0)
    def _() -> None:
        next_buffer[0] = 0
        wide[...] = jnp.zeros_like(wide)

        @pl.when(filled[0] > 0)
        def _() -> None:
            copies.start(table, low // block.tokens, low, length, 0)

    def start_next(buffer: Any) -> None:
        following = jnp.minimum(b + 1, num_blocks - 1)

        @pl.when((b + 1 < num_blocks) & (filled[following] > 0))
        def _() -> None:
            low, length = visible_range(following)
            copies.start(next_table, low // block.tokens, low, length, buffer)

    def step(index: jax.Array, carry: None) -> None:
        buffer = copies.advance(table, index, low, length, next_buffer, start_next)

        for page in range(block.pages):
            first, end = copies.valid_rows(page, index, low, length)
            rows = pl.ds(page * block.page_rows, block.page_rows)
            x = buffers[buffer, rows].astype(jnp.float32)
            wide[rows] = zero_rows_outside(x, first, end)

        column = index * block.tokens + token[:1]

        def head(k: jax.Array, carry: None) -> None:
            load = partial(_load_head, wide, heads=heads, block=block)
            offset = k * layout.padded_head_dim
            keys = load(offset // LANES).astype(buffers.dtype)
            offset += layout.num_kv_heads * layout.padded_head_dim
            values = load(offset // LANES).astype(buffers.dtype)

            def tile(t: jax.Array, carry: None) -> None:
                rows = pl.ds(pl.multiple_of(t * tile_rows, TILE), tile_rows)
                row = position[b] + query[rows, :1]
                visible = (column <= row) & (column < length)
                if window is not None:
                    visible &= column > row - window
                scores = product(q[0, k, rows], keys, _ROWS_ROWS)
                if softcap is not None:
                    scores = softcap * jnp.tanh(scores / softcap)
                scores = jnp.where(visible, scores, MASKED)
                old = maximum[k, rows]
                new = jnp.maximum(old, scores.max(axis=1, keepdims=True))
                decay = jnp.exp(old - new)
                weights = jnp.exp(scores - new[:, :1])
                maximum[k, rows] = new
                denominator[k, rows] = denominator[k, rows] * decay + weights.sum(
                    axis=1, keepdims=True
                )
                sums = product(weights.astype(buffers.dtype), values, _LANES_ROWS)
                weighted[k, rows] = weighted[k, rows] * decay[:, :1] + sums

            lax.fori_loop(0, query.shape[0] // tile_rows, tile, None)

        lax.fori_loop(0, layout.num_kv_heads, head, None)

    @pl.when(filled[b] > 0)
    def _() -> None:
        maximum[...] = jnp.full_like(maximum, MASKED)
        denominator[...] = jnp.zeros_like(denominator)
        weighted[...] = jnp.zeros_like(weighted)
        lax.fori_loop(low // block.tokens, (length + block.tokens - 1) // block.tokens, step, None)
        out[0] = (weighted[...] / jnp.maximum(denominator[:, :, :1], 1e-30)).astype(out.dtype)


_ROWS_ROWS = (((1,), (1,)), ((), ()))
_LANES_ROWS = (((1,), (0,)), ((), ()))


def _load_head(wide: Any, row: Any, heads: HeadRows, block: PageBlock) -> jax.Array:
    """One head's keys or values, `[t, segments * 128]`: every `R`-th row, starting at `row`."""
    stride = block.layout.rows_per_token
    tokens = _padded_tokens(block.layout)
    parts = []
    for segment in range(heads.segments):
        pages = [
            wide[pl.ds(page * block.page_rows + row + segment, tokens, stride=stride)]
            for page in range(block.pages)
        ]
        parts.append(jnp.concatenate(pages) if len(pages) > 1 else pages[0])
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
