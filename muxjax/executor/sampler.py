"""Choosing tokens on the device, with every setting an array.

No setting compiles anything, and a row's token depends on its own logits, settings and position
only, so a seeded request gives the same tokens whatever it is batched with. Nothing is sorted:
XLA:CPU takes about 20 ms to sort a row of 262,144 logits. Top-k and top-p are thresholds found by
bisection over the bits of the probabilities, and the token is found by inverting the cumulative
distribution at one uniform number a row.

The order is: bias, penalties, what is not allowed (end tokens too early, a grammar), temperature,
top-k, top-p (of what top-k left), min-p.
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
_ONE_BITS = 0x3F800000  # float32 1.0


@struct.dataclass
class SamplingArrays:
    """Sampling settings of some rows; `SamplingParams` says what each means."""

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
    """The first position where a stop token may stand."""

    @property
    def penalised(self) -> Bool[Array, " S"]:
        return (
            (self.repetition_penalty != 1.0)
            | (self.presence_penalty != 0.0)
            | (self.frequency_penalty != 0.0)
        )


@struct.dataclass
class Logprobs:
    """Log-probabilities of chosen tokens and of the most likely ones, best first."""

    chosen: Float[Array, "*S"]
    top_ids: Int[Array, "*S 20"]
    top: Float[Array, "*S 20"]

    @staticmethod
    def zeros(*shape: int) -> Logprobs:
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
    """Repetition penalty (Keskar et al. 2019) and OpenAI's presence and frequency penalties."""
    repeated = in_prompt | (counts > 0)
    by = settings.repetition_penalty[:, None]
    logits = jnp.where(repeated, jnp.where(logits > 0, logits / by, logits * by), logits)
    logits -= settings.frequency_penalty[:, None] * counts
    return logits - settings.presence_penalty[:, None] * (counts > 0)


def add_bias(
    logits: Float[Array, "S V"], ids: Int[Array, "S E"], values: Float[Array, "S E"]
) -> Float[Array, "S V"]:
    """OpenAI's `logit_bias`: `values` added to the tokens `ids`; ids of -1 are none."""
    return logits.at[_rows_of(ids), _or_none(ids)].add(values, mode="drop")


def forbid(
    logits: Float[Array, "S V"], ids: Int[Array, "S E"], where: Bool[Array, " S"]
) -> Float[Array, "S V"]:
    """Takes the tokens `ids` (-1: none) from the rows `where`."""
    ids = jnp.where(where[:, None], ids, -1)
    return logits.at[_rows_of(ids), _or_none(ids)].set(-jnp.inf, mode="drop")


def allow(logits: Float[Array, "S V"], mask: UInt[Array, "S W"]) -> Float[Array, "S V"]:
    """Leaves a row the tokens whose bit is set: token `t` is bit `t % 32` of word `t // 32`."""
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1  # S W 32
    allowed = bits.reshape(mask.shape[0], -1)[:, : logits.shape[1]] != 0
    return jnp.where(allowed, logits, -jnp.inf)


def _rows_of(ids: Int[Array, "S E"]) -> Int[Array, "S 1"]:
    return jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]


def _or_none(ids: Int[Array, "S E"]) -> Int[Array, "S E"]:
    """Beyond every vocabulary where there is no id: negative indices would count from the end."""
    return jnp.where(ids >= 0, ids, jnp.iinfo(jnp.int32).max)


def sample(
    logits: Float[Array, "S V"],
    settings: SamplingArrays,
    positions: Int[Array, " S"],
    live: Bool[Array, " S"],
) -> Int[Array, " S"]:
    """One token a row.

    Args:
      logits: adjusted by all that stands before temperature.
      settings: temperature 0 takes the most likely token.
      positions: of the token to be chosen, in its sequence: folded into the row's seed.
      live: rows whose token counts; work that only others ask for is left out.
    """
    greedy = _argmax(logits)
    drawn = (settings.temperature > 0) & live
    return lax.cond(
        drawn.any(),
        lambda: jnp.where(drawn, _draw(logits, settings, positions, drawn), greedy),
        lambda: greedy,
    )


def logprobs(
    logits: Float[Array, "S V"], tokens: Int[Array, " S"], wanted: Bool[Array, ""]
) -> Logprobs:
    """From raw logits; zeros, and no work, where nobody wants them."""

    def compute() -> Logprobs:
        found = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(found, tokens[:, None], axis=1)[:, 0]
        size = min(MAX_LOGPROBS, logits.shape[1])
        top, ids = lax.top_k(found, size)
        pad = ((0, 0), (0, MAX_LOGPROBS - size))
        return Logprobs(
            chosen,
            jnp.pad(ids.astype(jnp.int32), pad),
            jnp.pad(top, pad, constant_values=-jnp.inf),
        )

    return lax.cond(wanted, compute, lambda: Logprobs.zeros(logits.shape[0]))


def _argmax(logits: Float[Array, "S V"]) -> Int[Array, " S"]:
    """The first of the highest. Two plain reductions: XLA:CPU does not vectorise `argmax`."""
    size = logits.shape[1]
    best = logits.max(axis=1, keepdims=True)
    ids = jnp.where(logits == best, jnp.arange(size, dtype=jnp.int32), size - 1)
    return ids.min(axis=1)


def _draw(
    logits: Float[Array, "S V"],
    settings: SamplingArrays,
    positions: Int[Array, " S"],
    drawn: Bool[Array, " S"],
) -> Int[Array, " S"]:
    temperature = jnp.where(drawn, settings.temperature, 1.0)[:, None]
    logits = logits / temperature
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))  # 1 for the most likely
    vocab = logits.shape[1]

    top_k = jnp.where(drawn & (settings.top_k > 0), settings.top_k, vocab)
    weights = lax.cond(
        (top_k < vocab).any(),
        lambda: _keep(weights, lambda kept: kept.sum(axis=1) >= top_k),
        lambda: weights,
    )
    top_p = jnp.where(drawn, settings.top_p, 1.0)

    def nucleus() -> Float[Array, "S V"]:
        enough = top_p * weights.sum(axis=1)
        kept = _keep(weights, lambda kept: jnp.where(kept, weights, 0.0).sum(axis=1) >= enough)
        return jnp.where(top_p[:, None] < 1.0, kept, weights)

    weights = lax.cond((top_p < 1.0).any(), nucleus, lambda: weights)
    weights = jnp.where(weights >= settings.min_p[:, None], weights, 0.0)
    return _invert(weights, _uniform(settings.seed, positions))


def _keep(
    weights: Float[Array, "S V"],
    enough: Callable[[Bool[Array, "S V"]], Bool[Array, " S"]],
) -> Float[Array, "S V"]:
    """Zeroes all weights under the highest threshold at which what is kept is still `enough`.

    `enough` takes a mask of kept weights, `[S, V]`, and says for each row whether they suffice; it
    must hold at threshold 0. Weights are from 0 to 1, so their bits are ordered as they are.
    """

    def threshold(bits: Int[Array, " S"]) -> Float[Array, "S 1"]:
        return lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    def body(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # low suffices, high is the first that may not
        middle = low + (high - low) // 2
        holds = enough(weights >= threshold(middle))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    zero = jnp.zeros(weights.shape[0], jnp.int32)
    low, _ = lax.fori_loop(0, 31, body, (zero, zero + (_ONE_BITS + 1)))
    return jnp.where(weights >= threshold(low), weights, 0.0)


def _uniform(seeds: UInt[Array, "S 2"], positions: Int[Array, " S"]) -> Float[Array, " S"]:
    """A number in [0, 1) for each row, from its seed and position alone."""

    def one(seed: UInt[Array, " 2"], position: Int[Array, ""]) -> Float[Array, ""]:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(one)(seeds, positions)


def _invert(weights: Float[Array, "S V"], uniform: Float[Array, " S"]) -> Int[Array, " S"]:
    """The token at which the cumulative weight passes `uniform` of the total.

    In two levels, chunks and then tokens of one chunk: a running sum over the whole vocabulary is
    slow on every backend.
    """
    rows, vocab = weights.shape
    chunks = jnp.pad(weights, ((0, 0), (0, -vocab % _CHUNK))).reshape(rows, -1, _CHUNK)
    ends = jnp.cumsum(chunks.sum(axis=2), axis=1)
    # Strictly below the total, so that the chunk found holds weight.
    target = jnp.minimum(uniform * ends[:, -1], jnp.nextafter(ends[:, -1], 0.0))[:, None]
    chunk = (ends <= target).sum(axis=1)
    inside = jnp.take_along_axis(chunks, chunk[:, None, None], axis=1)[:, 0]  # S _CHUNK
    before = jnp.where(
        chunk > 0, jnp.take_along_axis(ends, jnp.maximum(chunk - 1, 0)[:, None], axis=1)[:, 0], 0.0
    )
    passed = before[:, None] + jnp.cumsum(inside, axis=1) > target
    at = jnp.arange(_CHUNK)
    # Rounding may leave no token past the target: then it is the chunk's last with any weight.
    last = jnp.where(inside > 0, at, 0).max(axis=1)
    first = jnp.where(passed & (inside > 0), at, _CHUNK).min(axis=1)
    return (chunk * _CHUNK + jnp.minimum(first, last)).astype(jnp.int32)
