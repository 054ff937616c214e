"""The fleet's counters for `/metrics` and the live page, read seldom and never waited for long.

Asking the fleet means a word with the engine between two steps. One thread does it, at most every
`PERIOD` seconds however many ask; when an engine hangs, the others get the counters as they were
last, marked `stale`, and no second thread is spent on it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from muxjax.errors import EngineDead

PERIOD = 0.25
"""Seconds for which counters count as new."""
PATIENCE = 1.0
"""Seconds to wait for an engine."""


class StatsCache:
    """The counters of a fleet.

    Args:
      read: gives them; may block, and raise `EngineDead`.
    """

    def __init__(self, read: Callable[[], Mapping[str, Any]]) -> None:
        self._read = read
        self._asked: Future[Mapping[str, Any]] | None = None
        self._latest: Mapping[str, Any] = {"models": {}}
        self._at = 0.0

    async def latest(self) -> dict[str, Any]:
        """The counters, with `stale` and `age_seconds`."""
        if time.monotonic() - self._at >= PERIOD:
            if self._asked is None:
                self._asked = self._start()
            asked = self._asked
            waiting = asyncio.wrap_future(asked)
            waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.wait({waiting}, timeout=PATIENCE)
            if asked.done() and asked is self._asked:
                self._asked = None
                self._take(asked)
        age = time.monotonic() - self._at if self._at else None
        stale = age is None or age > PERIOD + PATIENCE / 2
        return {**self._latest, "stale": stale, "age_seconds": age}

    def _take(self, asked: Future[Mapping[str, Any]]) -> None:
        try:
            self._latest = asked.result()
            self._at = time.monotonic()
        except EngineDead:
            pass  # The last counters stay, and grow stale.

    def _start(self) -> Future[Mapping[str, Any]]:
        asked: Future[Mapping[str, Any]] = Future()

        def ask() -> None:
            try:
                asked.set_result(self._read())
            except Exception as error:  # noqa: BLE001  handed on to `_take`
                asked.set_exception(error)

        # A daemon: one that waits for an engine that hangs must not keep the process alive.
        threading.Thread(target=ask, name="muxjax-stats", daemon=True).start()
        return asked
