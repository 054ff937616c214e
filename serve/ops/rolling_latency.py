"""How quick each model was in the last minute, for the live page."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from muxjax.serve.access.tracked_stream import Ending

WINDOW = 60.0
"""Seconds."""
_KEPT = 500
"""Most measurements of a kind that are kept for a model."""

Samples = deque[tuple[float, float]]


class RollingLatency:
    """Times to the first token and for each further one, of streams of the last minute.

    An `watched.Observer`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: dict[tuple[str, str], Samples] = {}

    def first(self, model: str, seconds: float, prompt_tokens: int, tokens: int) -> None:
        """See `watched.Observer`."""
        self._add(model, "ttft", seconds)

    def more(self, model: str, seconds: float, tokens: int) -> None:
        """See `watched.Observer`."""

    def ended(self, ending: Ending) -> None:
        """See `watched.Observer`."""
        if ending.tpot is not None:
            self._add(ending.model, "tpot", ending.tpot)

    def latency(self, model: str) -> dict[str, dict[str, float] | None]:
        """Median and 95th percentile in seconds of `ttft` and `tpot`; None without any."""
        return {kind: self._summary(model, kind) for kind in ("ttft", "tpot")}

    def _add(self, model: str, kind: str, seconds: float) -> None:
        samples = self._samples.setdefault((model, kind), deque(maxlen=_KEPT))
        samples.append((self._clock(), seconds))

    def _summary(self, model: str, kind: str) -> dict[str, float] | None:
        since = self._clock() - WINDOW
        values = sorted(value for at, value in self._samples.get((model, kind), ()) if at >= since)
        if not values:
            return None
        return {"p50": _rank(values, 0.5), "p95": _rank(values, 0.95), "count": len(values)}


def _rank(ordered: Sequence[float], part: float) -> float:
    """The nearest-rank percentile."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
