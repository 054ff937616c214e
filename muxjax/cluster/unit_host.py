"""The far end of a unit in another process: owns the unit, and gathers what its steps bring.

Updates are not sent one by one. They wait until the near end asks for a `PollResult`, which then
has all that came since the last one: with hundreds of streams that is one message a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from muxjax.cluster.messages import AddRequest, PollResult, RequestEvent
from muxjax.engine.engine import Engine
from muxjax.engine.grammar_constraints import ConstraintCompiler
from muxjax.engine.supervisor import UnitSupervisor
from muxjax.errors import EngineDead, InvalidRequest, MuxError
from muxjax.scheduling.requests import Request, RequestUpdate
from muxjax.units.unit_spec import LoadedModel


class UnitHost:
    """Serves one unit to one router. Safe to use from several threads.

    Args:
      unit: it runs, and is never started anew here: the near end starts another process.
      models: what it holds.
      stats: gives its counters.
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
        self._news: list[RequestEvent] = []
        self._arrived = threading.Condition()

    def submit(self, asked: AddRequest) -> None:
        """Queues a request. What is wrong with it is told in the next report."""
        try:
            request = self._request(asked)
            self._unit.engine.submit(request, _Outbox(self, request))
        except EngineDead:
            pass  # the report says so
        except MuxError as error:
            self.tell(RequestEvent(asked.id, [], error=error))

    def cancel(self, request_id: int) -> None:
        """Ends a request and frees its pages; does nothing if it has ended."""
        self._unit.engine.cancel(request_id)

    def report(self, seconds: float) -> PollResult:
        """Waits for news, but no longer than some seconds."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._news or not self._unit.alive, seconds)
            news, self._news = self._news, []
        ended = None
        if not self._unit.alive:
            ended = str(self._unit.engine.error or "it is closed")
        return PollResult(news, self._unit.engine.stalled_seconds, ended)

    def tell(self, news: RequestEvent) -> None:
        """Adds to the next report. Called in the engine's thread."""
        with self._arrived:
            self._news.append(news)
            self._arrived.notify()

    def _request(self, asked: AddRequest) -> Request:
        constraint = None
        if asked.params.grammar is not None:
            # What ends the output of a grammar are the model's own stop tokens.
            model = self.models[asked.model]
            own = () if asked.params.ignore_eos else model.eos_token_ids
            constraint = self._vocabulary(model).compile(asked.params.grammar, own)
            constraint = constraint.anew(asked.output)
        return Request(
            id=asked.id,
            model=asked.model,
            prompt=asked.prompt,
            params=asked.params,
            stop_ids=asked.stop_ids,
            arrival=time.perf_counter() - asked.waited,
            output=list(asked.output),
            constraint=constraint,
        )

    def _vocabulary(self, model: LoadedModel) -> ConstraintCompiler:
        if model.tokenizer is None:
            raise InvalidRequest(f"{model.name} has no tokenizer", field="grammar")
        if model.name not in self._constraints:
            self._constraints[model.name] = ConstraintCompiler(
                model.tokenizer, model.config.vocab_size
            )
        return self._constraints[model.name]


class _Outbox:
    """One request's `Sink`."""

    def __init__(self, host: UnitHost, request: Request) -> None:
        self._host = host
        self._id = request.id
        self._begun = False

    def update(self, update: RequestUpdate) -> bool:
        """See `engine.Sink`."""
        request, tokens, logprobs, reason = update
        if request.error is not None:
            self._host.tell(RequestEvent(self._id, [], error=request.error))
            return False
        prompt, cached = None, 0
        if not self._begun:
            self._begun, cached = True, request.cached_tokens
            if request.params.prompt_logprobs is not None:
                prompt = request.prompt_logprobs
        self._host.tell(RequestEvent(self._id, tokens, logprobs, reason, prompt, cached))
        return False

    def cancelled(self) -> None:
        """See `engine.Sink`. Who cancelled it knows."""

    def failed(self, error: BaseException) -> None:
        """See `engine.Sink`. The end of the loop is told once, in the report."""
        if isinstance(error, Exception) and not isinstance(error, EngineDead):
            self._host.tell(RequestEvent(self._id, [], error=error))
