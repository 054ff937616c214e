"""A request in the router, with all tokens that were delivered to its stream."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from muxjax.engine.engine import Sink
from muxjax.engine.supervisor import UnitSupervisor
from muxjax.errors import EngineDead
from muxjax.scheduling.requests import Request, RequestUpdate


@runtime_checkable
class RequestOwner(Protocol):
    """Receives the end of a routed request: the router. Called in the engines' threads."""

    def forget(self, routed: RoutedRequest) -> None:
        """Drops a request that has ended."""
        ...

    def orphaned(self, routed: RoutedRequest, error: BaseException) -> None:
        """Recovers a request whose unit has died with `error`."""
        ...


class RoutedRequest:
    """A request and the unit that serves it; the engine's `Sink` for the request.

    Attributes:
      request: as it was submitted.
      unit: the unit that it runs or waits on; None while the router holds it.
      was_placed: whether it was submitted to a unit before.
      expected_seconds: what it adds to the expected load of its unit.
      moves: number of its units that have died.
      cancel_requested: whether its caller has cancelled it.
      tokens: delivered to its stream.
    """

    def __init__(self, owner: RequestOwner, request: Request, sink: Sink) -> None:
        self._owner = owner
        self._sink = sink
        self.request = request
        self.unit: UnitSupervisor | None = None
        self.was_placed = False
        self.expected_seconds = 0.0
        self.moves = 0
        self.cancel_requested = False
        self.tokens: list[int] = []

    def update(self, update: RequestUpdate) -> bool:
        """See `engine.Sink`."""
        self.tokens.extend(update.tokens)
        stopped = self._sink.update(update)
        if stopped or update.finish_reason is not None:
            self._owner.forget(self)
        return stopped

    def cancelled(self) -> None:
        """See `engine.Sink`."""
        self._owner.forget(self)
        self._sink.cancelled()

    def failed(self, error: BaseException) -> None:
        """See `engine.Sink`. `EngineDead` is recovered; any other error ends the request."""
        if isinstance(error, EngineDead):
            self._owner.orphaned(self, error)
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Ends the request with an error."""
        self._owner.forget(self)
        self._sink.failed(error)

    def resubmission(self) -> Request:
        """A copy of the request that continues after the tokens emitted so far, for another unit.

        Raises:
          InvalidRequest: the tokens do not follow the request's grammar.
        """
        request = self.request
        constraint = request.constraint
        return Request(
            id=request.id,
            model=request.model,
            prompt=request.prompt,
            params=request.params,
            stop_ids=request.stop_ids,
            arrival=request.arrival,
            output=list(self.tokens),
            constraint=None if constraint is None else constraint.replay(self.tokens),
        )
