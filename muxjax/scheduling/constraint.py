"""Constraints on a request's next token, as the scheduler sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

import numpy as np


@runtime_checkable
class Constraint(Protocol):
    """Grammar state of one output, kept on the host.

    It is advanced by the tokens that the host has read, so it survives a preemption.
    """

    @property
    def mask(self) -> np.ndarray:
        """Tokens allowed next, uint32 `[W]`: token `t` is bit `t % 32` of word `t // 32`.

        `advance` replaces the array and never changes it in place.
        """
        ...

    def advance(self, token: int) -> bool:
        """Advances by the next token, which `mask` allows; True if the output is complete.

        Raises:
          InvalidRequest: the grammar allows no further token.
        """
        ...

    def replay(self, tokens: Sequence[int]) -> Self:
        """Returns a new state of the grammar after these tokens, to continue on another unit."""
        ...
