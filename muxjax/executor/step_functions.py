"""The two functions that are compiled for each model: prefill and decode.

Both take the pool and the model's slot state as donated arguments and return them.
`muxjax.scheduling.steps` specifies how a step uses slots and pages.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from muxjax.executor.sample_step import Adjustments, prompt_logprobs, sample_step
from muxjax.executor.sampler import Logprobs
from muxjax.executor.slot_state import SlotState
from muxjax.executor.step_inputs import PrefillRows, unpack_bias, unpack_prefill
from muxjax.models.nn.attention import PagedAttend
from muxjax.models.nn.decoder import Decoder
from muxjax.pallas_kernels import AttentionMetadata, KVLayout


@struct.dataclass
class StepOutput:
    """The output of a step of `k` rounds and `S` rows.

    Attributes:
      tokens: the token of each round and row; -1 for none.
      logprobs: of the tokens.
      prompt: log-probabilities of a prefill's `targets`; a decode has none.
    """

    tokens: Int[Array, "k S"]
    logprobs: Logprobs
    prompt: Logprobs


@dataclass(frozen=True)
class StepFunctions:
    """The step functions of one model, to be compiled for each bucket.

    Attributes:
      layout: geometry of the model's keys and values in the pool.
      max_decode_tokens: maximum number of tokens per sequence and decode.
      implementation: of paged attention; None selects one by platform.
    """

    layout: KVLayout
    max_decode_tokens: int
    implementation: str | None = None

    def prefill(
        self,
        decoder: Decoder,
        kv: Float[Array, "P rows 128"],
        state: SlotState,
        tokens: Int[Array, " T"],
        packed: Int[Array, "S columns"],
        targets: Int[Array, " T"],
        bias: Int[Array, "S 2 300"],
        mask: UInt[Array, "S W"],
    ) -> tuple[Float[Array, "P rows 128"], SlotState, StepOutput]:
        """Writes chunks of prompts to the pool; samples a token after each request's last chunk.

        Args:
          decoder: the model.
          kv: the pool; donated.
          state: the model's slots; donated.
          tokens: of all chunks, packed, then padding.
          packed: one row per chunk (`step_inputs`); padding rows have length 0 and the dummy slot.
          targets: for each of `tokens`, the next token if its log-probability is needed, or -1.
          bias: one row per chunk, for its slot; read for a request's last chunk only.
          mask: a bit for each token that may be sampled after a chunk.
        """
        rows = unpack_prefill(packed)
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(rows.length)])
        index = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        chunk = jnp.searchsorted(starts[1:], index, side="right", method="compare_all")
        valid = index < starts[-1]
        chunk = jnp.where(valid, chunk, 0).astype(jnp.int32)
        positions = jnp.where(valid, rows.start[chunk] + index - starts[chunk], 0)
        tables = rows.block_tables
        attend = PagedAttend(
            first_rows=self._first_rows(
                tables[chunk, positions // self.layout.tokens_per_page], positions, valid
            ),
            metadata=AttentionMetadata(
                block_tables=tables,
                kv_lens=rows.start + rows.length,
                query_starts=starts,
                layout=self.layout,
            ),
            implementation=self.implementation,
        )
        hidden, kv = decoder(tokens, positions, kv, attend)
        state = _count_prefix(state, rows, tokens, chunk, positions, valid)

        def finish() -> tuple[Array, Logprobs]:
            logits = decoder.logits(hidden[jnp.maximum(starts[1:] - 1, 0)])
            adjust = Adjustments(
                rows.settings,
                *unpack_bias(bias),
                rows.stop_ids,
                mask,
                (~mask != 0).any(),
            )
            return sample_step(
                logits, adjust, state, rows.slot, rows.start + rows.length, rows.last
            )

        def skip() -> tuple[Array, Logprobs]:
            return jnp.zeros(rows.slot.shape, jnp.int32), Logprobs.zeros(rows.slot.shape[0])

        token, logprobs = lax.cond(rows.last.any(), finish, skip)
        state = _fill_slots(state, rows, bias, token)
        output = StepOutput(
            jnp.where(rows.last, token, -1)[None],
            jax.tree.map(lambda x: x[None], logprobs),
            prompt_logprobs(decoder, hidden, targets),
        )
        return kv, state, output

    def decode(
        self,
        decoder: Decoder,
        kv: Float[Array, "P rows 128"],
        state: SlotState,
        packed: Int[Array, "S columns"],
        mask: UInt[Array, "S W"],
        num_tokens: Int[Array, ""],
    ) -> tuple[Float[Array, "P rows 128"], SlotState, StepOutput]:
        """Decodes up to `num_tokens` tokens per sequence; stops early when all are done.

        Args:
          decoder: the model.
          kv: the pool; donated.
          state: the model's slots; donated.
          packed: one row per sequence: its slot (the dummy slot for padding), then its block table.
          mask: a bit for each token that may be sampled. It is the same in every round, so a step
            with a masked sequence must have one round.
          num_tokens: at most `max_decode_tokens`.
        """
        slots, tables = packed[:, 0], packed[:, 1:]
        num_seqs = slots.shape[0]
        stop_ids = state.stop_ids[slots]
        adjust = Adjustments(
            jax.tree.map(lambda x: x[slots], state.settings),
            state.bias_ids[slots],
            state.bias[slots],
            stop_ids,
            mask,
            (~mask != 0).any(),
        )
        last_block = tables.shape[1] - 1

        def cond(carry: _DecodeCarry) -> Bool[Array, ""]:
            return (carry.round < num_tokens) & (carry.remaining > 0).any()

        def body(carry: _DecodeCarry) -> _DecodeCarry:
            live = carry.remaining > 0
            block = jnp.minimum(carry.position // self.layout.tokens_per_page, last_block)
            page = jnp.take_along_axis(tables, block[:, None], axis=1)[:, 0]
            attend = PagedAttend(
                first_rows=self._first_rows(page, carry.position, live),
                metadata=AttentionMetadata(
                    block_tables=tables,
                    kv_lens=jnp.where(live, carry.position + 1, 0),
                    query_starts=jnp.arange(num_seqs + 1, dtype=jnp.int32),
                    layout=self.layout,
                    decode=True,
                ),
                implementation=self.implementation,
            )
            hidden, kv = decoder(carry.token, carry.position, carry.kv, attend)
            logits = decoder.logits(hidden)
            counted = dataclasses.replace(state, counts=carry.counts)
            token, logprobs = sample_step(logits, adjust, counted, slots, carry.position + 1, live)
            stopped = (token[:, None] == stop_ids).any(axis=1)
            return _DecodeCarry(
                round=carry.round + 1,
                kv=kv,
                token=jnp.where(live, token, carry.token),
                position=carry.position + live,
                remaining=jnp.where(live & ~stopped, carry.remaining - 1, 0),
                counts=carry.counts.at[slots, token].add(live.astype(jnp.int32)),
                output=StepOutput(
                    carry.output.tokens.at[carry.round].set(jnp.where(live, token, -1)),
                    jax.tree.map(
                        lambda all_, new: all_.at[carry.round].set(new),
                        carry.output.logprobs,
                        logprobs,
                    ),
                    carry.output.prompt,
                ),
            )

        final = lax.while_loop(
            cond,
            body,
            _DecodeCarry(
                round=jnp.int32(0),
                kv=kv,
                token=state.token[slots],
                position=state.position[slots],
                remaining=state.remaining[slots],
                counts=state.counts,
                output=StepOutput(
                    jnp.full((self.max_decode_tokens, num_seqs), -1, jnp.int32),
                    Logprobs.zeros(self.max_decode_tokens, num_seqs),
                    Logprobs.zeros(0),
                ),
            ),
        )
        state = dataclasses.replace(
            state,
            token=state.token.at[slots].set(final.token),
            position=state.position.at[slots].set(final.position),
            remaining=state.remaining.at[slots].set(final.remaining),
            counts=final.counts,
        )
        return final.kv, state, final.output

    def _first_rows(
        self, page: Int[Array, " T"], position: Int[Array, " T"], valid: Bool[Array, " T"]
    ) -> Int[Array, " T"]:
        """Returns the pool row of each token in layer 0; the dummy block's row if not `valid`."""
        offset = position % self.layout.tokens_per_page * self.layout.rows_per_token
        return jnp.where(valid, page * self.layout.rows + offset, 0)


@struct.dataclass
class _DecodeCarry:
    """The carry of a decode's loop; each iteration is a round, which generates a token per row."""

    round: Int[Array, ""]
    kv: Float[Array, "P rows 128"]
    token: Int[Array, " S"]
    position: Int[Array, " S"]
    remaining: Int[Array, " S"]
    counts: Int[Array, "M V"]
    output: StepOutput


def _count_prefix(
    state: SlotState,
    rows: PrefillRows,
    tokens: Int[Array, " T"],
    chunk: Int[Array, " T"],
    positions: Int[Array, " T"],
    valid: Bool[Array, " T"],
) -> SlotState:
    """Counts the tokens of the chunks in their slots; a request's first chunk resets its slot.

    Args:
      state: slots of the model.
      rows: the chunks.
      tokens: of all chunks, packed, then padding.
      chunk: of each token, the index of its chunk.
      positions: of each token in its sequence.
      valid: False for padding.
    """
    dummy = state.token.shape[0] - 1
    reset = jnp.where(rows.first, rows.slot, dummy)
    in_prompt = state.in_prompt.at[reset].set(False)
    counts = state.counts.at[reset].set(0)
    slot = jnp.where(valid, rows.slot[chunk], dummy)
    prompt = positions < rows.num_prompt[chunk]
    return dataclasses.replace(
        state,
        in_prompt=in_prompt.at[jnp.where(prompt, slot, dummy), tokens].set(True),
        counts=counts.at[jnp.where(prompt, dummy, slot), tokens].add(1),
    )


def _fill_slots(
    state: SlotState,
    rows: PrefillRows,
    bias: Int[Array, "S 2 300"],
    token: Int[Array, " S"],
) -> SlotState:
    """Fills the slots of requests whose last chunk has run, so that they can decode."""
    dummy = state.token.shape[0] - 1
    slot = jnp.where(rows.last, rows.slot, dummy)
    stopped = (token[:, None] == rows.stop_ids).any(axis=1)
    remaining = jnp.where(rows.last & ~stopped, rows.remaining - 1, 0)

    def put(old: Array, new: Array) -> Array:
        return old.at[slot].set(new)

    bias_ids, values = unpack_bias(bias)

    return dataclasses.replace(
        state,
        token=put(state.token, token),
        position=put(state.position, rows.start + rows.length),
        remaining=put(state.remaining, remaining),
        stop_ids=put(state.stop_ids, rows.stop_ids),
        settings=jax.tree.map(put, state.settings, rows.settings),
        bias_ids=put(state.bias_ids, bias_ids),
        bias=put(state.bias, values),
        counts=state.counts.at[slot, token].add(1),
    )
