"""Samples tokens on the device; every setting is an array.

New combinations of settings need no compilation. A row's token depends only on its logits, settings
and position, so a seeded request yields the same tokens in any batch. Nothing is sorted, because
sorting large vocabularies is slow on XLA:CPU. Top-k and top-p are thresholds, found by bisection
over the bits of the probabilities. The token is found by inverting the cumulative distribution at
one uniform number per row.

Order of operations: bias, penalties, forbidden tokens (stop tokens before `min_tokens`, tokens that
a grammar excludes), temperature, top-k, top-p (of the tokens that top-k keeps), min-p.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from muxjax.sampling_params import MAX_LOGPROBS

_CHUNK = 512
"""Tokens of a chunk of the cumulative distribution (`_invert`)."""
_ONE_BITS = 0x3F800000  # float32 1.0


@struct.dataclass
class SamplingArrays:
    """Sampling settings of the rows of a step; for their meaning see `SamplingParams`."""

    temperature: Float[Array, " S"]
    top_p: Float[Array, " S"]
    min_p: Float[Array, " S"]
    repetition_penalty: Float[Array, " S"]
    presence_penalty: Float[Array, " S"]
    frequency_penalty: Float[Array, " S"]
    top_k: Int[Array, " S"]
    seed: UInt[Array, "S 2"]
    logprobs: Int[Array, " S"]
    stop_from: Int[Array, " S"]
    """The first position at which a stop token is allowed."""

    @property
    def has_penalty(self) -> Bool[Array, " S"]:
        """Whether a row has any penalty."""
        return (
            (self.repetition_penalty != 1.0)
            | (self.presence_penalty != 0.0)
            | (self.frequency_penalty != 0.0)
        )


@struct.dataclass
class Logprobs:
    """Log-probabilities of sampled tokens and of the most likely tokens, best first."""

    chosen: Float[Array, "*S"]
    top_ids: Int[Array, "*S 20"]
    top: Float[Array, "*S 20"]

    @staticmethod
    def zeros(*shape: int) -> Logprobs:
        """Returns zeros for tokens of this shape."""
        return Logprobs(
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, MAX_LOGPROBS), jnp.int32),
            jnp.zeros((*shape, MAX_LOGPROBS), jnp.float32),
        )


def penalize(
    logits: Float[Array, "S V"],
    settings: SamplingArrays,
    in_prompt: Bool[Array, "S V"],
    counts: Int[Array, "S V"],
) -> Float[Array, "S V"]:
    """Applies the repetition (Keskar et al. 2019), presence and frequency (OpenAI) penalties."""
    repeated = in_prompt | (counts > 0)
    factor = settings.repetition_penalty[:, None]
    logits = jnp.where(repeated, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    logits -= settings.frequency_penalty[:, None] * counts
    return logits - settings.presence_penalty[:, None] * (counts > 0)


def add_bias(
    logits: Float[Array, "S V"], ids: Int[Array, "S E"], values: Float[Array, "S E"]
) -> Float[Array, "S V"]:
    """Adds `values` to the logits of the tokens `ids` (OpenAI's `logit_bias`); skips ids of -1."""
    return logits.at[_row_indices(ids), _skip_negative(ids)].add(values, mode="drop")


def forbid(
    logits: Float[Array, "S V"], ids: Int[Array, "S E"], where: Bool[Array, " S"]
) -> Float[Array, "S V"]:
    """Excludes the tokens `ids` from the rows `where`; skips ids of -1."""
    ids = jnp.where(where[:, None], ids, -1)
    return logits.at[_row_indices(ids), _skip_negative(ids)].set(-jnp.inf, mode="drop")


def allow(logits: Float[Array, "S V"], mask: UInt[Array, "S W"]) -> Float[Array, "S V"]:
    """Excludes tokens whose bit is not set: token `t` is bit `t % 32` of word `t // 32`."""
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1  # S W 32
    allowed = bits.reshape(mask.shape[0], -1)[:, : logits.shape[1]] != 0
    return jnp.where(allowed, logits, -jnp.inf)


def _row_indices(ids: Int[Array, "S E"]) -> Int[Array, "S 1"]:
    return jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]


def _skip_negative(ids: Int[Array, "S E"]) -> Int[Array, "S E"]:
    """Replaces ids of -1 by one beyond every vocabulary, so that `mode="drop"` skips them.

    A negative index would count from the end.
    """
    return jnp.where(ids >= 0, ids, jnp.iinfo(jnp.int32).max)


def sample(
    logits: Float[Array, "S V"],
    settings: SamplingArrays,
    positions: Int[Array, " S"],
    live: Bool[Array, " S"],
) -> Int[Array, " S"]:
    """Samples one token per row.

    Args:
      logits: after bias, penalties and exclusions.
      settings: temperature 0 selects the most likely token.
      positions: position in its sequence of the token to sample; folded into the row's seed.
      live: rows whose token is used; work that only other rows need is skipped.
    """
    greedy = _argmax(logits)
    random = (settings.temperature > 0) & live
    return lax.cond(
        random.any(),
        lambda: jnp.where(random, _sample_random(logits, settings, positions, random), greedy),
        lambda: greedy,
    )


def logprobs(
    logits: Float[Array, "S V"], tokens: Int[Array, " S"], needed: Bool[Array, ""]
) -> Logprobs:
    """Computes log-probabilities from raw logits; returns zeros unless `needed`."""

    def compute() -> Logprobs:
        values = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(values, tokens[:, None], axis=1)[:, 0]
        size = min(MAX_LOGPROBS, logits.shape[1])
        top, ids = lax.top_k(values, size)
        pad = ((0, 0), (0, MAX_LOGPROBS - size))
        return Logprobs(
            chosen,
            jnp.pad(ids.astype(jnp.int32), pad),
            jnp.pad(top, pad, constant_values=-jnp.inf),
        )

    return lax.cond(needed, compute, lambda: Logprobs.zeros(logits.shape[0]))


def _argmax(logits: Float[Array, "S V"]) -> Int[Array, " S"]:
    """Returns the first maximum. XLA:CPU vectorizes two plain reductions, but not `argmax`."""
    size = logits.shape[1]
    best = logits.max(axis=1, keepdims=True)
    ids = jnp.where(logits == best, jnp.arange(size, dtype=jnp.int32), size - 1)
    return ids.min(axis=1)


def _sample_random(
    logits: Float[Array, "S V"],
    settings: SamplingArrays,
    positions: Int[Array, " S"],
    random: Bool[Array, " S"],
) -> Int[Array, " S"]:
    """Samples one token per row at its temperature; only tokens of `random` rows are used."""
    temperature = jnp.where(random, settings.temperature, 1.0)[:, None]
    logits = logits / temperature
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))  # the most likely token has 1
    vocab = logits.shape[1]

    top_k = jnp.where(random & (settings.top_k > 0), settings.top_k, vocab)
    weights = lax.cond(
        (top_k < vocab).any(),
        lambda: _apply_threshold(weights, lambda kept: kept.sum(axis=1) >= top_k),
        lambda: weights,
    )
    top_p = jnp.where(random, settings.top_p, 1.0)

    def nucleus() -> Float[Array, "S V"]:
        min_weight = top_p * weights.sum(axis=1)
        kept = _apply_threshold(
            weights, lambda kept: jnp.where(kept, weights, 0.0).sum(axis=1) >= min_weight
        )
        return jnp.where(top_p[:, None] < 1.0, kept, weights)

    weights = lax.cond((top_p < 1.0).any(), nucleus, lambda: weights)
    weights = jnp.where(weights >= settings.min_p[:, None], weights, 0.0)
    return _invert(weights, _uniform(settings.seed, positions))


def _apply_threshold(
    weights: Float[Array, "S V"],
    is_sufficient: Callable[[Bool[Array, "S V"]], Bool[Array, " S"]],
) -> Float[Array, "S V"]:
    """Zeroes the weights below the highest threshold that keeps sufficient weights.

    Args:
      weights: from 0 to 1, so that their bits as integers have the same order.
      is_sufficient: maps a mask `[S, V]` of kept weights to whether those of each row are
        sufficient. It must return True for a mask that keeps all.
    """

    def threshold(bits: Int[Array, " S"]) -> Float[Array, "S 1"]:
        return lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    def body(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # `low` is sufficient; `high` is the lowest known not to be
        middle = low + (high - low) // 2
        sufficient = is_sufficient(weights >= threshold(middle))
        return jnp.where(sufficient, middle, low), jnp.where(sufficient, high, middle)

    zero = jnp.zeros(weights.shape[0], jnp.int32)
    low, _ = lax.fori_loop(0, 31, body, (zero, zero + (_ONE_BITS + 1)))
    return jnp.where(weights >= threshold(low), weights, 0.0)


def _uniform(seeds: UInt[Array, "S 2"], positions: Int[Array, " S"]) -> Float[Array, " S"]:
    """Returns a number in [0, 1) for each row that depends only on its seed and position."""

    def draw(seed: UInt[Array, " 2"], position: Int[Array, ""]) -> Float[Array, ""]:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(draw)(seeds, positions)


def _invert(weights: Float[Array, "S V"], uniform: Float[Array, " S"]) -> Int[Array, " S"]:
    """Returns the token at which the cumulative weight exceeds `uniform` of the total.

    In two levels, chunks and then the tokens of one chunk, because a cumulative sum over the
    vocabulary is slow on every backend.
    """
    rows, vocab = weights.shape
    chunks = jnp.pad(weights, ((0, 0), (0, -vocab % _CHUNK))).reshape(rows, -1, _CHUNK)
    ends = jnp.cumsum(chunks.sum(axis=2), axis=1)
    # Strictly below the total, so that the selected chunk has weight.
    target = jnp.minimum(uniform * ends[:, -1], jnp.nextafter(ends[:, -1], 0.0))[:, None]
    chunk = (ends <= target).sum(axis=1)
    selected = jnp.take_along_axis(chunks, chunk[:, None, None], axis=1)[:, 0]  # S _CHUNK
    before = jnp.where(
        chunk > 0, jnp.take_along_axis(ends, jnp.maximum(chunk - 1, 0)[:, None], axis=1)[:, 0], 0.0
    )
    past_target = before[:, None] + jnp.cumsum(selected, axis=1) > target
    index = jnp.arange(_CHUNK)
    # If rounding leaves no token past the target, the chunk's last token with weight is selected.
    last = jnp.where(selected > 0, index, 0).max(axis=1)
    first = jnp.where(past_target & (selected > 0), index, _CHUNK).min(axis=1)
    return (chunk * _CHUNK + jnp.minimum(first, last)).astype(jnp.int32)
