"""Wakes tasks of an event loop from another thread, many tasks with one call.

`loop.call_soon_threadsafe` costs microseconds and a system call. After a step the engine wakes
hundreds of streams, most of which are read in the same loop. One call covers all streams that are
woken before the loop runs it.
"""

from __future__ import annotations

import asyncio
import threading
from weakref import WeakKeyDictionary, ref

_wakers: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWaker] = WeakKeyDictionary()
_lock = threading.Lock()


class LoopWaker:
    """Sets events of one loop; `wake` may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._lock = threading.Lock()
        self._events: list[asyncio.Event] = []

    @classmethod
    def for_loop(cls, loop: asyncio.AbstractEventLoop) -> LoopWaker:
        """The waker that all streams of a loop share."""
        with _lock:
            return _wakers.setdefault(loop, cls(loop))

    def wake(self, event: asyncio.Event) -> None:
        """Sets an event of the loop soon; does nothing if the loop is closed."""
        with self._lock:
            self._events.append(event)
            if len(self._events) > 1:
                return
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._set_events)
        except RuntimeError:
            # The loop is closed, so no task waits in it.
            with self._lock:
                self._events.clear()

    def _set_events(self) -> None:
        with self._lock:
            events, self._events = self._events, []
        for event in events:
            event.set()
