"""Runs the engine of a unit, and restarts it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

from muxjax.engine.engine import Observer, Sink
from muxjax.engine.health import UnitHealth
from muxjax.errors import EngineDead
from muxjax.scheduling.requests import Request
from muxjax.scheduling.routing import PlannedLoad


@runtime_checkable
class UnitEngine(Protocol):
    """The engine of a unit: `engine.Engine`, or `cluster.RemoteEngine` in another process."""

    @property
    def alive(self) -> bool:
        """Whether requests are still served."""
        ...

    @property
    def error(self) -> BaseException | None:
        """The error that ended it, or None; `close` is not an error."""
        ...

    @property
    def stalled_seconds(self) -> float:
        """Seconds since the last step while there is work; 0 when idle."""
        ...

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request that was checked by the caller.

        Raises:
          EngineDead: the engine has ended.
        """
        ...

    def cancel(self, request_id: int) -> None:
        """Ends a request and frees its pages; does nothing if it, or the engine, has ended."""
        ...

    def observe(self, observer: Observer | None) -> None:
        """Calls `observer` for every later step; None removes the observer."""
        ...

    def abandon(self, reason: str) -> None:
        """Gives up an engine that has ended or hangs: every request fails now."""
        ...

    def close(self) -> None:
        """Fails the running requests, and waits for the engine to end."""
        ...


class UnitSupervisor[E: UnitEngine]:
    """The engine of a unit, which can be restarted; used by the router.

    Args:
      name: unique in the fleet.
      models: names of the models on the unit.
      start: starts an engine with an empty pool and queue; None for a unit that does not run
        (`warm_up=False`).
      planned_load: what the plan expects of the unit; None: there is no plan.
    """

    def __init__(
        self,
        name: str,
        models: Iterable[str],
        start: Callable[[], E] | None,
        planned_load: PlannedLoad | None = None,
    ) -> None:
        self.name = name
        self.model_names = frozenset(models)
        self.restarts = 0
        self._start = start
        self.planned_load = planned_load or PlannedLoad()
        self._changing = threading.Lock()
        self._closed = False
        self._restarting = False
        self._observer: Observer | None = None
        self._engine = None if start is None else start()

    @property
    def engine(self) -> E:
        """The unit's engine, which may have ended.

        Raises:
          EngineDead: the engine was never started.
        """
        if self._engine is None:
            raise EngineDead("the fleet was loaded with warm_up=False: it cannot generate")
        return self._engine

    @property
    def alive(self) -> bool:
        """Whether the engine accepts requests."""
        return self._engine is not None and self._engine.alive

    def revive(self) -> None:
        """Restarts the engine if it has ended.

        Raises:
          EngineDead: the unit is closed.
        """
        with self._changing:
            if not self.alive:
                self._check_open()
                self.engine.close()  # waits for the thread and frees the pool
                self._begin()

    def restart(self, reason: str) -> None:
        """Replaces the engine, even one that runs or hangs; a hanging thread is not waited for.

        Does nothing if another thread has replaced it meanwhile.

        Args:
          reason: message of the error for the old engine's requests.

        Raises:
          EngineDead: the unit is closed.
        """
        engine = self.engine
        with self._changing:
            if self._engine is engine:
                self._check_open()
                engine.abandon(reason)
                self._begin()

    def observe(self, observer: Observer | None) -> None:
        """Calls `observer` for every later step, also after a restart; None removes it.

        Raises:
          EngineDead: the engine was never started.
        """
        with self._changing:
            self.engine.observe(observer)
            self._observer = observer

    def health(self) -> UnitHealth:
        """Returns the unit's health without calling the engine, which may hang."""
        engine = self._engine
        return UnitHealth(
            unit=self.name,
            models=tuple(sorted(self.model_names)),
            alive=self.alive,
            stalled_seconds=0.0 if engine is None else engine.stalled_seconds,
            reason=None if engine is None or engine.error is None else str(engine.error),
            restarts=self.restarts,
            restarting=self._restarting,
        )

    def close(self) -> None:
        """Fails the running requests and frees the pool. May be called more than once."""
        with self._changing:
            self._closed = True
            if self._engine is not None:
                self._engine.close()

    def _check_open(self) -> None:
        if self._closed or self._start is None:
            raise EngineDead(f"unit {self.name} cannot be restarted: it is closed")

    def _begin(self) -> None:
        assert self._start is not None, "ensured by _check_open"
        self._restarting = True
        try:
            self._engine = self._start()
        finally:
            self._restarting = False
        self._engine.observe(self._observer)
        self.restarts += 1
