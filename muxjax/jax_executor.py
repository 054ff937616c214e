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
    Prefill,
    PrefillChunk,
    Step,
    StepResult,
    TokenLogprobs,
)
from muxjax.step_inputs import Column, mask_words, no_bias, pack_bias, pack_chunk
from muxjax.steps import Emitted

_POISON_BATCH = 64
_ALL = np.uint32(2**32 - 1)
"""A word of a mask that allows all of its tokens."""


class _Nothing:
    """Inputs that ask for nothing, kept on the device: given where no request of a step asks."""

    def __init__(self, programs: ModelPrograms) -> None:
        buckets, words = programs.buckets, mask_words(programs.vocab_size)
        sizes = {*buckets.decode_seqs, buckets.prefill_seqs}
        self.masks = {rows: jnp.full((rows, words), _ALL, jnp.uint32) for rows in sizes}
        self.targets = {size: jnp.full(size, -1, jnp.int32) for size in buckets.prefill_tokens}
        self.bias = jnp.asarray(no_bias(buckets.prefill_seqs))


@dataclass
class _Model:
    """One model's device state, and what the host remembers of its slots."""

    programs: ModelPrograms
    state: SlotState
    tables: np.ndarray  # max_seqs + 1, blocks: the last row is the dummy's
    known: list[int]  # entries of each table that are filled in
    logprobs: list[int | None]  # alternatives that each slot's request asks for
    nothing: _Nothing

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
        return _Model(
            programs=programs,
            state=SlotState.create(slots, programs.vocab_size),
            tables=np.zeros((slots + 1, programs.buckets.blocks), np.int32),
            known=[0] * slots,
            logprobs=[None] * slots,
            nothing=_Nothing(programs),
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
        columns = [[int(t) for t in tokens[:, row] if t >= 0] for row in range(rows)]
        logprobs: list[list[TokenLogprobs] | None] = [None] * rows
        if any(want is not None for want in handle.wanted):
            found = jax.tree.map(np.asarray, handle.emitted.logprobs)
            for row, want in enumerate(handle.wanted):
                if want is not None:
                    logprobs[row] = [
                        _token_logprobs(found, index, row, want)
                        for index in range(len(columns[row]))
                    ]
        prompt = _prompt_logprobs(handle) if isinstance(handle.step, Prefill) else ()
        return StepResult(columns, logprobs, started, ended - started, prompt)

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
            row[Column.BLOCKS :] = _table(model, chunk.slot, chunk.blocks, chunk.num_blocks)
            params = chunk.sampling
            if params is not None:
                model.logprobs[chunk.slot] = params.logprobs
            wanted.append(None if params is None else params.logprobs)
            pack_chunk(row, chunk)
        nothing = model.nothing
        self._kv, model.state, emitted = programs.prefill(size)(
            programs.parameters,
            self._pool,
            model.state,
            tokens,
            packed,
            _targets(step.chunks, size, nothing),
            _biases(step.chunks, len(packed), nothing),
            _masks([chunk.mask for chunk in step.chunks], len(packed), nothing),
        )
        return emitted, wanted

    def _decode(self, model: _Model, step: Decode) -> tuple[Emitted, list[int | None]]:
        programs = model.programs
        size = bucket(len(step.sequences), programs.buckets.decode_seqs)
        packed = np.zeros((size, 1 + programs.buckets.blocks), np.int32)
        packed[:, 0] = model.dummy
        for row, sequence in zip(packed, step.sequences, strict=False):
            row[0] = sequence.slot
            row[1:] = _table(model, sequence.slot, sequence.blocks, sequence.num_blocks)
        self._kv, model.state, emitted = programs.decode(size)(
            programs.parameters,
            self._pool,
            model.state,
            packed,
            _masks([sequence.mask for sequence in step.sequences], size, model.nothing),
            np.int32(step.num_tokens),
        )
        return emitted, [model.logprobs[sequence.slot] for sequence in step.sequences]


def _table(model: _Model, slot: int, blocks: Sequence[int], count: int) -> np.ndarray:
    """A slot's block table with the step's blocks in it. Entries beyond may be any page."""
    table, known = model.tables[slot], model.known[slot]
    if count > known:
        table[known:count] = blocks[known:count]
        model.known[slot] = count
    return table


def _masks(masks: list[np.ndarray | None], rows: int, nothing: _Nothing) -> np.ndarray | jax.Array:
    """A mask for each row of a step."""
    if all(mask is None for mask in masks):
        return nothing.masks[rows]
    packed = np.full(nothing.masks[rows].shape, _ALL, np.uint32)
    for row, mask in zip(packed, masks, strict=False):
        if mask is not None:
            row[:] = mask
    return packed


def _biases(chunks: Sequence[PrefillChunk], rows: int, nothing: _Nothing) -> np.ndarray | jax.Array:
    if not any(chunk.sampling is not None and chunk.sampling.logit_bias for chunk in chunks):
        return nothing.bias
    packed = no_bias(rows)
    for row, chunk in zip(packed, chunks, strict=False):
        if chunk.sampling is not None:
            pack_bias(row, chunk.sampling.logit_bias)
    return packed


def _targets(
    chunks: Sequence[PrefillChunk], size: int, nothing: _Nothing
) -> np.ndarray | jax.Array:
    if not any(chunk.following for chunk in chunks):
        return nothing.targets[size]
    packed = np.full(size, -1, np.int32)
    at = 0
    for chunk in chunks:
        packed[at : at + len(chunk.following)] = chunk.following
        at += len(chunk.tokens)
    return packed


def _prompt_logprobs(handle: _Handle) -> list[list[TokenLogprobs]]:
    """For each chunk of a prefill, what its `following` have; nothing is read if none has any."""
    assert isinstance(handle.step, Prefill)
    chunks = handle.step.chunks
    if not any(chunk.following for chunk in chunks):
        return []
    found = jax.tree.map(lambda x: np.asarray(x)[None], handle.emitted.prompt)
    all_found: list[list[TokenLogprobs]] = []
    at = 0
    for chunk in chunks:
        all_found.append(
            [
                _token_logprobs(found, 0, at + index, chunk.prompt_logprobs)
                for index in range(len(chunk.following))
            ]
        )
        at += len(chunk.tokens)
    return all_found


def _token_logprobs(found: Logprobs, index: int, row: int, want: int) -> TokenLogprobs:
    ids, values = found.top_ids[index, row, :want], found.top[index, row, :want]
    top = [
        (int(token), float(value))
        for token, value in zip(ids, values, strict=True)
        if np.isfinite(value)  # a vocabulary smaller than the list
    ]
    return TokenLogprobs(float(found.chosen[index, row]), top)
