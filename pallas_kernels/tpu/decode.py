"""Decode attention on a TPU: one query per sequence, over the pool's rows in their stored layout.

One grid step computes one sequence. For each block of the context's pages:

    scores   s = q . rows^T          [N, rows]: every query head with every row
    mask     keep only the row where the head's keys begin, for visible tokens
    softmax  online: maximum and sum so far (Milakov and Gimelshein 2018)
    values   move p from its token's key row to the value row, then p . rows

Heads are not separated. This computes `2K` times the necessary scores, but is cheaper for one query
per sequence. Separating heads would move each row through the registers twice, and the few queries
of one KV head would leave the MXU mostly idle. Here the MXU loads a row once for all query heads. A
row of 256 bytes costs `4 N 128` operations: 64 per byte with 32 heads, while a v5e can do 240 per
byte of its HBM.

A head larger than 128 has several rows. Its scores are the sum of one product per row, rolled to
the row where the head begins (`head_rows`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from muxjax.pallas_kernels.layout import LANES, KVLayout
from muxjax.pallas_kernels.tpu.head_rows import HeadRows
from muxjax.pallas_kernels.tpu.pages import PageBlock, PageCopies, zero_rows_outside

MASKED = -1e30
_NO_TOKEN = 1 << 30


def decode(
    q: Float[Array, "S N C"],
    kv: Float[Array, "P rows 128"],
    block_tables: Int[Array, "S B"],
    kv_lens: Int[Array, " S"],
    layer: Int[Array, ""],
    *,
    num_heads: int,
    layout: KVLayout,
    window: int | None,
    softcap: float | None,
    pages: int,
    vmem_bytes: int,
) -> Float[Array, "S N C"]:
    """Attention of one query per sequence, scaled and spread (`head_rows.spread_queries`).

    Args:
      q: queries in the pool's type; `N` is a multiple of 16, padded at the end.
      kv: the pool.
      block_tables: see `AttentionMetadata`.
      kv_lens: see `AttentionMetadata`; 0 gives zeros.
      layer: index of the layer.
      num_heads: query heads without padding.
      layout: the model's geometry in the pool.
      window: see `AttentionOptions`.
      softcap: see `AttentionOptions`.
      pages: pages copied and computed at a time.
      vmem_bytes: maximum VMEM of the kernel, in bytes.

    Returns:
      Outputs in float32, in the layout of spread values (`head_rows.select_outputs`).
    """
    num_seqs, rows, width = q.shape
    heads = HeadRows.from_layout(layout)
    block = PageBlock(layout, pages)
    head_mask, late, token = _build_constants(heads, block, num_heads, rows)
    lowest = jnp.zeros_like(kv_lens) if window is None else jnp.maximum(kv_lens - window, 0)
    following = _next_nonempty(kv_lens)
    tables = block_tables[:, None, :]  # a block in SMEM must span the last two axes

    def current(s: Any, *_: Any) -> tuple[Any, int, int]:
        return s, 0, 0

    def next_sequence(s: Any, lens: Any, low: Any, following: Any, _: Any) -> tuple[Any, int, int]:
        return jnp.minimum(following[s], num_seqs - 1), 0, 0

    def table(index_map: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, tables.shape[2]), index_map, memory_space=pltpu.SMEM)

    def constant(array: np.ndarray) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda *_: (0, 0))

    return pl.pallas_call(
        partial(_kernel, heads=heads, block=block, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_seqs,),
            in_specs=[
                table(current),
                table(next_sequence),
                pl.BlockSpec((1, rows, width), current),
                constant(head_mask),
                constant(late),
                constant(token),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=pl.BlockSpec((1, rows, width), current),
            scratch_shapes=[
                pltpu.VMEM((2, block.rows, LANES), kv.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, width), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((num_seqs, rows, width), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_bytes
        ),
        name=f"paged_decode_{num_heads}_{layout.num_kv_heads}_{layout.head_dim}",
    )(
        kv_lens,
        lowest,
        following,
        layer.reshape(1),
        tables,
        tables,
        q,
        head_mask,
        late,
        token,
        kv,
    )


def _kernel(
    lens: Any,  # SMEM S
    lows: Any,  # SMEM S: the lowest visible position
    following: Any,  # SMEM S: the next sequence with a context; S if there is none
    layer: Any,  # SMEM 1
    table: Any,  # SMEM 1 1 B: this sequence's
    next_table: Any,  # SMEM 1 1 B: the following sequence's
    q: Any,  # VMEM 1 N C
    head_mask: Any,  # VMEM N X: 0 where a head's keys begin, MASKED elsewhere
    late: Any,  # VMEM N 128: 1 for heads whose values are one row further than other heads'
    token: Any,  # VMEM 8 X: each row's token within the block
    kv: Any,  # HBM P rows 128
    out: Any,  # VMEM 1 N C
    buffers: Any,  # VMEM 2 X 128
    semaphores: Any,  # 2
    next_buffer: Any,  # SMEM 1: the buffer of the next block
    maximum: Any,  # VMEM N 128, all lanes equal
    denominator: Any,  # VMEM N 128, all lanes equal
    weighted: Any,  # VMEM N C
    *,
    heads: HeadRows,
    block: PageBlock,
    softcap: float | None,
) -> None:
    s, num_seqs = pl.program_id(0), pl.num_programs(0)
    copies = PageCopies(block, kv, buffers, semaphores, layer[0])
    length, low = lens[s], lows[s]
    precision = lax.Precision.HIGHEST if buffers.dtype == jnp.float32 else None
    product = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def start_following(buffer: Any) -> None:
        @pl.when(following[s] < num_seqs)
        def _() -> None:
            n = following[s]
            copies.start(next_table, lows[n] // block.tokens, lows[n], lens[n], buffer)

    @pl.when(s == 0)
    def _() -> None:
        next_buffer[0] = 0
        filled = block.pages * block.page_rows
        if filled < block.rows:  # rows that no copy fills may hold NaN
            unfilled = (2, block.rows - filled, LANES)
            buffers[:, filled:] = jnp.zeros(unfilled, buffers.dtype)

        @pl.when(length > 0)
        def _() -> None:
            copies.start(table, low // block.tokens, low, length, 0)

        @pl.when(length == 0)
        def _() -> None:
            start_following(0)

    def step(index: jax.Array, carry: None) -> None:
        buffer = copies.advance(table, index, low, length, next_buffer, start_following)

        for page in range(block.pages):
            first, end = copies.valid_rows(page, index, low, length)

            @pl.when((first > 0) | (end < block.page_rows))
            def _(page: int = page, first: Any = first, end: Any = end) -> None:
                rows = buffers.at[buffer, pl.ds(page * block.page_rows, block.page_rows)]
                valid = zero_rows_outside(rows[...].astype(jnp.float32), first, end)
                rows[...] = valid.astype(rows.dtype)

        rows = buffers[buffer]
        scores = product(q[0, :, :LANES], rows, _ROWS_ROWS)
        for segment in range(1, heads.segments):
            part = product(q[0, :, segment * LANES : (segment + 1) * LANES], rows, _ROWS_ROWS)
            scores += pltpu.roll(part, block.rows - segment, 1)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        position = index * block.tokens + token[:1]
        visible = (position >= low) & (position < length)
        scores = jnp.where(visible, scores + head_mask[...], MASKED)

        old = maximum[...]
        new = jnp.maximum(old, scores.max(axis=1, keepdims=True))
        decay = jnp.exp(old - new)
        weights = jnp.exp(scores - new[:, :1])
        maximum[...] = new
        denominator[...] = denominator[...] * decay + weights.sum(axis=1, keepdims=True)
        shift = heads.value_rows[0] - heads.key_rows[0]
        late_values = len({v - k for v, k in zip(heads.value_rows, heads.key_rows, strict=True)})
        for segment in range(heads.segments):
            moved = pltpu.roll(weights, shift + segment, 1)
            if late_values > 1:
                further = pltpu.roll(weights, shift + segment + 1, 1)
                moved = jnp.where(late[:, :1] > 0, further, moved)
            lanes = slice(segment * LANES, (segment + 1) * LANES)
            sums = product(moved.astype(rows.dtype), rows, _LANES_ROWS)
            weighted[:, lanes] = weighted[:, lanes] * decay + sums

    maximum[...] = jnp.full_like(maximum, MASKED)
    denominator[...] = jnp.zeros_like(denominator)
    weighted[...] = jnp.zeros_like(weighted)
    lax.fori_loop(low // block.tokens, (length + block.tokens - 1) // block.tokens, step, None)
    out[0] = weighted[...] / jnp.maximum(denominator[:, :1], 1e-30)


_ROWS_ROWS = (((1,), (1,)), ((), ()))
_LANES_ROWS = (((1,), (0,)), ((), ()))


def _build_constants(
    heads: HeadRows, block: PageBlock, num_heads: int, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Builds the kernel's `head_mask`, `late` and `token`."""
    layout = block.layout
    page, row = np.divmod(np.arange(block.rows), block.page_rows)
    slot, within = np.divmod(row, layout.rows_per_token)
    real = (page < block.pages) & (row < block.used_rows)
    token = np.where(real, page * layout.tokens_per_page + slot, _NO_TOKEN).astype(np.int32)
    group = num_heads // layout.num_kv_heads
    padding = (0, rows - num_heads)
    begins = np.pad(np.repeat(np.array(heads.key_rows), group), padding)[:, None]
    head_mask = np.where(real & (within == begins), 0.0, MASKED).astype(np.float32)
    shifts = np.array(heads.value_rows) - np.array(heads.key_rows)
    late = np.pad(np.repeat(shifts - shifts[0], group), padding)[:, None] * np.ones(LANES)
    return head_mask, late.astype(np.float32), np.tile(token, (8, 1))


def _next_nonempty(kv_lens: Int[Array, " S"]) -> Int[Array, " S"]:
    """For each sequence, the next one after it that has a context, or `S`."""
    count = kv_lens.shape[0]
    index = jnp.where(kv_lens > 0, jnp.arange(count, dtype=jnp.int32), count)
    later = lax.cummin(index, reverse=True)
    return jnp.append(later[1:], jnp.int32(count))
