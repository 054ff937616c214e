"""Lets requests in, follows them to their end, and can end them.

`Admission` stands between the endpoints and the fleet. For each call it makes a `View`: the fleet
as the caller may see it, which is only the models of its key. Every stream that is opened through a
view is counted, limited and measured here, whatever endpoint it belongs to.

- A model's queue is its streams that wait for their first token. One more than `max_queue` is
  refused with 429, and the time after which there should be room.
- A stream that takes longer than it may is ended with `TimedOut`, even if the engine hangs.
- After `drain` nothing is let in (503), and `cut` ends what still runs.

Streams are read on the server's event loop; they may be opened in another thread, where a grammar
is compiled first, so what they share is changed under a lock.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from muxjax.errors import EngineDead, TimedOut
from muxjax.sampling_params import SamplingParams
from muxjax.serve.errors import ApiError
from muxjax.serve.fleet_protocol import DeltaLike, FleetLike, ModelLike, StreamLike
from muxjax.serve.keys import Key
from muxjax.serve.limits import KeyLimits, Reservation, too_many
from muxjax.server_config import ServerConfig

_RECENT = 32
"""First tokens that the speed of a queue is estimated from."""
_LONGEST_WAIT = 60.0


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

    def __init__(self, stream: Watched, reason: str, now: float) -> None:
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


class Admission:
    """The door to a fleet.

    Args:
      fleet: the models.
      config: limits and time-outs.
      observers: told of every stream.
    """

    def __init__(
        self,
        fleet: FleetLike,
        config: ServerConfig,
        observers: tuple[Observer, ...] = (),
    ) -> None:
        self.fleet = fleet
        self.config = config
        self.observers = observers
        self.draining = False
        self.streams: set[Watched] = set()
        self.lock = threading.RLock()
        self._queues = {name: _Queue() for name in fleet.models}

    def view(self, key: Key | None, limits: KeyLimits | None) -> View:
        """The fleet for one call; to be made on the event loop."""
        return View(self, key, limits, asyncio.get_running_loop())

    def waiting(self, model: str) -> int:
        """Streams of a model without a first token."""
        queue = self._queues.get(model)
        return 0 if queue is None else queue.waiting

    def check_open(self) -> None:
        """Refuses everything while the server stops.

        Raises:
          ApiError: 503.
        """
        if self.draining:
            raise ApiError(
                "the server is stopping; it finishes what runs and takes nothing new",
                status=503,
                code="server_stopping",
                headers={"retry-after": "10", "connection": "close"},
            )

    def cut(self) -> None:
        """Ends all streams now, each with a last delta whose reason is 'abort'."""
        for stream in list(self.streams):
            stream.end()

    def open(
        self,
        model: str,
        prompt: str | list[int],
        params: SamplingParams | None,
        limits: KeyLimits | None,
        loop: asyncio.AbstractEventLoop,
    ) -> Watched:
        """Opens a stream of the fleet, if there is room for it.

        Raises:
          ApiError: 429, 503: it is not let in.
          MuxError: as the fleet's `open_stream`.
        """
        params = params or SamplingParams()
        with self.lock:
            self.check_open()
            queue = self._queues.setdefault(model, _Queue())
            if queue.waiting >= self.config.max_queue:
                raise too_many(
                    f"{queue.waiting} requests for {model} wait already, as many as may",
                    queue.expected_wait(),
                )
            queue.waiting += 1
        try:
            inner = self.fleet.open_stream(model, prompt, params)
            try:
                room = self.fleet.models[model].max_model_len - inner.num_prompt_tokens
                most = min(params.max_tokens, room)
                with self.lock:
                    tokens = inner.num_prompt_tokens + most
                    reserved = None if limits is None else limits.reserve(tokens)
            except BaseException:
                inner.cancel()
                raise
        except BaseException:
            with self.lock:
                queue.leave(served=False)
            raise
        return Watched(
            self, inner, model, params.max_tokens, _Place(queue, limits, reserved, most), loop
        )


@dataclass(frozen=True)
class _Place:
    """What a stream takes of the queue and of its key's tokens, `most` at most."""

    queue: _Queue
    limits: KeyLimits | None
    reserved: Reservation | None
    most: int

    def leave(self, made: int, first: bool) -> None:
        """Gives back what was not used; `first` if a first token came."""
        if not first:
            self.queue.leave(served=False)
        if self.limits is not None:
            self.limits.give_back(self.reserved, max(0, self.most - made))


class _Queue:
    """The streams of a model that wait for their first token, and how fast they get it."""

    def __init__(self) -> None:
        self.waiting = 0
        self._left: deque[float] = deque(maxlen=_RECENT)

    def leave(self, served: bool) -> None:
        self.waiting -= 1
        if served:
            self._left.append(time.monotonic())

    def expected_wait(self) -> float:
        """Seconds until one more has left."""
        if len(self._left) < 2:
            return 1.0
        each = (time.monotonic() - self._left[0]) / len(self._left)
        return min(_LONGEST_WAIT, each)


class View:
    """A fleet as one caller may see it; a `FleetLike` for the endpoints."""

    def __init__(
        self,
        admission: Admission,
        key: Key | None,
        limits: KeyLimits | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._admission = admission
        self._limits = limits
        self._loop = loop
        self._streams: list[Watched] = []
        models = admission.fleet.models
        self.models: Mapping[str, ModelLike] = (
            models if key is None else {name: m for name, m in models.items() if key.sees(name)}
        )

    def open_stream(
        self, model: str, prompt: str | list[int], params: SamplingParams | None = None
    ) -> Watched:
        """See `FleetLike`; the endpoint has looked the model up in `models`."""
        stream = self._admission.open(model, prompt, params, self._limits, self._loop)
        self._streams.append(stream)
        return stream

    def measures(self) -> dict[str, str | int | float]:
        """What the call's streams came to, for logs and traces; empty if there were none."""
        if not self._streams:
            return {}
        first = self._streams[0]
        found: dict[str, str | int | float] = {
            "model": first.model,
            "prompt_tokens": sum(stream.num_prompt_tokens for stream in self._streams),
            "output_tokens": sum(stream.made for stream in self._streams),
        }
        if first.ttft is not None:
            found["ttft"] = round(first.ttft, 4)
        return found

    def stats(self) -> dict[str, Any]:
        """See `FleetLike`."""
        return self._admission.fleet.stats()


class Watched:
    """A stream of the fleet with its place in the queue, its time limit and its measures."""

    def __init__(
        self,
        admission: Admission,
        inner: StreamLike,
        model: str,
        max_tokens: int,
        place: _Place,
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
