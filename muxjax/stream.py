"""One running request as its caller sees it: an iterator of deltas, blocking or asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Self

from muxjax.errors import EngineDead
from muxjax.output import Delta, Output
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
        output: Output,
        cancel: Callable[[int], None],
    ) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = num_prompt_tokens
        self._output = output
        self._cancel = cancel
        self._ready = threading.Condition()
        self._deltas: deque[Delta] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._notify: Callable[[], None] | None = None

    # Called by the engine

    def update(self, update: RequestUpdate) -> bool:
        """See `engine.Sink`."""
        if update.request.error is not None:
            self.failed(update.request.error)
            return True
        delta = self._output.push(update)
        self._put(delta)
        return delta.finish_reason is not None

    def cancelled(self) -> None:
        """See `engine.Sink`."""
        self._put(Delta("", [], None, "cancelled"))

    def failed(self, error: BaseException) -> None:
        """See `engine.Sink`."""
        with self._ready:
            if self._ended:
                return
            self._ended = True
            self._error = error
            self._wake()

    def _put(self, delta: Delta) -> None:
        with self._ready:
            if self._ended:
                return
            self._deltas.append(delta)
            self._ended = delta.finish_reason is not None
            self._wake()

    def _wake(self) -> None:
        self._ready.notify_all()
        if self._notify is not None:
            self._notify()

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
            self._put(Delta("", [], None, "abort"))
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
                while not self._deltas and self._error is None:
                    self._ready.wait()
                delta = self._take()
            if delta is None:
                continue
            yield delta
            if delta.finish_reason is not None:
                return

    def __aiter__(self) -> AsyncIterator[Delta]:
        """As `__iter__`, for the running event loop."""
        return self._async_deltas()

    async def _async_deltas(self) -> AsyncIterator[Delta]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            # A loop that has been closed since has nobody waiting in it.
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.set)

        with self._ready:
            self._notify = notify
            if self._deltas or self._error is not None:
                arrived.set()
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                while True:
                    with self._ready:
                        delta = self._take()
                    if delta is None:
                        break
                    yield delta
                    if delta.finish_reason is not None:
                        return
        finally:
            self._notify = None

    def _take(self) -> Delta | None:
        """The next delta, or None if there is none yet; raises what the engine ended with."""
        if self._deltas:
            return self._deltas.popleft()
        if self._error is not None:
            if isinstance(self._error, EngineDead):
                raise EngineDead(str(self._error)) from self._error
            raise self._error
        return None
