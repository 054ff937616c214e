"""The running requests of a model as columns, one row a device slot.

A decode is made for hundreds of sequences every few milliseconds. What it needs of each stands here
in arrays, so that making one takes the same few vector operations whatever the batch; only
sequences that need another block are looked at one by one.

A row belongs to the request that holds the slot, from the moment when its prefix is dispatched
until it gives the slot back (`Request.take_row`, `Request.leave_row`). The row of a slot that
nobody decodes in has nothing left to make.
"""

from __future__ import annotations

import numpy as np


class SlotTable:
    """Columns with a row for each slot.

    Attributes:
      ids: the request's id.
      prompt: tokens of its prompt.
      limit: the most tokens it makes.
      made: output tokens that there will be once all steps in flight have arrived, at most.
      num_blocks: blocks it holds.
      last_step: the number of the last step that it is in.
      constrained: whether it must follow a grammar.
      requests: the request itself.
      blocks: its list of blocks.
    """

    def __init__(self, num_slots: int) -> None:
        columns = np.zeros((6, num_slots), np.int64)
        self.ids, self.prompt, self.limit, self.made, self.num_blocks, self.last_step = columns
        self.constrained = np.zeros(num_slots, bool)
        self.requests = np.full(num_slots, None, object)
        self.blocks = np.full(num_slots, None, object)
