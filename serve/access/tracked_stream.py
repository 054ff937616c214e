"""Streams of the fleet with a queue ticket, timeouts and measurements."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

from muxjax.config.server import ServerConfig
from muxjax.errors import EngineDead, TimedOut
from muxjax.outputs import Delta
from muxjax.serve.access.limits import KeyLimits, Reservation
from muxjax.serve.access.queues import ModelQueue
from muxjax.serve.fleet_protocol import StreamLike


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """Measurements of a stream that has ended.

    Attributes:
      model: name of its model.
      reason: 'stop', 'length', 'abort', 'cancelled', 'timeout' or 'error'.
      prompt_tokens: number of prompt tokens.
      output_tokens: number of generated tokens.
      max_tokens: the requested maximum of output tokens.
      ttft: seconds from admission to the first token; None if there was none.
      seconds: seconds from admission to the end.
    """

    model: str
    reason: str
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    ttft: float | None
    seconds: float

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; None for fewer than two tokens."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.seconds - self.ttft) / (self.output_tokens - 1)


@runtime_checkable
class StreamObserver(Protocol):
    """Receives the events of all streams, on the event loop; it must not block."""

    def on_first_token(self, model: str, seconds: float, prompt_tokens: int, tokens: int) -> None:
        """The first `tokens` tokens arrived, `seconds` after admission."""
        ...

    def on_tokens(self, model: str, seconds: float, tokens: int) -> None:
        """`tokens` more tokens arrived together, `seconds` after the previous ones."""
        ...

    def on_stream_end(self, summary: StreamSummary) -> None:
        """A stream ended."""
        ...


class OpenStreams:
    """The streams that have not ended, with their shared settings, observers and lock.

    Attributes:
      config: timeouts.
      observers: receive the events of every stream.
      lock: guards the queues, the key limits and this set. Streams are opened in several threads.
    """

    def __init__(self, config: ServerConfig, observers: tuple[StreamObserver, ...] = ()) -> None:
        self.config = config
        self.observers = observers
        self.lock = threading.RLock()
        self._streams: set[TrackedStream] = set()

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[TrackedStream]:
        with self.lock:
            return iter(list(self._streams))

    def add(self, stream: TrackedStream) -> None:
        """Adds a stream."""
        with self.lock:
            self._streams.add(stream)

    def discard(self, stream: TrackedStream) -> None:
        """Removes a stream that has ended."""
        with self.lock:
            self._streams.discard(stream)


@dataclass(frozen=True)
class QueueTicket:
    """A stream's place in the queue of its model, and its token reservation.

    Attributes:
      queue: the queue of the model.
      limits: limits of the API key, if there are any.
      reserved: the token reservation in these limits.
      max_output_tokens: number of output tokens in the reservation.
    """

    queue: ModelQueue
    limits: KeyLimits | None
    reserved: Reservation | None
    max_output_tokens: int

    def release(self, output_tokens: int, served: bool) -> None:
        """Leaves the queue and refunds the unused tokens.

        Args:
          output_tokens: number of generated tokens.
          served: whether the stream got its first token, and therefore left the queue already.
        """
        if not served:
            self.queue.leave(served=False)
        if self.limits is not None:
            unused = max(0, self.max_output_tokens - output_tokens)
            self.limits.refund(self.reserved, unused)


class TrackedStream:
    """A stream of the fleet with a queue ticket, timeouts and measurements.

    The ticket is released exactly once: at the last delta, an engine error, a timeout or a
    cancellation.

    Args:
      inner: the stream of the fleet.
      model: name of its model.
      max_tokens: the requested maximum of output tokens.
      ticket: the queue ticket to release.
      open_streams: contains the stream until it ends.
      loop: the server's event loop, on which the timeouts run.
    """

    def __init__(
        self,
        inner: StreamLike,
        model: str,
        max_tokens: int,
        *,
        ticket: QueueTicket,
        open_streams: OpenStreams,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.model = model
        self.output_tokens = 0
        self.ttft: float | None = None
        self._inner = inner
        self._deltas: AsyncIterator[Delta] | None = None
        self._max_tokens = max_tokens
        self._ticket = ticket
        self._open_streams = open_streams
        self._loop = loop
        self._ended = False
        self._admitted = self._last_token = time.monotonic()
        self._timers: list[asyncio.TimerHandle] = []
        open_streams.add(self)
        loop.call_soon_threadsafe(self._start_timers)

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens."""
        return self._inner.num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return self._inner.num_cached_tokens

    def cancel(self) -> None:
        """Cancels the request. Idempotent; does nothing after the end."""
        self._inner.cancel()
        self._release("cancelled")

    def end(self, error: BaseException | None = None) -> None:
        """Ends the stream for its reader with an error or the finish reason 'abort'."""
        self._inner.end(error)

    def __aiter__(self) -> Self:
        if self._deltas is None:
            self._deltas = aiter(self._inner)
        return self

    async def __anext__(self) -> Delta:
        """Returns the next delta.

        Raises:
          TimedOut: the stream exceeded a time limit.
          EngineDead: the engine ended before the request did.
        """
        assert self._deltas is not None, "iterate with `async for`"
        try:
            delta = await anext(self._deltas)
        except TimedOut:
            self._release("timeout")
            raise
        except EngineDead:
            self._release("error")
            raise
        if delta.token_ids:
            self._record_tokens(len(delta.token_ids))
        if delta.finish_reason is not None:
            self._release(delta.finish_reason)
        return delta

    def _record_tokens(self, count: int) -> None:
        now = time.monotonic()
        observers = self._open_streams.observers
        self.output_tokens += count
        if self.ttft is None:
            self.ttft = now - self._admitted
            with self._open_streams.lock:
                self._ticket.queue.leave(served=True)
            for observer in observers:
                observer.on_first_token(self.model, self.ttft, self.num_prompt_tokens, count)
        else:
            for observer in observers:
                observer.on_tokens(self.model, now - self._last_token, count)
        self._last_token = now

    def _start_timers(self) -> None:
        config = self._open_streams.config

        def expire(subject: str, seconds: float) -> None:
            if subject == "the request" or self.ttft is None:
                self.end(TimedOut(f"{subject} exceeded its time limit of {seconds:g} s"))

        limits = {"the request": config.request_timeout, "the first token": config.queue_timeout}
        if not self._ended:
            self._timers = [
                self._loop.call_later(seconds, expire, subject, seconds)
                for subject, seconds in limits.items()
                if seconds is not None
            ]

    def _release(self, reason: str) -> None:
        """Releases the ticket, stops the timers and notifies the observers. Idempotent."""
        with self._open_streams.lock:
            if self._ended:
                return
            self._ended = True
            self._ticket.release(self.output_tokens, served=self.ttft is not None)
            self._open_streams.discard(self)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop_timers)
        summary = StreamSummary(
            model=self.model,
            reason=reason,
            prompt_tokens=self.num_prompt_tokens,
            output_tokens=self.output_tokens,
            max_tokens=self._max_tokens,
            ttft=self.ttft,
            seconds=time.monotonic() - self._admitted,
        )
        for observer in self._open_streams.observers:
            observer.on_stream_end(summary)

    def _stop_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
