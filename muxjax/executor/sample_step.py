"""Computes the tokens and log-probabilities of a step from its logits."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from muxjax.executor import sampler
from muxjax.executor.sampler import Logprobs, SamplingArrays
from muxjax.executor.slot_state import SlotState
from muxjax.models.nn.decoder import Decoder

_TILE = 16
"""Rows of logits that prompt log-probabilities are computed for at a time."""


@struct.dataclass
class Adjustments:
    """Changes to the logits of a step's rows before a token is sampled."""

    settings: SamplingArrays
    bias_ids: Int[Array, "S 300"]
    bias: Float[Array, "S 300"]
    stop_ids: Int[Array, "S 8"]
    mask: UInt[Array, "S W"]
    masked: Bool[Array, ""]
    """Whether `mask` excludes any token."""


def sample_step(
    logits: Float[Array, "S V"],
    adjust: Adjustments,
    state: SlotState,
    slots: Int[Array, " S"],
    positions: Int[Array, " S"],
    live: Bool[Array, " S"],
) -> tuple[Int[Array, " S"], Logprobs]:
    """Samples a token for each row, and computes the log-probabilities that live rows need.

    An operation that no row needs is skipped.

    Args:
      logits: of the model.
      adjust: settings, biases and exclusions of the rows.
      state: slots of the model; tokens seen so far, for the penalties.
      slots: of the rows.
      positions: of each row's next token in its sequence.
      live: rows whose token is used.
    """
    settings = adjust.settings
    biased = ((adjust.bias_ids >= 0).any(axis=1) & live).any()
    penalized = (settings.has_penalty & live).any()
    early = (positions < settings.stop_from) & live

    def adjust_logits() -> Float[Array, "S V"]:
        def apply_if(
            needed: Bool[Array, ""],
            logits: Float[Array, "S V"],
            function: Callable[[Float[Array, "S V"]], Float[Array, "S V"]],
        ) -> Float[Array, "S V"]:
            return lax.cond(needed, function, lambda unchanged: unchanged, logits)

        x = apply_if(biased, logits, lambda x: sampler.add_bias(x, adjust.bias_ids, adjust.bias))
        x = apply_if(
            penalized,
            x,
            lambda x: sampler.penalize(x, settings, state.in_prompt[slots], state.counts[slots]),
        )
        x = apply_if(early.any(), x, lambda x: sampler.forbid(x, adjust.stop_ids, early))
        return apply_if(adjust.masked, x, lambda x: sampler.allow(x, adjust.mask))

    # The outer condition skips all four inner ones for a step that needs no adjustment.
    needed = biased | penalized | early.any() | adjust.masked
    adjusted = lax.cond(needed, adjust_logits, lambda: logits)
    token = sampler.sample(adjusted, settings, positions, live)
    needs_logprobs = ((settings.logprobs >= 0) & live).any()
    return token, sampler.logprobs(logits, token, needs_logprobs)


def prompt_logprobs(
    decoder: Decoder, hidden: Float[Array, "T D"], targets: Int[Array, " T"]
) -> Logprobs:
    """Computes log-probabilities of prompt tokens; skips the work if none is needed.

    Works in tiles, because the logits of a full prefill would be the largest array of the step.

    Args:
      decoder: the model.
      hidden: final hidden states of a prefill.
      targets: the next prompt token of each position; -1 where its log-probability is not needed.

    Returns:
      The log-probabilities of `targets`; zeros if none is needed.
    """
    size = targets.shape[0]

    def tile(rows: tuple[Array, Array]) -> Logprobs:
        states, following = rows
        return sampler.logprobs(decoder.logits(states), jnp.maximum(following, 0), jnp.array(True))

    def compute() -> Logprobs:
        pad = -size % _TILE
        states = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, _TILE, hidden.shape[1])
        following = jnp.pad(targets, (0, pad)).reshape(-1, _TILE)
        tiles = lax.map(tile, (states, following))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], tiles)

    return lax.cond((targets >= 0).any(), compute, lambda: Logprobs.zeros(size))
