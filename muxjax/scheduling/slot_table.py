"""The running requests of a model as columns, one row per device slot.

A decode of hundreds of sequences is built every few milliseconds. With columns this takes a few
vector operations for any batch; only sequences that need another block are handled one by one.

A row belongs to the request that holds the slot, from the moment its prefix is fully dispatched
until it releases the slot (`Request.bind_row`, `Request.unbind_row`). A row without a request has
`limit == expected == 0`, so that it has no tokens left to generate.
"""

from __future__ import annotations

import numpy as np


class SlotTable:
    """Columns with a row for each slot.

    Args:
      num_slots: `S`, number of device slots.

    Attributes:
      ids: int64 `[S]`, id of the request.
      prompt: int64 `[S]`, tokens of its prompt.
      limit: int64 `[S]`, maximum number of output tokens.
      expected: int64 `[S]`, upper bound of its output tokens once all steps in flight have arrived.
      num_blocks: int64 `[S]`, blocks it holds.
      last_step: int64 `[S]`, number of the last step that contains it.
      constrained: bool `[S]`, whether it has a grammar.
      requests: object `[S]`, the request, or None.
      blocks: object `[S]`, its list of blocks, or None.
    """

    def __init__(self, num_slots: int) -> None:
        columns = np.zeros((6, num_slots), np.int64)
        self.ids, self.prompt, self.limit, self.expected, self.num_blocks, self.last_step = columns
        self.constrained = np.zeros(num_slots, bool)
        self.requests = np.full(num_slots, None, object)
        self.blocks = np.full(num_slots, None, object)
