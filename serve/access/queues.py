"""The line of a model: streams that wait for their first token."""

from __future__ import annotations

import time
from collections import deque

_RECENT = 32
"""First tokens that the speed of a queue is estimated from."""
_LONGEST_WAIT = 60.0


class ModelQueue:
    """The streams of a model that wait for their first token, and how fast they get it."""

    def __init__(self) -> None:
        self.waiting = 0
        self._left: deque[float] = deque(maxlen=_RECENT)

    def leave(self, served: bool) -> None:
        """One waits no longer; `served` if it got its first token."""
        self.waiting -= 1
        if served:
            self._left.append(time.monotonic())

    def expected_wait(self) -> float:
        """Seconds until one more has left."""
        if len(self._left) < 2:
            return 1.0
        each = (time.monotonic() - self._left[0]) / len(self._left)
        return min(_LONGEST_WAIT, each)
