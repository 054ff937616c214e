"""One running request as its caller sees it: an iterator of deltas, blocking or asynchronous.

The engine's thread only queues what a step gave. Its text is made by whoever reads the stream, in
the reader's thread, so that the engine need not wait for it; only where stop strings may end the
request does the engine make the text itself.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Self

from muxjax.engine.detokenizer import Delta, Detokenizer
from muxjax.engine.loop_waker import LoopWaker
from muxjax.errors import EngineDead
from muxjax.scheduling.requests import RequestUpdate


class Stream:
    """The deltas of one request, in order; made by `Fleet.open_stream`.

    Iterate it once, with `for` or `async for`. Leaving it early does not end the request: `cancel`
    does, and so does `with stream:`.

    Args:
      request_id: of the request.
      num_prompt_tokens: length of its prompt.
      output: makes its text.
      cancel: tells the engine that the request is not wanted any more.
    """

    def __init__(
        self,
        request_id: int,
        num_prompt_tokens: int,
        output: Detokenizer,
        cancel: Callable[[int], None],
    ) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = num_prompt_tokens
        self._output = output
        self._may_stop = output.may_stop
        self._cancel = cancel
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._queue: deque[RequestUpdate | Delta] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._blocked = 0  # threads that wait
        self._wake: Callable[[], None] | None = None  # wakes the task that waits

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that the prefix cache had; 0 until the first delta has been read."""
        return self._output.cached_tokens

    # Called by the engine

    def update(self, update: RequestUpdate) -> bool:
        """See `engine.Sink`."""
        if update.request.error is not None:
            self.failed(update.request.error)
            return True
        if not self._may_stop:
            with self._lock:  # as `_put`, which would cost a call more for every sequence
                if self._ended:
                    return False
                self._queue.append(update)
                if update.finish_reason is not None:
                    self._ended = True
                if self._blocked or self._wake is not None:
                    self._notify()
            return False
        delta = self._output.push(update)
        ended = delta.finish_reason is not None
        self._put(delta, ended)
        return ended

    def cancelled(self) -> None:
        """See `engine.Sink`."""
        self._put(Delta("", [], None, "cancelled"), True)

    def failed(self, error: BaseException) -> None:
        """See `engine.Sink`."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._error = error
            self._notify()

    def _put(self, item: RequestUpdate | Delta, ended: bool) -> None:
        with self._lock:
            if self._ended:
                return
            self._queue.append(item)
            self._ended = ended
            if self._blocked or self._wake is not None:
                self._notify()

    def _notify(self) -> None:
        if self._blocked:
            self._ready.notify_all()
        if self._wake is not None:
            self._wake()
            self._wake = None

    # Called by the caller

    def cancel(self) -> None:
        """Ends the request and frees its pages; does nothing if it has ended. From any thread."""
        if not self._ended:
            self._cancel(self.request_id)

    def end(self, error: BaseException | None = None) -> None:
        """Ends the request for its reader at once, even if the engine hangs. From any thread.

        Args:
          error: raised to the reader after what has been made; without one, the last delta's
            reason is 'abort'.
        """
        self.cancel()
        if error is None:
            self._put(Delta("", [], None, "abort"), True)
        else:
            self.failed(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Delta]:
        """Waits for each delta.

        Raises:
          EngineDead: the engine ended before the request did.
        """
        while True:
            with self._ready:
                self._blocked += 1
                try:
                    self._ready.wait_for(lambda: self._queue or self._error is not None)
                finally:
                    self._blocked -= 1
                item = self._take()
            delta = self._delta(item)
            yield delta
            if delta.finish_reason is not None:
                return

    def __aiter__(self) -> AsyncIterator[Delta]:
        """As `__iter__`, for the running event loop."""
        return self._async_deltas()

    async def _async_deltas(self) -> AsyncIterator[Delta]:
        waker, arrived = LoopWaker.of(asyncio.get_running_loop()), asyncio.Event()
        try:
            while True:
                with self._lock:
                    waits = not self._queue and self._error is None
                    if waits:
                        arrived.clear()
                        self._wake = lambda: waker.wake(arrived)
                    else:
                        item = self._take()
                if waits:
                    await arrived.wait()
                    continue
                delta = self._delta(item)
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._wake = None

    def _take(self) -> RequestUpdate | Delta:
        """What was queued first; raises what the engine ended with if there is nothing."""
        if self._queue:
            return self._queue.popleft()
        if self._error is None:
            raise AssertionError("nothing has arrived yet")
        if isinstance(self._error, EngineDead):
            raise EngineDead(str(self._error)) from self._error
        raise self._error

    def _delta(self, item: RequestUpdate | Delta) -> Delta:
        return item if isinstance(item, Delta) else self._output.push(item)
