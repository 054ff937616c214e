"""Packs a scheduled step into the input arrays of its program.

Rows are grouped by replica, in order, and each group is padded to the bucket (`model_slots`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from muxjax.executor.model_slots import ALLOW_ALL, ModelSlots
from muxjax.executor.programs import bucket
from muxjax.executor.step_inputs import Column, empty_bias, pack_bias, pack_chunk
from muxjax.scheduling.steps import Decode, DecodeBatch, Prefill, PrefillChunk


class PackedStep(NamedTuple):
    """The inputs of a program, and where its outputs are.

    Attributes:
      kind: 'prefill' or 'decode'.
      size: the program's bucket.
      inputs: as `ModelPrograms.prefill` or `decode` takes them; None for a default input.
      rows: for each chunk or sequence of the step, its row of the output.
      logprobs: for each chunk or sequence, the alternatives per token to report; None for no
        logprobs.
      starts: for each chunk of a prefill, the index of its first token; empty for a decode.
    """

    kind: str
    size: int
    inputs: tuple[np.ndarray | None, ...]
    rows: np.ndarray
    logprobs: list[int | None]
    starts: list[int]


def pack_prefill(model: ModelSlots, step: Prefill, num_pages: int) -> PackedStep:
    """Packs a prefill, and fills the block tables of its slots.

    Args:
      model: the step's model.
      step: the prefill.
      num_pages: of the pool on one device.
    """
    buckets, replicas = model.programs.buckets, model.replicas
    num_tokens = [0] * replicas
    for chunk in step.chunks:
        num_tokens[chunk.slot % replicas] += len(chunk.tokens)
    size = bucket(max(num_tokens), buckets.prefill_tokens)
    tokens = np.zeros(replicas * size, np.int32)
    packed = np.zeros((replicas * buckets.prefill_seqs, Column.BLOCKS + buckets.blocks), np.int32)
    packed[:, Column.SLOT] = model.dummy_slot
    packed[:, Column.STOP_IDS : Column.BLOCKS] = -1
    slots = np.array([chunk.slot for chunk in step.chunks])
    rows = slots % replicas * buckets.prefill_seqs + _ranks(slots, replicas)
    logprobs: list[int | None] = []
    starts: list[int] = []
    ends = [replica * size for replica in range(replicas)]
    for index, chunk in zip(rows.tolist(), step.chunks, strict=True):
        row, replica = packed[index], chunk.slot % replicas
        starts.append(ends[replica])
        ends[replica] += len(chunk.tokens)
        tokens[starts[-1] : ends[replica]] = chunk.tokens
        if chunk.first:
            model.num_blocks[chunk.slot] = 0
        if chunk.num_blocks > model.num_blocks[chunk.slot]:
            model.fill_table(chunk.slot, chunk.blocks, chunk.num_blocks, num_pages)
        row[Column.BLOCKS :] = model.tables[chunk.slot, 1:]
        params = chunk.sampling
        if params is not None:
            model.logprobs[chunk.slot] = params.logprobs
        logprobs.append(None if params is None else params.logprobs)
        pack_chunk(row, chunk)
        row[Column.SLOT] = chunk.slot // replicas
    mask_shape = model.default_inputs.mask_shapes[buckets.prefill_seqs]
    inputs = (
        tokens,
        packed,
        _pack_targets(step.chunks, starts, len(tokens)),
        _pack_biases(step.chunks, rows, len(packed)),
        _pack_masks([chunk.mask for chunk in step.chunks], rows, mask_shape),
    )
    return PackedStep("prefill", size, inputs, rows, logprobs, starts)


def pack_decode(model: ModelSlots, step: Decode, num_pages: int) -> PackedStep:
    """Packs a decode, and extends the block tables of its slots.

    Args:
      model: the step's model.
      step: the decode.
      num_pages: of the pool on one device.
    """
    replicas = model.replicas
    batch = DecodeBatch.from_sequences(step.sequences)
    slots = batch.slots
    missing = batch.num_blocks - model.num_blocks[slots]
    for index in (missing > 1).nonzero()[0].tolist():
        blocks, count = batch.blocks[index], int(batch.num_blocks[index])
        model.fill_table(int(slots[index]), blocks, count, num_pages)
    # Sequences that grow by one block, which is the usual case, are filled in one operation.
    grown = (missing == 1).nonzero()[0]
    if grown.size:
        grown_slots, counts = slots[grown], batch.num_blocks[grown]
        model.tables[grown_slots, counts] = [
            batch.blocks[index][count - 1] % num_pages
            for index, count in zip(grown.tolist(), counts.tolist(), strict=True)
        ]
        model.num_blocks[grown_slots] = counts
    ranks = _ranks(slots, replicas)
    size = bucket(1 + int(ranks.max()), model.programs.buckets.decode_seqs)
    rows = slots % replicas * size + ranks
    row_slots = np.full(replicas * size, len(model.num_blocks))  # padding: the dummy slot
    row_slots[rows] = slots
    masks = _pack_masks(batch.masks or (), rows, model.default_inputs.mask_shapes[size])
    inputs = (model.tables[row_slots], masks, np.array(step.num_tokens, np.int32))
    return PackedStep(
        "decode", size, inputs, rows, [model.logprobs[slot] for slot in slots.tolist()], []
    )


def _ranks(slots: np.ndarray, replicas: int) -> np.ndarray:
    """Returns, for each slot, the number of earlier slots of the same replica."""
    if replicas == 1:
        return np.arange(len(slots))
    ranks = np.zeros(len(slots), np.int64)
    for replica in range(replicas):
        same = slots % replicas == replica
        ranks[same] = np.arange(np.count_nonzero(same))
    return ranks


def _pack_masks(
    masks: Sequence[np.ndarray | None], rows: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray | None:
    """Returns a mask for each row of a step; None if all tokens are allowed in all rows."""
    if all(mask is None for mask in masks):
        return None
    packed = np.full(shape, ALLOW_ALL, np.uint32)
    for row, mask in zip(rows.tolist(), masks, strict=True):
        if mask is not None:
            packed[row] = mask
    return packed


def _pack_biases(
    chunks: Sequence[PrefillChunk], rows: np.ndarray, num_rows: int
) -> np.ndarray | None:
    """Returns the logit biases of each row; None if no chunk has any."""
    if not any(chunk.sampling is not None and chunk.sampling.logit_bias for chunk in chunks):
        return None
    packed = empty_bias(num_rows)
    for row, chunk in zip(rows.tolist(), chunks, strict=True):
        if chunk.sampling is not None:
            pack_bias(packed[row], chunk.sampling.logit_bias)
    return packed


def _pack_targets(
    chunks: Sequence[PrefillChunk], starts: Sequence[int], size: int
) -> np.ndarray | None:
    """Returns the next prompt token of each token; None if no prompt log-probability is needed."""
    if not any(chunk.following for chunk in chunks):
        return None
    packed = np.full(size, -1, np.int32)
    for start, chunk in zip(starts, chunks, strict=True):
        packed[start : start + len(chunk.following)] = chunk.following
    return packed
