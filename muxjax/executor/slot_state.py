"""State of the running sequences on the device, so that the host sends only changes.

Each model has `max_seqs` slots, and a dummy slot for padding rows, which is never live.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from muxjax.executor.sampler import SamplingArrays
from muxjax.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS


@struct.dataclass
class SlotState:
    """The slots of one model; `M = max_seqs + 1`. Donated to, and returned by, every step.

    Attributes:
      token: the last token, not yet in the pool.
      position: of that token; equals the number of tokens in the pool.
      remaining: number of tokens still to generate; 0 when the slot is done.
      stop_ids: tokens that end the sequence; -1 for padding.
      settings: sampling settings.
      bias_ids: tokens that have a logit bias; -1 for padding.
      bias: their biases.
      in_prompt: which tokens the prompt contains, for the repetition penalty.
      counts: number of times that the output contains each token.
    """

    token: Int[Array, " M"]
    position: Int[Array, " M"]
    remaining: Int[Array, " M"]
    stop_ids: Int[Array, "M 8"]
    settings: SamplingArrays
    bias_ids: Int[Array, "M 300"]
    bias: Float[Array, "M 300"]
    in_prompt: Bool[Array, "M V"]
    counts: Int[Array, "M V"]

    @staticmethod
    def create(max_seqs: int, vocab_size: int) -> SlotState:
        """Returns slots that are all free, on the default device."""
        slots = max_seqs + 1

        # Each field has a separate buffer: a donated argument must not appear twice.
        def ints(*shape: int) -> Array:
            return jnp.zeros(shape, jnp.int32)

        def ones() -> Array:
            return jnp.ones(slots, jnp.float32)

        def zeros() -> Array:
            return jnp.zeros(slots, jnp.float32)

        return SlotState(
            token=ints(slots),
            position=ints(slots),
            remaining=ints(slots),
            stop_ids=ints(slots, MAX_STOP_TOKEN_IDS) - 1,
            settings=SamplingArrays(
                temperature=zeros(),
                top_p=ones(),
                min_p=zeros(),
                repetition_penalty=ones(),
                presence_penalty=zeros(),
                frequency_penalty=zeros(),
                top_k=ints(slots),
                seed=jnp.zeros((slots, 2), jnp.uint32),
                logprobs=ints(slots) - 1,
                stop_from=ints(slots),
            ),
            bias_ids=ints(slots, MAX_LOGIT_BIAS) - 1,
            bias=jnp.zeros((slots, MAX_LOGIT_BIAS), jnp.float32),
            in_prompt=jnp.zeros((slots, vocab_size), bool),
            counts=ints(slots, vocab_size),
        )
