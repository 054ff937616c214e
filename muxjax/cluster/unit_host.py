"""Serves a unit to a router in another process.

Updates are not sent separately: each poll returns all events since the last one, so that a step
needs one message for any number of streams.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from muxjax.cluster.messages import AddRequest, PollResult, RequestEvent
from muxjax.engine.engine import Engine
from muxjax.engine.grammar_constraints import ConstraintCompiler
from muxjax.engine.loaded_model import LoadedModel
from muxjax.engine.supervisor import UnitSupervisor
from muxjax.errors import EngineDead, InvalidRequest, MuxError
from muxjax.scheduling.requests import Request, RequestUpdate


class UnitHost:
    """Serves one unit to one router. Safe to use from several threads.

    Args:
      unit: running. It is never restarted: the router starts another process instead.
      models: of the unit.
      stats: returns its counters.
    """

    def __init__(
        self,
        unit: UnitSupervisor[Engine],
        models: dict[str, LoadedModel],
        stats: Callable[[], dict[str, Any]],
    ) -> None:
        self.models = models
        self.stats = stats
        self._unit = unit
        self._constraints: dict[str, ConstraintCompiler] = {}
        self._events: list[RequestEvent] = []
        self._changed = threading.Condition()

    def submit(self, message: AddRequest) -> None:
        """Queues a request. An error is an event of the next poll."""
        try:
            request = self._build_request(message)
            self._unit.engine.submit(request, _EventSink(self, request))
        except EngineDead:
            pass  # the next poll reports it
        except MuxError as error:
            self.add_event(RequestEvent(message.id, [], error=error))

    def cancel(self, request_id: int) -> None:
        """Ends a request and frees its pages; does nothing if it has ended."""
        self._unit.engine.cancel(request_id)

    def poll(self, seconds: float) -> PollResult:
        """Returns all events since the last poll; waits up to `seconds` for the first."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or not self._unit.alive, seconds)
            events, self._events = self._events, []
        ended = None
        if not self._unit.alive:
            ended = str(self._unit.engine.error or "it is closed")
        return PollResult(events, self._unit.engine.stalled_seconds, ended)

    def add_event(self, event: RequestEvent) -> None:
        """Adds an event for the next poll. Called in the engine's thread."""
        with self._changed:
            self._events.append(event)
            self._changed.notify()

    def _build_request(self, message: AddRequest) -> Request:
        constraint = None
        if message.params.grammar is not None:
            # The output of a grammar ends with a stop token of the model.
            model = self.models[message.model]
            stop_ids = () if message.params.ignore_eos else model.eos_token_ids
            constraint = self._compiler(model).compile(message.params.grammar, stop_ids)
            constraint = constraint.replay(message.output)
        return Request(
            id=message.id,
            model=message.model,
            prompt=message.prompt,
            params=message.params,
            stop_ids=message.stop_ids,
            arrival=time.perf_counter() - message.waited,
            output=list(message.output),
            constraint=constraint,
        )

    def _compiler(self, model: LoadedModel) -> ConstraintCompiler:
        if model.tokenizer is None:
            raise InvalidRequest(f"{model.name} has no tokenizer", field="grammar")
        if model.name not in self._constraints:
            self._constraints[model.name] = ConstraintCompiler(
                model.tokenizer, model.config.vocab_size
            )
        return self._constraints[model.name]


class _EventSink:
    """The `Sink` of one request: adds its updates to the events."""

    def __init__(self, host: UnitHost, request: Request) -> None:
        self._host = host
        self._id = request.id
        self._started = False

    def update(self, update: RequestUpdate) -> bool:
        """See `engine.Sink`."""
        request, tokens, logprobs, reason = update
        if request.error is not None:
            self._host.add_event(RequestEvent(self._id, [], error=request.error))
            return False
        prompt, cached = None, 0
        if not self._started:
            self._started, cached = True, request.cached_tokens
            if request.params.prompt_logprobs is not None:
                prompt = request.prompt_logprobs
        self._host.add_event(RequestEvent(self._id, tokens, logprobs, reason, prompt, cached))
        return False

    def cancelled(self) -> None:
        """See `engine.Sink`. No event: the router has cancelled the request itself."""

    def failed(self, error: BaseException) -> None:
        """See `engine.Sink`. A poll reports the end of the engine, once for all requests."""
        if isinstance(error, Exception) and not isinstance(error, EngineDead):
            self._host.add_event(RequestEvent(self._id, [], error=error))
