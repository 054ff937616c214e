"""The two functions that are compiled for each model: prefill and decode.

Both take the pool and the model's slot state as donated arguments and give them back. What a step
does with slots and pages is said in `muxjax.scheduling.steps`.
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
    """What a step gives: for `k` rounds and `S` rows the token, -1 where there is none.

    `prompt` has the log-probabilities of a prefill's `targets`; a decode has none.
    """

    tokens: Int[Array, "k S"]
    logprobs: Logprobs
    prompt: Logprobs


@dataclass(frozen=True)
class StepFunctions:
    """The step functions of one model, to be compiled for each bucket.

    Attributes:
      layout: the model's geometry in the pool.
      max_decode_tokens: most tokens a sequence makes in one decode.
      implementation: of paged attention; None chooses by platform.
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
        """Writes chunks of prompts to the pool; samples a token after each request's last.

        Args:
          decoder: the model.
          kv: the pool; donated.
          state: the model's slots; donated.
          tokens: of all chunks, packed, then padding.
          packed: a row a chunk (`step_inputs`); rows beyond have length 0 and the dummy slot.
          targets: the token after each of `tokens` whose log-probability is wanted, -1 for none.
          bias: a row a chunk, for its slot; of any chunk but a last one it is not read.
          mask: a bit for each token that may be chosen after a chunk.
        """
        rows = unpack_prefill(packed)
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(rows.length)])
        at = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        owner = jnp.searchsorted(starts[1:], at, side="right", method="compare_all")
        valid = at < starts[-1]
        owner = jnp.where(valid, owner, 0).astype(jnp.int32)
        positions = jnp.where(valid, rows.start[owner] + at - starts[owner], 0)
        tables = rows.block_tables
        attend = PagedAttend(
            first_rows=self._rows(
                tables[owner, positions // self.layout.tokens_per_page], positions, valid
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
        state = _count_prefix(state, rows, tokens, owner, positions, valid)

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

        def nothing() -> tuple[Array, Logprobs]:
            return jnp.zeros(rows.slot.shape, jnp.int32), Logprobs.zeros(rows.slot.shape[0])

        token, logprobs = lax.cond(rows.last.any(), finish, nothing)
        state = _fill_slots(state, rows, bias, token)
        emitted = StepOutput(
            jnp.where(rows.last, token, -1)[None],
            jax.tree.map(lambda x: x[None], logprobs),
            prompt_logprobs(decoder, hidden, targets),
        )
        return kv, state, emitted

    def decode(
        self,
        decoder: Decoder,
        kv: Float[Array, "P rows 128"],
        state: SlotState,
        packed: Int[Array, "S columns"],
        mask: UInt[Array, "S W"],
        num_tokens: Int[Array, ""],
    ) -> tuple[Float[Array, "P rows 128"], SlotState, StepOutput]:
        """Runs sequences for up to `num_tokens` tokens; stops early when all are done.

        Args:
          decoder: the model.
          kv: the pool; donated.
          state: the model's slots; donated.
          packed: a row a sequence: its slot (the dummy slot for padding), then its block table.
          mask: a bit for each token that may be chosen, in every round; a sequence with a grammar
            is therefore given one round.
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

        def more(carry: _DecodeCarry) -> Bool[Array, ""]:
            return (carry.round < num_tokens) & (carry.remaining > 0).any()

        def one(carry: _DecodeCarry) -> _DecodeCarry:
            live = carry.remaining > 0
            block = jnp.minimum(carry.position // self.layout.tokens_per_page, last_block)
            page = jnp.take_along_axis(tables, block[:, None], axis=1)[:, 0]
            attend = PagedAttend(
                first_rows=self._rows(page, carry.position, live),
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
                emitted=StepOutput(
                    carry.emitted.tokens.at[carry.round].set(jnp.where(live, token, -1)),
                    jax.tree.map(
                        lambda all_, new: all_.at[carry.round].set(new),
                        carry.emitted.logprobs,
                        logprobs,
                    ),
                    carry.emitted.prompt,
                ),
            )

        burst = lax.while_loop(
            more,
            one,
            _DecodeCarry(
                round=jnp.int32(0),
                kv=kv,
                token=state.token[slots],
                position=state.position[slots],
                remaining=state.remaining[slots],
                counts=state.counts,
                emitted=StepOutput(
                    jnp.full((self.max_decode_tokens, num_seqs), -1, jnp.int32),
                    Logprobs.zeros(self.max_decode_tokens, num_seqs),
                    Logprobs.zeros(0),
                ),
            ),
        )
        state = dataclasses.replace(
            state,
            token=state.token.at[slots].set(burst.token),
            position=state.position.at[slots].set(burst.position),
            remaining=state.remaining.at[slots].set(burst.remaining),
            counts=burst.counts,
        )
        return burst.kv, state, burst.emitted

    def _rows(
        self, page: Int[Array, " T"], position: Int[Array, " T"], valid: Bool[Array, " T"]
    ) -> Int[Array, " T"]:
        """The pool row of each token in layer 0; that of the dummy block where not valid."""
        within = position % self.layout.tokens_per_page * self.layout.rows_per_token
        return jnp.where(valid, page * self.layout.rows + within, 0)


@struct.dataclass
class _DecodeCarry:
    """What a decode carries from round to round; all but `kv` and `counts` are rows of the step."""

    round: Int[Array, ""]
    kv: Float[Array, "P rows 128"]
    token: Int[Array, " S"]
    position: Int[Array, " S"]
    remaining: Int[Array, " S"]
    counts: Int[Array, "M V"]
    emitted: StepOutput


def _count_prefix(
    state: SlotState,
    rows: PrefillRows,
    tokens: Int[Array, " T"],
    owner: Int[Array, " T"],
    positions: Int[Array, " T"],
    valid: Bool[Array, " T"],
) -> SlotState:
    """Notes which tokens the chunks hold, in slots that start anew with a request's first chunk."""
    dummy = state.token.shape[0] - 1
    fresh = jnp.where(rows.first, rows.slot, dummy)
    in_prompt = state.in_prompt.at[fresh].set(False)
    counts = state.counts.at[fresh].set(0)
    slot = jnp.where(valid, rows.slot[owner], dummy)
    prompt = positions < rows.num_prompt[owner]
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
    """Makes the slots of requests whose last chunk this was ready to decode."""
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
