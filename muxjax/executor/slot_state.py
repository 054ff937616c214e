"""What the device keeps of each running sequence, so that the host sends only what changed.

Each model has `max_seqs` slots and one more, the dummy, that padding rows name: it is never live.
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
      position: where that token goes: the number of tokens in the pool.
      remaining: tokens still to be made; 0 when the slot is done.
      stop_ids: tokens that end the sequence, -1 where there are fewer.
      settings: sampling settings.
      bias_ids, bias: tokens whose logits are changed, -1 where there are fewer, and by how much.
      in_prompt: which tokens the prompt holds, for the repetition penalty.
      counts: how often the output holds each token.
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
        slots = max_seqs + 1

        # Distinct buffers, all of them: a donated argument must not appear twice.
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
