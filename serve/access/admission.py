"""Admission of requests to the fleet.

Each HTTP call gets a `FleetView`: the fleet restricted to the models of its API key. Every stream
that an endpoint opens through a view is admitted, limited and measured here.

- A model's queue consists of the streams that wait for their first token. If `max_queue` streams
  wait, a new stream is refused with 429 and a `Retry-After` header.
- A stream that exceeds a time limit ends with `TimedOut`, even if the engine hangs.
- While the server drains, new streams are refused with 503. `abort_all` ends the running ones.

Streams are read on the server's event loop. They may be opened in another thread, because
compiling a grammar would block the loop. A lock therefore guards shared state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from muxjax.config.server import ServerConfig
from muxjax.sampling_params import SamplingParams
from muxjax.serve.access.key_policy import apply_key_policy
from muxjax.serve.access.keys import Key
from muxjax.serve.access.limits import KeyLimits, rate_limited
from muxjax.serve.access.queues import ModelQueue
from muxjax.serve.access.tracked_stream import (
    OpenStreams,
    QueueTicket,
    StreamObserver,
    TrackedStream,
)
from muxjax.serve.errors import ApiError
from muxjax.serve.fleet_protocol import FleetLike, ModelLike


class Admission:
    """Admission control of one fleet.

    Args:
      fleet: the models.
      config: limits and timeouts.
      observers: receive the events of every stream.

    Attributes:
      draining: while True, new streams are refused with 503.
      streams: the streams that have not ended.
    """

    def __init__(
        self,
        fleet: FleetLike,
        config: ServerConfig,
        observers: tuple[StreamObserver, ...] = (),
    ) -> None:
        self.fleet = fleet
        self.config = config
        self.draining = False
        self.streams = OpenStreams(config, observers)
        self._queues = {name: ModelQueue() for name in fleet.models}

    def fleet_view(self, key: Key | None, limits: KeyLimits | None) -> FleetView:
        """Builds the view of the fleet for one call; must run on the event loop."""
        return FleetView(self, key, limits, asyncio.get_running_loop())

    def waiting(self, model: str) -> int:
        """Number of streams of a model that wait for their first token."""
        queue = self._queues.get(model)
        return 0 if queue is None else queue.waiting

    def check_not_draining(self) -> None:
        """Refuses requests while the server drains.

        Raises:
          ApiError: 503.
        """
        if self.draining:
            raise ApiError(
                "the server is shutting down: it finishes running requests and accepts no new ones",
                status=503,
                code="server_stopping",
                headers={"retry-after": "10", "connection": "close"},
            )

    def abort_all(self) -> None:
        """Ends all streams now; each gets a final delta with the finish reason 'abort'."""
        for stream in self.streams:
            stream.end()

    def open_stream(
        self,
        model: str,
        prompt: str | list[int],
        params: SamplingParams,
        limits: KeyLimits | None,
        loop: asyncio.AbstractEventLoop,
    ) -> TrackedStream:
        """Admits a request and opens its stream.

        Raises:
          ApiError: 429 if a queue or a key limit is full, 503 while the server drains.
          MuxError: see `FleetLike.stream`.
        """
        lock = self.streams.lock
        with lock:
            self.check_not_draining()
            queue = self._queues.setdefault(model, ModelQueue())
            if queue.waiting >= self.config.max_queue:
                raise rate_limited(
                    f"the queue of {model} is full with {queue.waiting} waiting requests",
                    queue.expected_wait(),
                )
            queue.waiting += 1
        try:
            inner = self.fleet.stream(model, prompt, params)
            try:
                context_left = self.fleet.models[model].max_model_len - inner.num_prompt_tokens
                max_output_tokens = min(params.max_tokens, context_left)
                with lock:
                    tokens = inner.num_prompt_tokens + max_output_tokens
                    reserved = None if limits is None else limits.reserve(tokens)
            except BaseException:
                inner.cancel()
                raise
        except BaseException:
            with lock:
                queue.leave(served=False)
            raise
        return TrackedStream(
            inner,
            model,
            params.max_tokens,
            ticket=QueueTicket(queue, limits, reserved, max_output_tokens),
            open_streams=self.streams,
            loop=loop,
        )


class FleetView:
    """The fleet restricted to one caller's models: a `FleetLike` for the endpoints.

    Attributes:
      models: the models that the caller's key permits, by name.
    """

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
            models
            if key is None
            else {name: model for name, model in models.items() if key.permits(name)}
        )

    def stream(
        self, model: str, prompt: str | list[int], params: SamplingParams | None = None
    ) -> TrackedStream:
        """Opens a stream. `model` must be in `models`.

        Raises:
          ApiError: the request is not admitted.
          MuxError: see `FleetLike.stream`.
        """
        params = apply_key_policy(self._key, params or SamplingParams())
        stream = self._admission.open_stream(model, prompt, params, self._limits, self._loop)
        self._streams.append(stream)
        return stream

    def measurements(self) -> dict[str, str | int | float]:
        """Model, token counts and time to first token of the call, for logs and traces.

        Empty if the call opened no stream.
        """
        if not self._streams:
            return {}
        first = self._streams[0]
        measured: dict[str, str | int | float] = {
            "model": first.model,
            "prompt_tokens": sum(stream.num_prompt_tokens for stream in self._streams),
            "cached_tokens": sum(stream.num_cached_tokens for stream in self._streams),
            "output_tokens": sum(stream.output_tokens for stream in self._streams),
        }
        if first.ttft is not None:
            measured["ttft"] = round(first.ttft, 4)
        return measured
