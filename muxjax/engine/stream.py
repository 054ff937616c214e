"""The output of one running request: the engine's thread writes it, one thread or task reads it.

The engine's thread only queues the updates of its steps. The reader turns them into text, in its
own thread, so that the engine does not wait for detokenization. Only a request with stop strings is
detokenized in the engine's thread, because its text may end the request.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Self

from muxjax.engine.detokenizer import Detokenizer
from muxjax.engine.loop_waker import LoopWaker
from muxjax.errors import EngineDead
from muxjax.outputs import Delta
from muxjax.scheduling.requests import RequestUpdate


class StreamSink:
    """The engine's end of a stream: an `engine.Sink` that queues updates for the reader.

    Args:
      detokenizer: of the request; used here only if stop strings may end the request.

    Attributes:
      queue: unread updates and deltas. The reader may pop from it without the lock.
      ended: whether the last delta or an error has been queued.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self.queue: deque[RequestUpdate | Delta] = deque()
        self.ended = False
        self._detokenizer = detokenizer
        self._may_stop = detokenizer.may_stop
        self._abandoned = False
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._error: BaseException | None = None
        self._waiting_threads = 0
        self._wake_task: Callable[[], None] | None = None

    # Called in the engine's thread

    def update(self, update: RequestUpdate) -> bool:
        """See `engine.Sink`."""
        if update.request.error is not None:
            self.failed(update.request.error)
            return True
        if not self._may_stop:
            with self._lock:  # `put`, inlined: this runs for every sequence of every step
                if self.ended:
                    return self._abandoned
                self.queue.append(update)
                if update.finish_reason is not None:
                    self.ended = True
                if self._waiting_threads or self._wake_task is not None:
                    self._notify()
            return False
        delta = self._detokenizer.push(update)
        self.put(delta)
        return self._abandoned or delta.finish_reason is not None

    def cancelled(self) -> None:
        """See `engine.Sink`."""
        self.put(Delta("", [], None, "cancelled"))

    def failed(self, error: BaseException) -> None:
        """See `engine.Sink`."""
        with self._lock:
            if self.ended:
                return
            self.ended = True
            self._error = error
            self._notify()

    # Called by the reader

    def put(self, delta: Delta) -> None:
        """Queues a delta, unless the stream has ended."""
        with self._lock:
            if self.ended:
                return
            self.queue.append(delta)
            self.ended = delta.finish_reason is not None
            if self._waiting_threads or self._wake_task is not None:
                self._notify()

    def abandon(self) -> None:
        """Ends the request at its next update, because it has no reader.

        Takes no lock: the garbage collector may call it in any thread.
        """
        self._abandoned = True
        self.ended = True

    def pop_blocking(self) -> RequestUpdate | Delta:
        """Waits for the next item and removes it.

        Raises:
          BaseException: the error that the request has ended with.
        """
        with self._arrived:
            self._waiting_threads += 1
            try:
                self._arrived.wait_for(lambda: self.queue or self._error is not None)
            finally:
                self._waiting_threads -= 1
            return self._pop()

    def pop_or_wake(self, wake: Callable[[], None]) -> RequestUpdate | Delta | None:
        """Removes the next item; None if there is none yet.

        Args:
          wake: if None is returned, called once, in the engine's thread, when an item or an error
            arrives.

        Raises:
          BaseException: the error that the request has ended with.
        """
        with self._lock:
            if self.queue or self._error is not None:
                return self._pop()
            self._wake_task = wake
            return None

    def _pop(self) -> RequestUpdate | Delta:
        if self.queue:
            return self.queue.popleft()
        assert self._error is not None, "the caller has waited for an item or an error"
        if isinstance(self._error, EngineDead):
            # One error ends many requests: each reader raises a copy with a separate traceback.
            raise EngineDead(str(self._error)) from self._error
        raise self._error

    def _notify(self) -> None:
        if self._waiting_threads:
            self._arrived.notify_all()
        if self._wake_task is not None:
            self._wake_task()
            self._wake_task = None


class Stream(Iterator[Delta], AsyncIterator[Delta]):
    """Iterator over the deltas of one request, for `for` and for `async for`.

    `cancel`, `close` and the end of a `with` block end the request at once. A stream that is
    garbage-collected before its end, for example after a `break`, ends its request at the next
    token.

    Args:
      request_id: of the request.
      prompt_token_ids: of the request.
      detokenizer: of the request.
      cancel: called with the request's id to end the request.

    Attributes:
      request_id: of the request.
      prompt_token_ids: tokens of the prompt.
      sink: where the engine writes the updates of the request.
    """

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: Sequence[int],
        detokenizer: Detokenizer,
        cancel: Callable[[int], None],
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.sink = StreamSink(detokenizer)
        self._detokenizer = detokenizer
        self._cancel = cancel
        self._exhausted = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens read from the prefix cache; 0 until the first delta was read."""
        return self._detokenizer.cached_tokens

    def cancel(self) -> None:
        """Ends the request and frees its pages; does nothing if it has ended. From any thread."""
        if not self.sink.ended:
            self._cancel(self.request_id)

    close = cancel

    def end(self, error: BaseException | None = None) -> None:
        """Ends the request for its reader at once, even if the engine hangs. From any thread.

        Args:
          error: raised to the reader after the deltas queued so far; without one, the last delta
            has the finish reason 'abort'.
        """
        has_ended = self.sink.ended
        # Before `_cancel`: the engine may report the cancellation before this method returns.
        if error is None:
            self.sink.put(Delta("", [], None, "abort"))
        else:
            self.sink.failed(error)
        if not has_ended:
            self._cancel(self.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        if not self.sink.ended:
            self.sink.abandon()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        """Waits for the next delta.

        Raises:
          EngineDead: the engine ended before the request did.
        """
        if self._exhausted:
            raise StopIteration
        queue = self.sink.queue
        return self._delta(queue.popleft() if queue else self.sink.pop_blocking())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """As `__next__`, for the running event loop."""
        if self._exhausted:
            raise StopAsyncIteration
        queue = self.sink.queue
        if queue:
            return self._delta(queue.popleft())
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._event = asyncio.Event()
            self._wake = functools.partial(LoopWaker.for_loop(loop).wake, self._event)
        while True:
            self._event.clear()
            item = self.sink.pop_or_wake(self._wake)
            if item is not None:
                return self._delta(item)
            await self._event.wait()

    def _delta(self, item: RequestUpdate | Delta) -> Delta:
        delta = item if isinstance(item, Delta) else self._detokenizer.push(item)
        if delta.finish_reason is not None:
            self._exhausted = True
        return delta
