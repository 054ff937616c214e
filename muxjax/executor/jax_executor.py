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

from muxjax.errors import EngineDead
from muxjax.executor import mesh as meshes
from muxjax.executor.host_memory import keep_freed_memory
from muxjax.executor.mesh import ModelMesh
from muxjax.executor.programs import ModelPrograms, bucket
from muxjax.executor.sampler import Logprobs
from muxjax.executor.slot_state import SlotState
from muxjax.executor.step_functions import StepOutput
from muxjax.executor.step_inputs import Column, mask_words, no_bias, pack_bias, pack_chunk
from muxjax.scheduling.steps import (
    Decode,
    DecodeBatch,
    Prefill,
    PrefillChunk,
    Step,
    StepResult,
    TokenLogprobs,
)

_POISON_BATCH = 64
_ALL = np.uint32(2**32 - 1)
"""A word of a mask that allows all of its tokens."""


class _DefaultInputs:
    """Inputs that ask for nothing, kept on the devices: given where no request of a step asks."""

    def __init__(self, programs: ModelPrograms) -> None:
        buckets, words = programs.buckets, mask_words(programs.vocab_size)
        self.replicas = programs.mesh.replicas

        def put(array: np.ndarray) -> jax.Array:
            return programs.mesh.put(array, meshes.ROWS)

        masks = {
            rows: put(np.full((self.replicas * rows, words), _ALL, np.uint32))
            for rows in {*buckets.decode_seqs, buckets.prefill_seqs}
        }
        self.masks = {rows: mask.shape for rows, mask in masks.items()}
        bias = put(no_bias(self.replicas * buckets.prefill_seqs))
        self._inputs: dict[tuple[str, int], tuple[jax.Array | None, ...]] = {}
        for size in buckets.prefill_tokens:
            targets = put(np.full(self.replicas * size, -1, np.int32))
            self._inputs["prefill", size] = (None, None, targets, bias, masks[buckets.prefill_seqs])
        for size in buckets.decode_seqs:
            self._inputs["decode", size] = (None, masks[size], None)

    def fill(
        self, kind: str, size: int, inputs: Sequence[np.ndarray | None]
    ) -> list[np.ndarray | jax.Array | None]:
        """What a program is called with, where the host gave None too."""
        kept = self._inputs[kind, size]
        return [own if own is not None else at for own, at in zip(inputs, kept, strict=True)]


@dataclass
class ModelSlots:
    """One model's device state, and what the host remembers of its slots.

    Slots are dealt to the model's copies in turn: of slot `s`, copy `s % copies` has it as its own
    slot `s // copies`. A step has the rows of the first copy, then those of the second, and so on.
    """

    programs: ModelPrograms
    state: SlotState
    rows: np.ndarray  # int32, slots of all copies + 1: slot and block table; the last is a dummy's
    known: np.ndarray  # entries of each block table that are filled in
    logprobs: list[int | None]  # alternatives that each slot's request asks for
    nothing: _DefaultInputs

    @property
    def replicas(self) -> int:
        return self.programs.mesh.replicas

    @property
    def dummy(self) -> int:
        """The slot, of each copy, that padding names."""
        return self.programs.buckets.max_seqs


@dataclass(frozen=True)
class _JaxStepHandle:
    step: Step
    emitted: StepOutput
    rows: np.ndarray  # where each chunk or sequence of the step stands
    wanted: list[int | None]  # for each, how many alternatives to report
    starts: list[int]  # where each chunk's tokens begin
    submitted: float


class JaxExecutor:
    """See `muxjax.scheduling.steps.Executor`.

    Args:
      devices: the unit's.
      models: compiled programs by model name, parameters included.
      kv: the pool's shape `[P, rows, 128]` and type on one device.
      dummy_pages: pages at the start that padding is written to.
      poison: test mode: all other pages hold NaN until a step writes them, and `poison` works.
    """

    def __init__(
        self,
        devices: tuple[jax.Device, ...],
        models: Mapping[str, ModelPrograms],
        kv: jax.ShapeDtypeStruct,
        *,
        dummy_pages: int,
        poison: bool = False,
    ) -> None:
        self._mesh = ModelMesh(devices)
        whole = self._mesh.whole(kv, meshes.POOL)
        self._num_pages = kv.shape[0]
        self._kv: jax.Array | None = jnp.zeros(whole.shape, whole.dtype, device=whole.sharding)
        self._poison = None
        if poison:
            self._poison = _compile_poison(self._mesh, kv)
            self.poison(range(dummy_pages, kv.shape[0]))
        self._models = {name: start_model(programs) for name, programs in models.items()}
        self._free_at = 0.0
        if devices[0].platform == "cpu":
            keep_freed_memory()

    def add_model(self, started: ModelSlots) -> None:
        """Takes in a model, from `start_model`, between two steps."""
        self._models[started.programs.name] = started

    def remove_model(self, name: str) -> None:
        """Drops a model's slots, between two steps; none in flight may be of it."""
        del self._models[name]

    @property
    def pool_address(self) -> int:
        """Where the pool lies in memory (of its first shard); it never changes."""
        return self._pool.addressable_shards[0].data.unsafe_buffer_pointer()

    @property
    def _pool(self) -> jax.Array:
        if self._kv is None:
            raise EngineDead("the executor is closed")
        return self._kv

    def submit(self, step: Step) -> _JaxStepHandle:
        """Queues a step; see `Executor.submit`."""
        submitted = time.perf_counter()
        model = self._models[step.model]
        if isinstance(step, Prefill):
            emitted, rows, wanted, starts = self._prefill(model, step)
        else:
            emitted, rows, wanted = self._decode(model, step)
            starts = []
        return _JaxStepHandle(step, emitted, rows, wanted, starts, submitted)

    def launch(
        self, name: str, kind: str, size: int, inputs: Sequence[np.ndarray | None]
    ) -> StepOutput:
        """Queues a program of a model: what every host of a mesh does, in the same order.

        Args:
          name: the model's.
          kind: 'prefill' or 'decode'.
          size: its bucket.
          inputs: of the host, as `ModelPrograms` has them; None for what asks for nothing.
        """
        model = self._models[name]
        programs = model.programs
        program = programs.prefill(size) if kind == "prefill" else programs.decode(size)
        self._kv, model.state, emitted = program(
            programs.parameters, self._pool, model.state, *model.nothing.fill(kind, size, inputs)
        )
        return emitted

    def result(self, handle: _JaxStepHandle) -> StepResult:
        """Waits for a step; see `Executor.result`."""
        tokens = np.asarray(handle.emitted.tokens)  # k S
        ended = time.perf_counter()
        started = max(handle.submitted, self._free_at)
        self._free_at = ended
        rounds = handle.step.num_tokens if isinstance(handle.step, Decode) else 1
        made = tokens[:rounds, handle.rows]
        columns = made.T.tolist()
        if columns and made.min() < 0:  # some made fewer: a sequence that is done stays so
            counts = (made >= 0).sum(axis=0).tolist()
            columns = [column[:count] for column, count in zip(columns, counts, strict=True)]
        logprobs: list[list[TokenLogprobs] | None] = [None] * len(columns)
        if handle.wanted.count(None) < len(columns):
            found = jax.tree.map(np.asarray, handle.emitted.logprobs)
            for at, (row, want) in enumerate(zip(handle.rows.tolist(), handle.wanted, strict=True)):
                if want is not None:
                    logprobs[at] = [
                        _token_logprobs(found, index, row, want)
                        for index in range(len(columns[at]))
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
            batch = np.full(_POISON_BATCH, self._num_pages, np.int32)  # beyond: dropped
            some = pages[start : start + _POISON_BATCH]
            batch[: len(some)] = some
            self._kv = self._poison(self._pool, batch)

    def close(self) -> None:
        """Frees the pool and the slots; parameters are freed with their programs."""
        if self._kv is not None:
            self._kv.delete()
            self._kv = None
        self._models.clear()

    def _prefill(
        self, model: ModelSlots, step: Prefill
    ) -> tuple[StepOutput, np.ndarray, list[int | None], list[int]]:
        programs, replicas = model.programs, model.replicas
        filled = [0] * replicas  # tokens
        for chunk in step.chunks:
            filled[chunk.slot % replicas] += len(chunk.tokens)
        size = bucket(max(filled), programs.buckets.prefill_tokens)
        tokens = np.zeros(replicas * size, np.int32)
        width = Column.BLOCKS + programs.buckets.blocks
        packed = np.zeros((replicas * programs.buckets.prefill_seqs, width), np.int32)
        packed[:, Column.SLOT] = model.dummy
        packed[:, Column.STOP_IDS : Column.BLOCKS] = -1
        slots = np.array([chunk.slot for chunk in step.chunks])
        rows = slots % replicas * programs.buckets.prefill_seqs + _ranks(slots, replicas)
        wanted: list[int | None] = []
        starts: list[int] = []
        ends = [copy * size for copy in range(replicas)]
        for index, chunk in zip(rows.tolist(), step.chunks, strict=True):
            row, copy = packed[index], chunk.slot % replicas
            starts.append(ends[copy])
            ends[copy] += len(chunk.tokens)
            tokens[starts[-1] : ends[copy]] = chunk.tokens
            if chunk.first:
                model.known[chunk.slot] = 0
            if chunk.num_blocks > model.known[chunk.slot]:
                self._fill(model, chunk.slot, chunk.blocks, chunk.num_blocks)
            row[Column.BLOCKS :] = model.rows[chunk.slot, 1:]
            params = chunk.sampling
            if params is not None:
                model.logprobs[chunk.slot] = params.logprobs
            wanted.append(None if params is None else params.logprobs)
            pack_chunk(row, chunk)
            row[Column.SLOT] = chunk.slot // replicas
        masks = [chunk.mask for chunk in step.chunks]
        inputs = (
            tokens,
            packed,
            _targets(step.chunks, starts, len(tokens)),
            _biases(step.chunks, rows, len(packed)),
            _masks(masks, rows, model.nothing.masks[programs.buckets.prefill_seqs]),
        )
        return self.launch(step.model, "prefill", size, inputs), rows, wanted, starts

    def _decode(
        self, model: ModelSlots, step: Decode
    ) -> tuple[StepOutput, np.ndarray, list[int | None]]:
        programs, replicas = model.programs, model.replicas
        batch = DecodeBatch.from_sequences(step.sequences)
        slots = batch.slots
        missing = batch.num_blocks - model.known[slots]
        for index in (missing > 1).nonzero()[0].tolist():
            blocks, count = batch.blocks[index], int(batch.num_blocks[index])
            self._fill(model, int(slots[index]), blocks, count)
        # Nearly all that grow do so by one block.
        one = (missing == 1).nonzero()[0]
        if one.size:
            where, counts = slots[one], batch.num_blocks[one]
            model.rows[where, counts] = [
                batch.blocks[index][count - 1] % self._num_pages
                for index, count in zip(one.tolist(), counts.tolist(), strict=True)
            ]
            model.known[where] = counts
        ranks = _ranks(slots, replicas)
        size = bucket(1 + int(ranks.max()), programs.buckets.decode_seqs)
        rows = slots % replicas * size + ranks
        which = np.full(replicas * size, len(model.known))
        which[rows] = slots
        masks = _masks(batch.masks or (), rows, model.nothing.masks[size])
        inputs = (model.rows[which], masks, np.array(step.num_tokens, np.int32))
        emitted = self.launch(step.model, "decode", size, inputs)
        return emitted, rows, [model.logprobs[slot] for slot in slots.tolist()]

    def _fill(self, model: ModelSlots, slot: int, blocks: Sequence[int], count: int) -> None:
        """Brings a slot's block table up to `count` blocks. Entries beyond may be any page."""
        known = int(model.known[slot])
        # A block of a copy other than the first is named beyond the pool; see `allocator.py`.
        model.rows[slot, 1 + known : 1 + count] = np.array(blocks[known:count]) % self._num_pages
        model.known[slot] = count


def start_model(programs: ModelPrograms) -> ModelSlots:
    """A model's slots, all free. May be called in any thread, while the executor works."""
    mesh, each = programs.mesh, programs.buckets.max_seqs
    slots = mesh.replicas * each
    rows = np.zeros((slots + 1, 1 + programs.buckets.blocks), np.int32)
    rows[:, 0] = np.arange(slots + 1) // mesh.replicas
    created = SlotState.create(each, programs.vocab_size)
    if mesh.replicas > 1:
        created = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * mesh.replicas), created)
    return ModelSlots(
        programs=programs,
        state=jax.tree.map(lambda leaf: mesh.put(leaf, meshes.SLOTS), created),
        rows=rows,
        known=np.zeros(slots, np.int64),
        logprobs=[None] * slots,
        nothing=_DefaultInputs(programs),
    )


def _ranks(slots: np.ndarray, replicas: int) -> np.ndarray:
    """Of each slot, how many before it are of the same copy."""
    if replicas == 1:
        return np.arange(len(slots))
    ranks = np.zeros(len(slots), np.int64)
    for copy in range(replicas):
        own = slots % replicas == copy
        ranks[own] = np.arange(np.count_nonzero(own))
    return ranks


def _compile_poison(mesh: ModelMesh, kv: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    """`(kv, pages [_POISON_BATCH]) -> kv`, with NaN in the pages of every device; donates kv."""

    def fill(kv: jax.Array, pages: jax.Array) -> jax.Array:
        return kv.at[pages].set(jnp.nan, mode="drop")

    ids = mesh.whole(jax.ShapeDtypeStruct((_POISON_BATCH,), jnp.int32), meshes.SAME)
    mapped = mesh.mapped(fill, (meshes.POOL, meshes.SAME), meshes.POOL)
    return jax.jit(mapped, donate_argnums=0).lower(mesh.whole(kv, meshes.POOL), ids).compile()


def _masks(
    masks: Sequence[np.ndarray | None], rows: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray | None:
    """A mask for each row of a step; `rows` are those of `masks`. None where all may be sampled."""
    if all(mask is None for mask in masks):
        return None
    packed = np.full(shape, _ALL, np.uint32)
    for row, mask in zip(rows.tolist(), masks, strict=True):
        if mask is not None:
            packed[row] = mask
    return packed


def _biases(chunks: Sequence[PrefillChunk], rows: np.ndarray, count: int) -> np.ndarray | None:
    if not any(chunk.sampling is not None and chunk.sampling.logit_bias for chunk in chunks):
        return None
    packed = no_bias(count)
    for row, chunk in zip(rows.tolist(), chunks, strict=True):
        if chunk.sampling is not None:
            pack_bias(packed[row], chunk.sampling.logit_bias)
    return packed


def _targets(chunks: Sequence[PrefillChunk], starts: Sequence[int], size: int) -> np.ndarray | None:
    if not any(chunk.following for chunk in chunks):
        return None
    packed = np.full(size, -1, np.int32)
    for start, chunk in zip(starts, chunks, strict=True):
        packed[start : start + len(chunk.following)] = chunk.following
    return packed


def _prompt_logprobs(handle: _JaxStepHandle) -> list[list[TokenLogprobs]]:
    """For each chunk of a prefill, what its `following` have; nothing is read if none has any."""
    assert isinstance(handle.step, Prefill)
    chunks = handle.step.chunks
    if not any(chunk.following for chunk in chunks):
        return []
    found = jax.tree.map(lambda x: np.asarray(x)[None], handle.emitted.prompt)
    return [
        [
            _token_logprobs(found, 0, start + index, chunk.prompt_logprobs)
            for index in range(len(chunk.following))
        ]
        for start, chunk in zip(handle.starts, chunks, strict=True)
    ]


def _token_logprobs(found: Logprobs, index: int, row: int, want: int) -> TokenLogprobs:
    ids, values = found.top_ids[index, row, :want], found.top[index, row, :want]
    top = [
        (int(token), float(value))
        for token, value in zip(ids, values, strict=True)
        if np.isfinite(value)  # a vocabulary smaller than the list
    ]
    return TokenLogprobs(float(found.chosen[index, row]), top)
