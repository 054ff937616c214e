"""A model's slots: their state on the devices, and the host's copy of their block tables.

Slots are distributed over the model's replicas round-robin: replica `s % replicas` has slot `s`, as
its local slot `s // replicas`. A step has the rows of the first replica, then those of the second,
and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.executor import mesh as meshes
from muxjax.executor.programs import ModelPrograms
from muxjax.executor.slot_state import SlotState
from muxjax.executor.step_inputs import empty_bias, mask_words

ALLOW_ALL = np.uint32(2**32 - 1)
"""A word of a mask that allows all of its tokens."""


class DefaultInputs:
    """Default inputs (no mask, bias or prompt log-probabilities), kept on the devices.

    They are reused when no request in a step needs the input.

    Args:
      programs: of the model.

    Attributes:
      mask_shapes: global shape of a mask, by its number of rows on one replica.
    """

    def __init__(self, programs: ModelPrograms) -> None:
        buckets, words = programs.buckets, mask_words(programs.vocab_size)
        replicas = programs.mesh.replicas

        def put(array: np.ndarray) -> jax.Array:
            return programs.mesh.put(array, meshes.ROWS)

        masks = {
            rows: put(np.full((replicas * rows, words), ALLOW_ALL, np.uint32))
            for rows in {*buckets.decode_seqs, buckets.prefill_seqs}
        }
        self.mask_shapes = {rows: mask.shape for rows, mask in masks.items()}
        bias = put(empty_bias(replicas * buckets.prefill_seqs))
        self._inputs: dict[tuple[str, int], tuple[jax.Array | None, ...]] = {}
        for size in buckets.prefill_tokens:
            targets = put(np.full(replicas * size, -1, np.int32))
            self._inputs["prefill", size] = (None, None, targets, bias, masks[buckets.prefill_seqs])
        for size in buckets.decode_seqs:
            self._inputs["decode", size] = (None, masks[size], None)

    def fill(
        self, kind: str, size: int, inputs: Sequence[np.ndarray | None]
    ) -> list[np.ndarray | jax.Array | None]:
        """Returns a program's inputs, with the default for each that is None."""
        defaults = self._inputs[kind, size]
        return [
            given if given is not None else default
            for given, default in zip(inputs, defaults, strict=True)
        ]


@dataclass
class ModelSlots:
    """One model's slots, on the devices and on the host.

    Attributes:
      programs: of the model.
      state: slot state on the devices; donated to, and returned by, every step.
      tables: int32 `[slots + 1, 1 + blocks]`: local slot number and block table of each slot; the
        last row is the dummy slot.
      num_blocks: int64 `[slots]`: number of filled entries of each block table.
      logprobs: for each slot, the alternatives per token to report; None for no logprobs.
      default_inputs: inputs of steps that need no mask, bias or prompt log-probabilities.
    """

    programs: ModelPrograms
    state: SlotState
    tables: np.ndarray
    num_blocks: np.ndarray
    logprobs: list[int | None]
    default_inputs: DefaultInputs

    @property
    def replicas(self) -> int:
        """Number of replicas of the model."""
        return self.programs.mesh.replicas

    @property
    def dummy_slot(self) -> int:
        """Local slot number of padding rows, the same on each replica."""
        return self.programs.buckets.max_seqs

    def fill_table(self, slot: int, blocks: Sequence[int], count: int, num_pages: int) -> None:
        """Extends a slot's block table to `count` blocks; later entries are undefined.

        Args:
          slot: its number over all replicas.
          blocks: first page of each block.
          count: number of blocks.
          num_pages: of the pool on one device. Page numbers of replica `r` start at
            `r * num_pages` (`scheduling.kv_cache.allocator`).
        """
        filled = int(self.num_blocks[slot])
        self.tables[slot, 1 + filled : 1 + count] = np.array(blocks[filled:count]) % num_pages
        self.num_blocks[slot] = count


def allocate_slots(programs: ModelPrograms) -> ModelSlots:
    """Allocates a model's slots, all free. May be called from any thread while steps run."""
    mesh, slots_per_replica = programs.mesh, programs.buckets.max_seqs
    slots = mesh.replicas * slots_per_replica
    tables = np.zeros((slots + 1, 1 + programs.buckets.blocks), np.int32)
    tables[:, 0] = np.arange(slots + 1) // mesh.replicas
    state = SlotState.create(slots_per_replica, programs.vocab_size)
    if mesh.replicas > 1:
        state = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * mesh.replicas), state)
    return ModelSlots(
        programs=programs,
        state=jax.tree.map(lambda leaf: mesh.put(leaf, meshes.SLOTS), state),
        tables=tables,
        num_blocks=np.zeros(slots, np.int64),
        logprobs=[None] * slots,
        default_inputs=DefaultInputs(programs),
    )
