"""What a request's next token may be, as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

import numpy as np


@runtime_checkable
class Constraint(Protocol):
    """The state of one output that must follow a grammar; kept on the host.

    It follows the tokens that the host has read, so it outlives a preemption.
    """

    @property
    def mask(self) -> np.ndarray:
        """The tokens that may come next, uint32 `[W]`: token `t` is bit `t % 32` of word `t // 32`.
        Replaced by `advance`, never changed.
        """
        ...

    def advance(self, token: int) -> bool:
        """Takes the next token, one of `mask`; True if the output is complete with it.

        Raises:
          InvalidRequest: the grammar cannot be followed any further.
        """
        ...

    def anew(self, tokens: Sequence[int]) -> Self:
        """Another one for the same grammar, as it is after these tokens; for a request that goes on
        elsewhere.
        """
        ...
