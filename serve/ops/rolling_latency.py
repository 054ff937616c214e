"""Latency percentiles of each model over the last minute, for the live page."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from muxjax.serve.access.tracked_stream import StreamSummary

WINDOW = 60.0
"""Length of the window in seconds."""
_MAX_SAMPLES = 500
"""Maximum number of samples per model and kind of latency."""

Samples = deque[tuple[float, float]]
"""Pairs of sample time and value, both in seconds."""


class RollingLatency:
    """Time to first token and time per output token of the last minute.

    It observes streams (`StreamObserver`).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: dict[tuple[str, str], Samples] = {}

    def on_first_token(self, model: str, seconds: float, prompt_tokens: int, tokens: int) -> None:
        """See `StreamObserver`."""
        self._add(model, "ttft", seconds)

    def on_tokens(self, model: str, seconds: float, tokens: int) -> None:
        """See `StreamObserver`."""

    def on_stream_end(self, summary: StreamSummary) -> None:
        """See `StreamObserver`."""
        if summary.tpot is not None:
            self._add(summary.model, "tpot", summary.tpot)

    def percentiles(self, model: str) -> dict[str, dict[str, float] | None]:
        """Returns median and 95th percentile of `ttft` and `tpot` in seconds, if sampled."""
        return {kind: self._summarize(model, kind) for kind in ("ttft", "tpot")}

    def _add(self, model: str, kind: str, seconds: float) -> None:
        samples = self._samples.setdefault((model, kind), deque(maxlen=_MAX_SAMPLES))
        samples.append((self._clock(), seconds))

    def _summarize(self, model: str, kind: str) -> dict[str, float] | None:
        since = self._clock() - WINDOW
        samples = self._samples.get((model, kind), ())
        values = sorted(value for sampled_at, value in samples if sampled_at >= since)
        if not values:
            return None
        return {
            "p50": _percentile(values, 0.5),
            "p95": _percentile(values, 0.95),
            "count": len(values),
        }


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    """Nearest-rank percentile."""
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]
