"""Cached counters of the fleet, for `/metrics` and the live page.

Reading the counters interrupts the engine between two steps. They are therefore read at most once
per `REFRESH_SECONDS`, by one thread for all clients. If an engine hangs, clients get the last
counters with `stale` set, and no second thread waits for it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from muxjax.errors import EngineDead

REFRESH_SECONDS = 0.25
"""Age in seconds at which the counters are read again."""
READ_TIMEOUT = 1.0
"""Maximum wait for an engine, in seconds."""


class StatsCache:
    """The latest counters of a fleet.

    Args:
      read_stats: reads the counters; may block and may raise `EngineDead`.
    """

    def __init__(self, read_stats: Callable[[], Mapping[str, Any]]) -> None:
        self._read_stats = read_stats
        self._pending: Future[Mapping[str, Any]] | None = None
        self._latest: Mapping[str, Any] = {"models": {}}
        self._read_at = 0.0

    async def latest(self) -> dict[str, Any]:
        """Returns the counters, with `stale` and `age_seconds`."""
        if time.monotonic() - self._read_at >= REFRESH_SECONDS:
            if self._pending is None:
                self._pending = self._start_reading()
            pending = self._pending
            waiting = asyncio.wrap_future(pending)
            # Retrieves an error after the timeout; asyncio would log it otherwise.
            waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.wait({waiting}, timeout=READ_TIMEOUT)
            if pending.done() and pending is self._pending:
                self._pending = None
                self._store(pending)
        age = time.monotonic() - self._read_at if self._read_at else None
        stale = age is None or age > REFRESH_SECONDS + READ_TIMEOUT / 2
        return {**self._latest, "stale": stale, "age_seconds": age}

    def _store(self, pending: Future[Mapping[str, Any]]) -> None:
        try:
            self._latest = pending.result()
            self._read_at = time.monotonic()
        except EngineDead:
            pass  # keeps the last counters, which become stale

    def _start_reading(self) -> Future[Mapping[str, Any]]:
        pending: Future[Mapping[str, Any]] = Future()

        def read() -> None:
            try:
                pending.set_result(self._read_stats())
            except Exception as error:  # noqa: BLE001  raised by `_store`
                pending.set_exception(error)

        # A daemon thread, because a hanging engine must not keep the process alive.
        threading.Thread(target=read, name="muxjax-stats", daemon=True).start()
        return pending
