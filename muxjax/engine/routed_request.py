"""A request on its way through the router, with all tokens that its stream was given."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from muxjax.engine.engine import Sink
from muxjax.engine.supervisor import UnitSupervisor
from muxjax.errors import EngineDead
from muxjax.scheduling.requests import Request, RequestUpdate


@runtime_checkable
class RequestOwner(Protocol):
    """What a routed request reports to: the router. Called in the engines' threads."""

    def forget(self, routed: RoutedRequest) -> None:
        """Drops a request that has ended."""
        ...

    def orphaned(self, routed: RoutedRequest, error: BaseException) -> None:
        """Takes back a request whose unit has died of `error`."""
        ...


class RoutedRequest:
    """A request and the unit that serves it; the engine's `Sink` for the request.

    Attributes:
      request: as it was submitted.
      unit: the unit that it runs or waits on; None while the router holds it.
      was_placed: whether any unit has had it.
      expected_seconds: what it adds to the expected load of its unit.
      moves: how many of its units have died.
      cancel_requested: whether its caller has cancelled it.
      tokens: the tokens that its stream was given.
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
        """See `engine.Sink`. The request survives the death of its unit, but no other error."""
        if isinstance(error, EngineDead):
            self._owner.orphaned(self, error)
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Ends the request with an error, whatever it is."""
        self._owner.forget(self)
        self._sink.failed(error)

    def resubmission(self) -> Request:
        """A copy of the request that continues after the tokens emitted so far, for another unit.

        Raises:
          InvalidRequest: the tokens do not follow the request's grammar.
        """
        first = self.request
        constraint = first.constraint
        return Request(
            id=first.id,
            model=first.model,
            prompt=first.prompt,
            params=first.params,
            stop_ids=first.stop_ids,
            arrival=first.arrival,
            output=list(self.tokens),
            constraint=None if constraint is None else constraint.replay(self.tokens),
        )
