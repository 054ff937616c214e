"""Blocks of running sequences, as vector operations on the columns of a `SlotTable`."""

from __future__ import annotations

from itertools import islice

import numpy as np

from muxjax.scheduling.slot_table import SlotTable


def plan_growth(
    table: SlotTable, slots: np.ndarray, num_tokens: int, tokens_per_block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes the blocks that sequences need for their next tokens.

    The last generated token of a sequence is not in the pool yet: the next step writes it first.

    Args:
      table: the sequences of a model.
      slots: int64 `[S]`, slots of the sequences.
      num_tokens: number of tokens for each sequence, unless its limit is lower.
      tokens_per_block: tokens that a block holds.

    Returns:
      int64 `[S]`, tokens of each sequence; int64 `[S]`, blocks that it then needs; indices of the
      sequences that have too few blocks.
    """
    expected = table.expected[slots]
    counts = np.minimum(table.limit[slots] - expected, num_tokens)
    blocks = (table.prompt[slots] + expected + counts + (tokens_per_block - 2)) // tokens_per_block
    return counts, blocks, (blocks > table.num_blocks[slots]).nonzero()[0]


def append_blocks(
    table: SlotTable, slots: np.ndarray, counts: np.ndarray, blocks: list[int]
) -> None:
    """Appends blocks to sequences.

    Args:
      table: the sequences of a model.
      slots: int64 `[S]`, slots of the sequences.
      counts: int64 `[S]`, number of blocks for each sequence.
      blocks: new blocks, as many as the sum of `counts`.
    """
    if len(blocks) == slots.size:  # one for each sequence, the usual case
        for held, block in zip(table.blocks[slots].tolist(), blocks, strict=True):
            held.append(block)
    else:
        remaining = iter(blocks)
        for held, count in zip(table.blocks[slots].tolist(), counts.tolist(), strict=True):
            held.extend(islice(remaining, count))
    table.num_blocks[slots] += counts
