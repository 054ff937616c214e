"""Admission queue of a model: its streams that wait for their first token."""

from __future__ import annotations

import time
from collections import deque

_MAX_DEPARTURES = 32
"""Number of latest departures from which the expected wait is estimated."""
_MAX_WAIT = 60.0
"""Upper bound of the expected wait, in seconds."""


class ModelQueue:
    """Counts the waiting streams of a model and measures how fast they leave."""

    def __init__(self) -> None:
        self.waiting = 0
        self._departures: deque[float] = deque(maxlen=_MAX_DEPARTURES)

    def leave(self, served: bool) -> None:
        """Removes one stream; `served` says whether it got its first token."""
        self.waiting -= 1
        if served:
            self._departures.append(time.monotonic())

    def expected_wait(self) -> float:
        """Expected seconds until the next stream leaves."""
        if len(self._departures) < 2:
            return 1.0
        interval = (time.monotonic() - self._departures[0]) / len(self._departures)
        return min(_MAX_WAIT, interval)
