"""Runs steps on the device: the real `Executor`.

Nobody else touches the pool. It is one array, donated to every step and given back by it, so it
keeps its place in memory from start to end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.device_state import SlotState
from muxjax.errors import EngineDead
from muxjax.programs import ModelPrograms, bucket
from muxjax.sampler import Logprobs
from muxjax.scheduling.steps import (
    Decode,
    DecodeBatch,
    Prefill,
    Step,
    StepResult,
    TokenLogprobs,
)
from muxjax.step_inputs import Column, pack_chunk
from muxjax.steps import Emitted

_POISON_BATCH = 64


@dataclass
class _Model:
    """One model's device state, and what the host remembers of its slots."""

    programs: ModelPrograms
    state: SlotState
    rows: np.ndarray  # int32, max_seqs + 1: slot and block table; the last is the dummy's
    known: np.ndarray  # entries of each block table that are filled in
    logprobs: list[int | None]  # alternatives that each slot's request asks for

    @property
    def dummy(self) -> int:
        return len(self.known)


@dataclass(frozen=True)
class _Handle:
    step: Step
    emitted: Emitted
    wanted: list[int | None]  # for each row, how many alternatives to report
    submitted: float


class JaxExecutor:
    """See `muxjax.scheduling.steps.Executor`.

    Args:
      models: compiled programs by model name, parameters included.
      kv: the pool's shape `[P, rows, 128]` and type.
      dummy_pages: pages at the start that padding is written to.
      poison: test mode: all other pages hold NaN until a step writes them, and `poison` works.
    """

    def __init__(
        self,
        models: Mapping[str, ModelPrograms],
        kv: jax.ShapeDtypeStruct,
        *,
        dummy_pages: int,
        poison: bool = False,
    ) -> None:
        self._kv: jax.Array | None = jnp.zeros(kv.shape, kv.dtype)
        self._poison = None
        if poison:
            fill = jax.jit(
                lambda kv, pages: kv.at[pages].set(jnp.nan, mode="drop"), donate_argnums=0
            )
            ids = jax.ShapeDtypeStruct((_POISON_BATCH,), jnp.int32)
            self._poison = fill.lower(kv, ids).compile()
            self.poison(range(dummy_pages, kv.shape[0]))
        self._models = {name: self._start(programs) for name, programs in models.items()}
        self._free_at = 0.0

    @staticmethod
    def _start(programs: ModelPrograms) -> _Model:
        slots = programs.buckets.max_seqs
        rows = np.zeros((slots + 1, 1 + programs.buckets.blocks), np.int32)
        rows[:, 0] = np.arange(slots + 1)
        return _Model(
            programs=programs,
            state=SlotState.create(slots, programs.vocab_size),
            rows=rows,
            known=np.zeros(slots, np.int64),
            logprobs=[None] * slots,
        )

    @property
    def pool_address(self) -> int:
        """Where the pool lies in memory (of its first shard); it never changes."""
        return self._pool.addressable_shards[0].data.unsafe_buffer_pointer()

    @property
    def _pool(self) -> jax.Array:
        if self._kv is None:
            raise EngineDead("the executor is closed")
        return self._kv

    def submit(self, step: Step) -> _Handle:
        """Queues a step; see `Executor.submit`."""
        submitted = time.perf_counter()
        model = self._models[step.model]
        if isinstance(step, Prefill):
            emitted, wanted = self._prefill(model, step)
        else:
            emitted, wanted = self._decode(model, step)
        return _Handle(step, emitted, wanted, submitted)

    def result(self, handle: _Handle) -> StepResult:
        """Waits for a step; see `Executor.result`."""
        tokens = np.asarray(handle.emitted.tokens)  # k S
        ended = time.perf_counter()
        started = max(handle.submitted, self._free_at)
        self._free_at = ended
        rows = len(handle.wanted)
        rounds = handle.step.num_tokens if isinstance(handle.step, Decode) else 1
        made = tokens[:rounds, :rows]
        columns = made.T.tolist()
        if rows and made.min() < 0:  # some made fewer: a sequence that is done stays so
            counts = (made >= 0).sum(axis=0).tolist()
            columns = [column[:count] for column, count in zip(columns, counts, strict=True)]
        logprobs: list[list[TokenLogprobs] | None] = [None] * rows
        if handle.wanted.count(None) < rows:
            found = jax.tree.map(np.asarray, handle.emitted.logprobs)
            for row, want in enumerate(handle.wanted):
                if want is not None:
                    logprobs[row] = [
                        _token_logprobs(found, index, row, want)
                        for index in range(len(columns[row]))
                    ]
        return StepResult(columns, logprobs, started, ended - started)

    def poison(self, pages: Sequence[int]) -> None:
        """Fills pages with NaN; see `Executor.poison`.

        Raises:
          ValueError: the executor was not made with `poison=True`.
        """
        if self._poison is None:
            raise ValueError("this executor was not made to poison pages")
        pages = list(pages)
        for start in range(0, len(pages), _POISON_BATCH):
            batch = np.full(_POISON_BATCH, self._pool.shape[0], np.int32)  # beyond: dropped
            some = pages[start : start + _POISON_BATCH]
            batch[: len(some)] = some
            self._kv = self._poison(self._pool, batch)

    def close(self) -> None:
        """Frees the pool and the slots; parameters are freed with their programs."""
        if self._kv is not None:
            self._kv.delete()
            self._kv = None
        self._models.clear()

    def _prefill(self, model: _Model, step: Prefill) -> tuple[Emitted, list[int | None]]:
        programs = model.programs
        size = bucket(step.num_tokens, programs.buckets.prefill_tokens)
        tokens = np.zeros(size, np.int32)
        packed = np.zeros(
            (programs.buckets.prefill_seqs, Column.BLOCKS + programs.buckets.blocks), np.int32
        )
        packed[:, Column.SLOT] = model.dummy
        packed[:, Column.STOP_IDS : Column.BLOCKS] = -1
        wanted: list[int | None] = []
        at = 0
        for row, chunk in zip(packed, step.chunks, strict=False):
            tokens[at : at + len(chunk.tokens)] = chunk.tokens
            at += len(chunk.tokens)
            if chunk.start == 0:
                model.known[chunk.slot] = 0
            if chunk.num_blocks > model.known[chunk.slot]:
                _fill(model, chunk.slot, chunk.blocks, chunk.num_blocks)
            row[Column.BLOCKS :] = model.rows[chunk.slot, 1:]
            params = chunk.sampling
            if params is not None:
                model.logprobs[chunk.slot] = params.logprobs
            wanted.append(None if params is None else params.logprobs)
            pack_chunk(row, chunk)
        self._kv, model.state, emitted = programs.prefill(size)(
            programs.parameters, self._pool, model.state, tokens, packed
        )
        return emitted, wanted

    def _decode(self, model: _Model, step: Decode) -> tuple[Emitted, list[int | None]]:
        programs = model.programs
        batch = DecodeBatch.of(step.sequences)
        size = bucket(len(batch), programs.buckets.decode_seqs)
        slots = batch.slots
        missing = batch.num_blocks - model.known[slots]
        for index in (missing > 1).nonzero()[0].tolist():
            blocks, count = batch.blocks[index], int(batch.num_blocks[index])
            _fill(model, int(slots[index]), blocks, count)
        # Nearly all that grow do so by one block.
        one = (missing == 1).nonzero()[0]
        if one.size:
            where, counts = slots[one], batch.num_blocks[one]
            model.rows[where, counts] = [
                batch.blocks[index][count - 1]
                for index, count in zip(one.tolist(), counts.tolist(), strict=True)
            ]
            model.known[where] = counts
        which = np.full(size, model.dummy)
        which[: len(slots)] = slots
        packed = model.rows[which]
        self._kv, model.state, emitted = programs.decode(size)(
            programs.parameters, self._pool, model.state, packed, np.int32(step.num_tokens)
        )
        return emitted, [model.logprobs[slot] for slot in slots.tolist()]


def _fill(model: _Model, slot: int, blocks: Sequence[int], count: int) -> None:
    """Brings a slot's block table up to `count` blocks. Entries beyond may be any page."""
    known = int(model.known[slot])
    model.rows[slot, 1 + known : 1 + count] = blocks[known:count]
    model.known[slot] = count


def _token_logprobs(found: Logprobs, index: int, row: int, want: int) -> TokenLogprobs:
    ids, values = found.top_ids[index, row, :want], found.top[index, row, :want]
    top = [
        (int(token), float(value))
        for token, value in zip(ids, values, strict=True)
        if np.isfinite(value)  # a vocabulary smaller than the list
    ]
    return TokenLogprobs(float(found.chosen[index, row]), top)
