"""A request as the router carries it: from unit to unit, with all that its stream was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from muxjax.engine.engine import Sink
from muxjax.errors import EngineDead
from muxjax.scheduling.requests import Request, RequestUpdate

if TYPE_CHECKING:
    from muxjax.engine.router import Router
    from muxjax.engine.supervisor import UnitSupervisor


class RoutedRequest:
    """A request and where it is; the engine's `Sink` for it.

    Attributes:
      request: as it was asked for.
      unit: where it runs or waits; None while it is held.
      placed: whether some unit has had it.
      seconds: what it counts for there.
      moves: how often its unit died.
      dropped: its caller does not want it any more.
      tokens: what its stream was given.
    """

    def __init__(self, router: Router, request: Request, sink: Sink) -> None:
        self._router = router
        self._sink = sink
        self.request = request
        self.unit: UnitSupervisor | None = None
        self.placed = False
        self.seconds = 0.0
        self.moves = 0
        self.dropped = False
        self.tokens: list[int] = []

    def update(self, update: RequestUpdate) -> bool:
        """See `engine.Sink`."""
        self.tokens.extend(update.tokens)
        stopped = self._sink.update(update)
        if stopped or update.finish_reason is not None:
            self._router.forget(self)
        return stopped

    def cancelled(self) -> None:
        """See `engine.Sink`."""
        self._router.forget(self)
        self._sink.cancelled()

    def failed(self, error: BaseException) -> None:
        """See `engine.Sink`. Only a unit's death is got over."""
        if isinstance(error, EngineDead):
            self._router.orphaned(self, error)
        else:
            self.give_up(error)

    def give_up(self, error: BaseException) -> None:
        self._router.forget(self)
        self._sink.failed(error)

    def again(self) -> Request:
        """The request anew, with what it has emitted: for a unit that does not know it."""
        old = self.request
        return Request(
            id=old.id,
            model=old.model,
            prompt=old.prompt,
            params=old.params,
            stop_ids=old.stop_ids,
            arrival=old.arrival,
            output=list(self.tokens),
            constraint=None if old.constraint is None else old.constraint.replay(self.tokens),
        )
