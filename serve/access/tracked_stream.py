"""One stream of the fleet as the server follows it: its place, its time limits, its measures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from muxjax.config.server import ServerConfig
from muxjax.errors import EngineDead, TimedOut
from muxjax.serve.access.limits import KeyLimits, Reservation
from muxjax.serve.access.queues import ModelQueue
from muxjax.serve.fleet_protocol import DeltaLike, StreamLike


@runtime_checkable
class Observer(Protocol):
    """Is told what streams do; must be quick."""

    def first(self, model: str, seconds: float, prompt_tokens: int, tokens: int) -> None:
        """Its first tokens came so many seconds after it was let in."""
        ...

    def more(self, model: str, seconds: float, tokens: int) -> None:
        """`tokens` more came at once, so many seconds after those before."""
        ...

    def ended(self, ending: Ending) -> None:
        """It ended."""
        ...


@runtime_checkable
class Timer(Protocol):
    """What an event loop's `call_later` gives; each loop has its own."""

    def cancel(self) -> None:
        """Nothing will be called."""
        ...


class Ending:
    """What there is to say about a stream that has ended.

    Attributes:
      model: its name.
      reason: 'stop', 'length', 'abort', 'cancelled', 'timeout' or 'error'.
      prompt_tokens: of its prompt.
      output_tokens: that were made.
      max_tokens: the most that were asked for.
      ttft: seconds to the first token, None if there was none.
      seconds: from the start to the end.
    """

    __slots__ = (
        "max_tokens",
        "model",
        "output_tokens",
        "prompt_tokens",
        "reason",
        "seconds",
        "ttft",
    )

    def __init__(self, stream: TrackedStream, reason: str, now: float) -> None:
        self.model = stream.model
        self.reason = reason
        self.prompt_tokens = stream.num_prompt_tokens
        self.output_tokens = stream.made
        self.max_tokens = stream.max_tokens
        self.ttft = stream.ttft
        self.seconds = now - stream.started

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None for fewer than two."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.seconds - self.ttft) / (self.output_tokens - 1)


@runtime_checkable
class Door(Protocol):
    """What streams share: `admission.Admission`."""

    config: ServerConfig
    observers: tuple[Observer, ...]
    streams: set[TrackedStream]
    lock: threading.RLock


@dataclass(frozen=True)
class QueueTicket:
    """What a stream takes of the queue and of its key's tokens, `most` at most."""

    queue: ModelQueue
    limits: KeyLimits | None
    reserved: Reservation | None
    most: int

    def leave(self, made: int, first: bool) -> None:
        """Gives back what was not used; `first` if a first token came."""
        if not first:
            self.queue.leave(served=False)
        if self.limits is not None:
            self.limits.give_back(self.reserved, max(0, self.most - made))


class TrackedStream:
    """A stream of the fleet with its place in the queue, its time limit and its measures."""

    def __init__(
        self,
        admission: Door,
        inner: StreamLike,
        model: str,
        max_tokens: int,
        place: QueueTicket,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.made = 0
        self.ttft: float | None = None
        self.started = time.monotonic()
        self._admission = admission
        self._inner = inner
        self._place = place
        self._loop = loop
        self._reason: str | None = None
        self._last = self.started
        self._timers: list[Timer] = []
        with admission.lock:
            admission.streams.add(self)
        loop.call_soon_threadsafe(self._start_timers)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._inner.num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Those of them that the prefix cache had."""
        return self._inner.num_cached_tokens

    def cancel(self) -> None:
        """Ends the request; after the end it does nothing."""
        self._inner.cancel()
        self._close("cancelled")

    def end(self, error: BaseException | None = None) -> None:
        """Ends it for its reader: with an error, or as cut."""
        self._inner.end(error)

    def __aiter__(self) -> AsyncIterator[DeltaLike]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[DeltaLike]:
        try:
            async for delta in self._inner:
                count = len(delta.token_ids)
                if count:
                    self._note(count)
                if delta.finish_reason is not None:
                    self._close(delta.finish_reason)
                yield delta
        except TimedOut:
            self._close("timeout")
            raise
        except EngineDead:
            self._close("error")
            raise

    def _note(self, count: int) -> None:
        now = time.monotonic()
        observers = self._admission.observers
        self.made += count
        if self.ttft is None:
            self.ttft = now - self.started
            with self._admission.lock:
                self._place.queue.leave(served=True)
            for observer in observers:
                observer.first(self.model, self.ttft, self.num_prompt_tokens, count)
        else:
            for observer in observers:
                observer.more(self.model, now - self._last, count)
        self._last = now

    def _start_timers(self) -> None:
        config = self._admission.config

        def expire(what: str, seconds: float) -> None:
            if what == "the request" or self.ttft is None:
                self.end(TimedOut(f"{what} took longer than {seconds:g} s, the most it may"))

        limits = {"the request": config.request_timeout, "its first token": config.queue_timeout}
        if self._reason is None:
            self._timers = [
                self._loop.call_later(seconds, expire, what, seconds)
                for what, seconds in limits.items()
                if seconds is not None
            ]

    def _close(self, reason: str) -> None:
        with self._admission.lock:
            if self._reason is not None:
                return
            self._reason = reason
            self._place.leave(self.made, first=self.ttft is not None)
            self._admission.streams.discard(self)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop_timers)
        ending = Ending(self, reason, time.monotonic())
        for observer in self._admission.observers:
            observer.ended(ending)

    def _stop_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
