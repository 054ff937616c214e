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
from collections.abc import Mapping
from typing import Any

from muxjax.config.server import ServerConfig
from muxjax.sampling_params import SamplingParams
from muxjax.serve.access.key_policy import apply_key_policy
from muxjax.serve.access.keys import Key
from muxjax.serve.access.limits import KeyLimits, too_many
from muxjax.serve.access.queues import ModelQueue
from muxjax.serve.access.tracked_stream import Observer, QueueTicket, TrackedStream
from muxjax.serve.errors import ApiError
from muxjax.serve.fleet_protocol import FleetLike, ModelLike


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
        self.streams: set[TrackedStream] = set()
        self.lock = threading.RLock()
        self._queues = {name: ModelQueue() for name in fleet.models}

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
        params: SamplingParams,
        limits: KeyLimits | None,
        loop: asyncio.AbstractEventLoop,
    ) -> TrackedStream:
        """Opens a stream of the fleet, if there is room for it.

        Raises:
          ApiError: 429, 503: it is not let in.
          MuxError: as the fleet's `stream`.
        """
        with self.lock:
            self.check_open()
            queue = self._queues.setdefault(model, ModelQueue())
            if queue.waiting >= self.config.max_queue:
                raise too_many(
                    f"{queue.waiting} requests for {model} wait already, as many as may",
                    queue.expected_wait(),
                )
            queue.waiting += 1
        try:
            inner = self.fleet.stream(model, prompt, params)
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
        return TrackedStream(
            self, inner, model, params.max_tokens, QueueTicket(queue, limits, reserved, most), loop
        )


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
        self._key = key
        self._limits = limits
        self._loop = loop
        self._streams: list[TrackedStream] = []
        models = admission.fleet.models
        self.models: Mapping[str, ModelLike] = (
            models if key is None else {name: m for name, m in models.items() if key.sees(name)}
        )

    def stream(
        self, model: str, prompt: str | list[int], params: SamplingParams | None = None
    ) -> TrackedStream:
        """See `FleetLike`; the endpoint has looked the model up in `models`.

        Raises:
          ApiError: it is not let in.
        """
        params = apply_key_policy(self._key, params or SamplingParams())
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
            "cached_tokens": sum(stream.num_cached_tokens for stream in self._streams),
            "output_tokens": sum(stream.made for stream in self._streams),
        }
        if first.ttft is not None:
            found["ttft"] = round(first.ttft, 4)
        return found

    def stats(self, *, block: bool = True) -> Mapping[str, Any]:
        """See `FleetLike`."""
        return self._admission.fleet.stats(block=block)
