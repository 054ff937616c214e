"""Keeps an engine running: the engine of a unit, which may be started anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar, runtime_checkable

from muxjax.engine.engine import Observer, Sink
from muxjax.engine.health import UnitHealth
from muxjax.errors import EngineDead
from muxjax.scheduling.requests import Request


@runtime_checkable
class UnitEngine(Protocol):
    """The loop of a unit, here (`engine.Engine`) or in another process (`cluster.RemoteEngine`)."""

    @property
    def alive(self) -> bool:
        """Whether requests are still served."""
        ...

    @property
    def error(self) -> BaseException | None:
        """What ended it, other than `close`."""
        ...

    @property
    def stalled_seconds(self) -> float:
        """How long there has been work and no step; 0 for one that is idle."""
        ...

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request whose fit was checked by the caller.

        Raises:
          EngineDead: the engine has ended.
        """
        ...

    def cancel(self, request_id: int) -> None:
        """Ends a request and frees its pages; does nothing if it, or the engine, has ended."""
        ...

    def observe(self, observer: Observer | None) -> None:
        """Shows every step from now on to a function, or to none."""
        ...

    def abandon(self, reason: str) -> None:
        """Gives up a loop that has ended or hangs: every request fails now."""
        ...

    def close(self) -> None:
        """Ends running requests as failed, and waits for the end."""
        ...


E = TypeVar("E", bound=UnitEngine)


class UnitSupervisor[E: UnitEngine]:
    """A unit as the router sees it.

    Args:
      name: of the unit, unique in the fleet.
      models: names of the models on it.
      start: makes an engine with an empty pool and queue; None for a unit that is only looked at.
      seconds: of each model: for each token of a request, from first to last, as planned.
    """

    def __init__(
        self,
        name: str,
        models: Iterable[str],
        start: Callable[[], E] | None,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        self.name = name
        self.model_names = frozenset(models)
        self.restarts = 0
        self._start = start
        self._seconds = dict(seconds or {})
        self._changing = threading.Lock()
        self._closed = False
        self._restarting = False
        self._observer: Observer | None = None
        self._engine = None if start is None else start()

    @property
    def engine(self) -> E:
        """Its loop, which may have ended.

        Raises:
          EngineDead: it was never started.
        """
        if self._engine is None:
            raise EngineDead("the fleet was loaded with warm_up=False: it cannot generate")
        return self._engine

    @property
    def alive(self) -> bool:
        """Whether its loop takes requests."""
        return self._engine is not None and self._engine.alive

    def seconds(self, model: str, num_tokens: int) -> float:
        """How long a request of so many tokens, output included, is expected to take."""
        return self._seconds.get(model, 1.0) * num_tokens

    def revive(self) -> None:
        """Starts the loop anew if it has ended.

        Raises:
          EngineDead: the unit is closed.
        """
        with self._changing:
            if not self.alive:
                self._check_open()
                self.engine.close()  # waits for its thread and frees its pool
                self._begin()

    def restart(self, reason: str) -> None:
        """Starts the loop anew, even if it runs or hangs: that one is left to itself.

        Does nothing if another thread was already doing it.

        Args:
          reason: told to whoever waits for it.

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
        """Shows every step from now on to a function, or to none; after a restart as well.

        Raises:
          EngineDead: it was never started.
        """
        with self._changing:
            self.engine.observe(observer)
            self._observer = observer

    def health(self) -> UnitHealth:
        """Whether it works; asks no engine."""
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
        """Ends running requests and frees the pool. May be called more than once."""
        with self._changing:
            self._closed = True
            if self._engine is not None:
                self._engine.close()

    def _check_open(self) -> None:
        if self._closed or self._start is None:
            raise EngineDead(f"unit {self.name} cannot be restarted: it is closed")

    def _begin(self) -> None:
        assert self._start is not None, "asked by _check_open"
        self._restarting = True
        try:
            self._engine = self._start()
        finally:
            self._restarting = False
        self._engine.observe(self._observer)
        self.restarts += 1
