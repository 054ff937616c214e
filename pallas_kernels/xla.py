"""Paged attention in plain XLA, made for the CPU.

Both forms walk the context in blocks of pages with a running softmax (Milakov and Gimelshein 2018;
FlashAttention, Dao et al. 2022): the trip count follows the longest context that is there, so one
compiled program serves every length, and no more than a block of the context is ever gathered.

Rows past a sequence's length are zeroed as they are gathered: they may hold anything, NaN included
(a freed page keeps what its last owner left), and 0 x NaN would reach the output.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from muxjax.pallas_kernels.layout import KVLayout

DECODE_BLOCK = 128
"""Tokens of each sequence gathered at a time in decode: those of 8 sequences stay in the cache."""
PREFILL_BLOCK = 128
"""Tokens gathered at a time in prefill."""
QUERY_BLOCK = 128
"""Queries of one sequence handled together in prefill."""
MAX_MERGED_HEADS = 8
"""KV heads handled by one product in decode; see `_decode`."""
_MASKED = -1e30


class _Softmax(NamedTuple):
    """A running softmax: maximum, denominator, and weighted sum of values so far."""

    maximum: Float[Array, "..."]
    denominator: Float[Array, "..."]
    weighted: Float[Array, "... C"]

    @staticmethod
    def start(shape: tuple[int, ...], width: int) -> _Softmax:
        return _Softmax(
            jnp.full(shape, _MASKED, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, width), jnp.float32),
        )

    def weights(
        self, scores: Float[Array, "... t"]
    ) -> tuple[Float[Array, "... t"], Float[Array, "..."], Float[Array, "..."]]:
        """The block's weights, the new maximum, and what the sums so far are to be scaled by."""
        maximum = jnp.maximum(self.maximum, scores.max(-1))
        return jnp.exp(scores - maximum[..., None]), maximum, jnp.exp(self.maximum - maximum)

    def result(self) -> Float[Array, "... C"]:
        # A row with no context has a denominator of 0 and a weighted sum of 0.
        return self.weighted / jnp.maximum(self.denominator, 1e-30)[..., None]


def paged_attention_xla(
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
    """See `paged_attention`."""
    pad = layout.padded_head_dim - layout.head_dim
    queries = q.astype(jnp.float32) * scale
    if pad:
        queries = jnp.pad(queries, ((0, 0), (0, 0), (0, pad)))
    attend = _decode if decode else _prefill
    out = attend(queries, kv, block_tables + layer, kv_lens, query_starts, layout, window, softcap)
    return out[..., : layout.head_dim].astype(q.dtype)


def _capped(scores: Float[Array, "*s"], softcap: float | None) -> Float[Array, "*s"]:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _pages_at_a_time(block: int, layout: KVLayout, tables: Int[Array, "S B"]) -> int:
    return max(1, min(block // layout.tokens_per_page, tables.shape[1]))


def _gather(
    kv: Float[Array, "P rows 128"],
    pages: Int[Array, "*s p"],
    valid: Bool[Array, "*s t"],
    layout: KVLayout,
) -> Float[Array, "*s t C"]:
    """The tokens of some pages, `C = 2 * K * padded H` numbers each, zeros where not valid."""
    used = layout.tokens_per_page * layout.rows_per_token
    block = kv[pages][..., :used, :].astype(jnp.float32)
    block = block.reshape(*valid.shape, -1)
    return jnp.where(valid[..., None], block, 0.0)


def _padded(tables: Int[Array, "S B"], pages: int) -> Int[Array, "S B2"]:
    """Tables filled with dummy pages to a whole number of gathers (a slice must not be clamped)."""
    return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % pages)))


def _decode(
    q: Float[Array, "S N H"],
    kv: Float[Array, "P rows 128"],
    tables: Int[Array, "S B"],
    kv_lens: Int[Array, " S"],
    query_starts: Int[Array, " S+1"],
    layout: KVLayout,
    window: int | None,
    softcap: float | None,
) -> Float[Array, "S N H"]:
    """One query a sequence, all sequences together.

    The gathered block is used as it lies, `[t, 2 K H]`: queries are spread over a zero vector of
    that width, each in its KV head's place, so that one product a sequence gives the scores of all
    heads and another the sums of values, with nothing transposed. This multiplies by zeros (2 K
    times the work of attention alone), which is far cheaper than moving the block: 0.6 against 1.4
    ms a layer for 8 sequences of 256 tokens with 9 query and 3 KV heads. Beyond `MAX_MERGED_HEADS`
    KV heads it is done in groups of so many, and each group's part of the block is moved.
    """
    del query_starts
    num_seqs, num_heads, head_dim = q.shape
    num_kv = layout.num_kv_heads
    merged = max(m for m in range(1, min(num_kv, MAX_MERGED_HEADS) + 1) if num_kv % m == 0)
    groups, per_kv = num_kv // merged, num_heads // num_kv
    heads = merged * per_kv
    # own[n, j]: whether query head n of a group belongs to the group's KV head j.
    own = (np.arange(heads)[:, None] // per_kv == np.arange(merged)).astype(np.float32)
    # With one group the product takes keys and values as they lie: zeros skip the values too.
    wide = np.pad(own, ((0, 0), (0, merged))) if groups == 1 else own
    spread = q.reshape(num_seqs, groups, heads, 1, head_dim) * wide[:, :, None]
    spread = spread.reshape(num_seqs, groups, heads, -1)  # S u n C

    pages = _pages_at_a_time(DECODE_BLOCK, layout, tables)
    step = pages * layout.tokens_per_page
    tables = _padded(tables, pages)
    lowest = jnp.zeros_like(kv_lens) if window is None else jnp.maximum(kv_lens - window, 0)

    def body(carry: tuple[Array, _Softmax]) -> tuple[Array, _Softmax]:
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
        # The block is the left operand, for the reason that a weight is: see `models.linear`.
        scores = lax.optimization_barrier(jnp.einsum("sutc,sunc->sutn", keys, spread))
        scores = scores.swapaxes(2, 3)  # S u n t
        scores = jnp.where(valid[:, None, None], _capped(scores, softcap), _MASKED)
        weights, maximum, decay = state.weights(scores)
        weights = jnp.where(valid[:, None, None], weights, 0.0)
        sums = jnp.einsum("sunt,sutc->sunc", weights, values)
        return i + 1, _Softmax(
            maximum,
            state.denominator * decay + weights.sum(-1),
            state.weighted * decay[..., None] + sums,
        )

    first = lowest.min() // step
    last = (kv_lens.max() + step - 1) // step
    start = _Softmax.start((num_seqs, groups, heads), spread.shape[-1])
    _, state = lax.while_loop(lambda carry: carry[0] < last, body, (first, start))
    sums = state.result()[..., -merged * head_dim :]
    sums = sums.reshape(num_seqs, groups, heads, merged, head_dim)
    return (sums * own[:, :, None]).sum(axis=3).reshape(num_seqs, num_heads, head_dim)


def _prefill(
    q: Float[Array, "T N H"],
    kv: Float[Array, "P rows 128"],
    tables: Int[Array, "S B"],
    kv_lens: Int[Array, " S"],
    query_starts: Int[Array, " S+1"],
    layout: KVLayout,
    window: int | None,
    softcap: float | None,
) -> Float[Array, "T N H"]:
    """Ragged queries: for each sequence, for each block of its queries, over its context."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv = layout.num_kv_heads
    per_kv = num_heads // num_kv
    width = min(QUERY_BLOCK, num_tokens)
    pages = _pages_at_a_time(PREFILL_BLOCK, layout, tables)
    step = pages * layout.tokens_per_page
    tables = _padded(tables, pages)
    # Room for the last block of queries to run over the end: a slice must not be clamped.
    padded = jnp.pad(q, ((0, width), (0, 0), (0, 0)))

    def query_block(start: Array, out: Array, s: Array) -> Array:
        length, end = kv_lens[s], query_starts[s + 1]
        queries = lax.dynamic_slice_in_dim(padded, start, width)
        queries = queries.reshape(width, num_kv, per_kv, head_dim)
        queries = queries.transpose(1, 2, 0, 3).reshape(num_kv, per_kv * width, head_dim)
        own = length - end + start + jnp.arange(width)  # each query's own position
        own = jnp.minimum(own, length - 1)
        lowest = jnp.zeros_like(own) if window is None else jnp.maximum(own - window + 1, 0)

        def body(carry: tuple[Array, _Softmax]) -> tuple[Array, _Softmax]:
            i, state = carry
            positions = i * step + jnp.arange(step)
            ids = lax.dynamic_slice(tables, (s, i * pages), (1, pages))[0]
            block = _gather(kv, ids, positions < length, layout)  # t 2KH
            block = block.reshape(step, 2, num_kv, head_dim).transpose(1, 2, 0, 3)  # 2 K t H
            scores = jnp.einsum("kqh,kth->kqt", queries, block[0])
            seen = (positions <= own[:, None]) & (positions >= lowest[:, None])  # q t
            seen = jnp.tile(seen, (per_kv, 1))
            scores = jnp.where(seen, _capped(scores, softcap), _MASKED)
            weights, maximum, decay = state.weights(scores)
            weights = jnp.where(seen, weights, 0.0)
            return i + 1, _Softmax(
                maximum,
                state.denominator * decay + weights.sum(-1),
                state.weighted * decay[..., None] + jnp.einsum("kqt,kth->kqh", weights, block[1]),
            )

        first = lowest[0] // step
        last = own[-1] // step + 1
        state = _Softmax.start((num_kv, per_kv * width), head_dim)
        _, state = lax.while_loop(lambda carry: carry[0] < last, body, (first, state))
        result = state.result().reshape(num_kv, per_kv, width, head_dim)
        result = result.transpose(2, 0, 1, 3).reshape(width, num_heads, head_dim)
        old = lax.dynamic_slice_in_dim(out, start, width)
        mine = (start + jnp.arange(width) < end)[:, None, None]
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, result, old), start, axis=0)

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
