"""Paged attention in plain XLA operations, tuned for the CPU.

Decode and prefill iterate over the context in blocks of pages with an online softmax (Milakov and
Gimelshein 2018; FlashAttention, Dao et al. 2022). The longest context in the step determines the
trip count, so one compiled program supports every length. One block of the context is gathered at a
time.

Rows past a sequence's length may contain any value, including NaN (a freed page keeps its last
contents), and 0 x NaN would reach the output. They are zeroed when they are gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from muxjax.pallas_kernels.layout import KVLayout
from muxjax.pallas_kernels.metadata import AttentionMetadata, AttentionOptions

DECODE_BLOCK = 128
"""Tokens of each sequence gathered at a time in decode, so that blocks fit the CPU's cache."""
PREFILL_BLOCK = 128
"""Tokens gathered at a time in prefill."""
QUERY_BLOCK = 128
"""Queries of one sequence computed together in prefill."""
MAX_MERGED_HEADS = 8
"""Maximum number of KV heads computed by one product in decode; see `_decode`."""
_MASKED = -1e30


class _OnlineSoftmax(NamedTuple):
    """The state of an online softmax: maximum score, denominator, and weighted sum of values."""

    maximum: Float[Array, "..."]
    denominator: Float[Array, "..."]
    weighted: Float[Array, "... C"]

    @staticmethod
    def initial(shape: tuple[int, ...], width: int) -> _OnlineSoftmax:
        return _OnlineSoftmax(
            jnp.full(shape, _MASKED, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, width), jnp.float32),
        )

    def weights(
        self, scores: Float[Array, "... t"]
    ) -> tuple[Float[Array, "... t"], Float[Array, "..."], Float[Array, "..."]]:
        """The block's weights, the new maximum, and the factor that rescales the earlier sums."""
        maximum = jnp.maximum(self.maximum, scores.max(-1))
        return jnp.exp(scores - maximum[..., None]), maximum, jnp.exp(self.maximum - maximum)

    def result(self) -> Float[Array, "... C"]:
        # A row with no context has a denominator of 0 and a weighted sum of 0.
        return self.weighted / jnp.maximum(self.denominator, 1e-30)[..., None]


def paged_attention_xla(
    q: Float[Array, "T N H"],
    kv: Float[Array, "P rows 128"],
    metadata: AttentionMetadata,
    options: AttentionOptions,
    layer: Int[Array, ""] | int,
) -> Float[Array, "T N H"]:
    """See `paged_attention`."""
    layout = metadata.layout
    pad = layout.padded_head_dim - layout.head_dim
    queries = q.astype(jnp.float32) * options.scale
    if pad:
        queries = jnp.pad(queries, ((0, 0), (0, 0), (0, pad)))
    attend = _decode if metadata.decode else _prefill
    out = attend(queries, kv, metadata.block_tables + layer, metadata, options)
    return out[..., : layout.head_dim].astype(q.dtype)


def _apply_softcap(scores: Float[Array, "*s"], softcap: float | None) -> Float[Array, "*s"]:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _pages_per_gather(block: int, layout: KVLayout, tables: Int[Array, "S B"]) -> int:
    """Pages gathered at a time, for blocks of `block` tokens."""
    return max(1, min(block // layout.tokens_per_page, tables.shape[1]))


def _gather(
    kv: Float[Array, "P rows 128"],
    pages: Int[Array, "*s p"],
    valid: Bool[Array, "*s t"],
    layout: KVLayout,
) -> Float[Array, "*s t C"]:
    """The tokens of pages, `C = 2 * K * padded H` elements per token; zeros if not valid."""
    used = layout.tokens_per_page * layout.rows_per_token
    block = kv[pages][..., :used, :].astype(jnp.float32)
    block = block.reshape(*valid.shape, -1)
    return jnp.where(valid[..., None], block, 0.0)


def _pad_tables(tables: Int[Array, "S B"], pages: int) -> Int[Array, "S B2"]:
    """Pads tables with the dummy page to a multiple of `pages`, to prevent clamped slices."""
    return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % pages)))


def _decode(
    q: Float[Array, "S N H"],
    kv: Float[Array, "P rows 128"],
    tables: Int[Array, "S B"],
    metadata: AttentionMetadata,
    options: AttentionOptions,
) -> Float[Array, "S N H"]:
    """Attention of one query per sequence, for all sequences at once.

    The gathered block is used in its stored layout, `[t, 2 K H]`. Each query is placed at its KV
    head's offset in a zero vector of that width. One product per sequence then gives the scores of
    all heads, and another the sums of values, without a transpose. This takes `2 K` times the
    operations, but is cheaper than moving the block (docs/measurements/xla-cpu.md). With more than
    `MAX_MERGED_HEADS` KV heads, groups of heads are computed separately, and each group's part of
    the block is moved.

    Args:
      q: scaled queries, heads padded to the pool's head size.
      kv: the pool.
      tables: block tables, with the layer's offset added.
      metadata: the sequences of the step.
      options: the layer's options; `scale` has already been applied to `q`.
    """
    layout, kv_lens, window = metadata.layout, metadata.kv_lens, options.window
    num_seqs, num_heads, head_dim = q.shape
    num_kv = layout.num_kv_heads
    merged = max(m for m in range(1, min(num_kv, MAX_MERGED_HEADS) + 1) if num_kv % m == 0)
    groups, per_kv = num_kv // merged, num_heads // num_kv
    heads = merged * per_kv
    # in_group[n, j]: whether query head n of a group belongs to the group's KV head j.
    in_group = (np.arange(heads)[:, None] // per_kv == np.arange(merged)).astype(np.float32)
    # With one group, the score product includes the block's values; zeros cancel them.
    mask = np.pad(in_group, ((0, 0), (0, merged))) if groups == 1 else in_group
    spread = q.reshape(num_seqs, groups, heads, 1, head_dim) * mask[:, :, None]
    spread = spread.reshape(num_seqs, groups, heads, -1)  # S u n C

    pages = _pages_per_gather(DECODE_BLOCK, layout, tables)
    step = pages * layout.tokens_per_page
    tables = _pad_tables(tables, pages)
    lowest = jnp.zeros_like(kv_lens) if window is None else jnp.maximum(kv_lens - window, 0)

    def body(carry: tuple[Array, _OnlineSoftmax]) -> tuple[Array, _OnlineSoftmax]:
        i, state = carry
        positions = i * step + jnp.arange(step)
        valid = (positions < kv_lens[:, None]) & (positions >= lowest[:, None])  # S t
        ids = lax.dynamic_slice_in_dim(tables, i * pages, pages, axis=1)
        block = _gather(kv, ids, valid, layout)  # S t 2KH
        if groups == 1:
            keys = values = block[:, None]  # S 1 t C
        else:
            block = block.reshape(num_seqs, step, 2, groups, merged * head_dim)
            keys, values = jnp.moveaxis(block, 1, 3).swapaxes(0, 1)  # S u t C
        # The block is the left operand for the same reason as a weight (`models.nn.linear.linear`).
        scores = lax.optimization_barrier(jnp.einsum("sutc,sunc->sutn", keys, spread))
        scores = scores.swapaxes(2, 3)  # S u n t
        scores = jnp.where(valid[:, None, None], _apply_softcap(scores, options.softcap), _MASKED)
        weights, maximum, decay = state.weights(scores)
        weights = jnp.where(valid[:, None, None], weights, 0.0)
        sums = jnp.einsum("sunt,sutc->sunc", weights, values)
        return i + 1, _OnlineSoftmax(
            maximum,
            state.denominator * decay + weights.sum(-1),
            state.weighted * decay[..., None] + sums,
        )

    first = lowest.min() // step
    last = (kv_lens.max() + step - 1) // step
    start = _OnlineSoftmax.initial((num_seqs, groups, heads), spread.shape[-1])
    _, state = lax.while_loop(lambda carry: carry[0] < last, body, (first, start))
    sums = state.result()[..., -merged * head_dim :]
    sums = sums.reshape(num_seqs, groups, heads, merged, head_dim)
    return (sums * in_group[:, :, None]).sum(axis=3).reshape(num_seqs, num_heads, head_dim)


def _prefill(
    q: Float[Array, "T N H"],
    kv: Float[Array, "P rows 128"],
    tables: Int[Array, "S B"],
    metadata: AttentionMetadata,
    options: AttentionOptions,
) -> Float[Array, "T N H"]:
    """Attention of ragged queries, one block of one sequence's queries at a time.

    Has the arguments of `_decode`.
    """
    layout, window = metadata.layout, options.window
    kv_lens, query_starts = metadata.kv_lens, metadata.query_starts
    num_tokens, num_heads, head_dim = q.shape
    num_kv = layout.num_kv_heads
    per_kv = num_heads // num_kv
    width = min(QUERY_BLOCK, num_tokens)
    pages = _pages_per_gather(PREFILL_BLOCK, layout, tables)
    step = pages * layout.tokens_per_page
    tables = _pad_tables(tables, pages)
    # The last block of queries may extend past the end; padding prevents a clamped slice.
    padded = jnp.pad(q, ((0, width), (0, 0), (0, 0)))

    def query_block(start: Array, out: Array, s: Array) -> Array:
        length, end = kv_lens[s], query_starts[s + 1]
        queries = lax.dynamic_slice_in_dim(padded, start, width)
        queries = queries.reshape(width, num_kv, per_kv, head_dim)
        queries = queries.transpose(1, 2, 0, 3).reshape(num_kv, per_kv * width, head_dim)
        query_positions = jnp.minimum(length - end + start + jnp.arange(width), length - 1)
        if window is None:
            lowest = jnp.zeros_like(query_positions)
        else:
            lowest = jnp.maximum(query_positions - window + 1, 0)

        def body(carry: tuple[Array, _OnlineSoftmax]) -> tuple[Array, _OnlineSoftmax]:
            i, state = carry
            positions = i * step + jnp.arange(step)
            ids = lax.dynamic_slice(tables, (s, i * pages), (1, pages))[0]
            block = _gather(kv, ids, positions < length, layout)  # t 2KH
            block = block.reshape(step, 2, num_kv, head_dim).transpose(1, 2, 0, 3)  # 2 K t H
            scores = jnp.einsum("kqh,kth->kqt", queries, block[0])
            visible = positions <= query_positions[:, None]  # q t
            visible &= positions >= lowest[:, None]
            visible = jnp.tile(visible, (per_kv, 1))
            scores = jnp.where(visible, _apply_softcap(scores, options.softcap), _MASKED)
            weights, maximum, decay = state.weights(scores)
            weights = jnp.where(visible, weights, 0.0)
            return i + 1, _OnlineSoftmax(
                maximum,
                state.denominator * decay + weights.sum(-1),
                state.weighted * decay[..., None] + jnp.einsum("kqt,kth->kqh", weights, block[1]),
            )

        first = lowest[0] // step
        last = query_positions[-1] // step + 1
        state = _OnlineSoftmax.initial((num_kv, per_kv * width), head_dim)
        _, state = lax.while_loop(lambda carry: carry[0] < last, body, (first, state))
        result = state.result().reshape(num_kv, per_kv, width, head_dim)
        result = result.transpose(2, 0, 1, 3).reshape(width, num_heads, head_dim)
        old = lax.dynamic_slice_in_dim(out, start, width)
        in_sequence = (start + jnp.arange(width) < end)[:, None, None]
        result = jnp.where(in_sequence, result, old)
        return lax.dynamic_update_slice_in_dim(out, result, start, axis=0)

    def sequence(s: Array, out: Array) -> Array:
        _, out = lax.while_loop(
            lambda carry: carry[0] < query_starts[s + 1],
            lambda carry: (carry[0] + width, query_block(carry[0], carry[1], s)),
            (query_starts[s], out),
        )
        return out

    out = jnp.zeros((num_tokens + width, num_heads, head_dim), jnp.float32)
    out = jax.lax.fori_loop(0, kv_lens.shape[0], sequence, out)
    return out[:num_tokens]
