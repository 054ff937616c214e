"""From logits to tokens and log-probabilities: what the requests of a step ask for, and no more."""

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
"""Rows of logits that the log-probabilities of a prompt take at a time."""


@struct.dataclass
class Adjustments:
    """What changes the logits of a step's rows before a token is drawn."""

    settings: SamplingArrays
    bias_ids: Int[Array, "S 300"]
    bias: Float[Array, "S 300"]
    stop_ids: Int[Array, "S 8"]
    mask: UInt[Array, "S W"]
    masked: Bool[Array, ""]
    """Whether `mask` forbids anything."""


def sample_step(
    logits: Float[Array, "S V"],
    adjust: Adjustments,
    state: SlotState,
    slots: Int[Array, " S"],
    positions: Int[Array, " S"],
    live: Bool[Array, " S"],
) -> tuple[Int[Array, " S"], Logprobs]:
    """A token for each row, and the log-probabilities that live rows ask for.

    What no row asks for is not computed.
    """
    settings = adjust.settings
    biased = ((adjust.bias_ids >= 0).any(axis=1) & live).any()
    penalised = (settings.penalised & live).any()
    early = (positions < settings.stop_from) & live

    def change() -> Float[Array, "S V"]:
        def when(
            asked: Bool[Array, ""],
            logits: Float[Array, "S V"],
            by: Callable[[Float[Array, "S V"]], Float[Array, "S V"]],
        ) -> Float[Array, "S V"]:
            return lax.cond(asked, by, lambda same: same, logits)

        x = when(biased, logits, lambda x: sampler.add_bias(x, adjust.bias_ids, adjust.bias))
        x = when(
            penalised,
            x,
            lambda x: sampler.penalize(x, settings, state.in_prompt[slots], state.counts[slots]),
        )
        x = when(early.any(), x, lambda x: sampler.forbid(x, adjust.stop_ids, early))
        return when(adjust.masked, x, lambda x: sampler.allow(x, adjust.mask))

    # One choice around all of them: where nobody asks for any, the logits pass through once.
    asked = biased | penalised | early.any() | adjust.masked
    changed = lax.cond(asked, change, lambda: logits)
    token = sampler.sample(changed, settings, positions, live)
    wanted = ((settings.logprobs >= 0) & live).any()
    return token, sampler.logprobs(logits, token, wanted)


def prompt_logprobs(
    decoder: Decoder, hidden: Float[Array, "T D"], targets: Int[Array, " T"]
) -> Logprobs:
    """Log-probabilities of the tokens that follow; zeros, and no work, where nobody asks.

    In tiles, since the logits of a whole prefill would take more memory than anything else.
    """
    size = targets.shape[0]

    def tile(rows: tuple[Array, Array]) -> Logprobs:
        states, following = rows
        return sampler.logprobs(decoder.logits(states), jnp.maximum(following, 0), jnp.array(True))

    def compute() -> Logprobs:
        pad = -size % _TILE
        states = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, _TILE, hidden.shape[1])
        following = jnp.pad(targets, (0, pad)).reshape(-1, _TILE)
        found = lax.map(tile, (states, following))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], found)

    return lax.cond((targets >= 0).any(), compute, lambda: Logprobs.zeros(size))
