"""Keeps an engine running: the engine of a unit, which may be started anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

from muxjax.engine import Engine, Observer
from muxjax.errors import EngineDead
from muxjax.health import UnitHealth


class Runner:
    """A unit as the router sees it.

    Args:
      name: of the unit, unique in the fleet.
      models: names of the models on it.
      start: makes an engine with an empty pool and queue; None for a unit that is only looked at.
      seconds: of each model: device time that a token of a request is expected to take.
    """

    def __init__(
        self,
        name: str,
        models: Iterable[str],
        start: Callable[[], Engine] | None,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        self.name = name
        self.model_names = frozenset(models)
        self.restarts = 0
        self._start = start
        self._seconds = dict(seconds or {})
        self._changing = threading.Lock()
        self._closed = False
        self._observer: Observer | None = None
        self._engine = None if start is None else start()

    @property
    def engine(self) -> Engine:
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
        """What a request of so many tokens, output included, is expected to take of the devices."""
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

        Args:
          reason: told to whoever waits for it.

        Raises:
          EngineDead: the unit is closed.
        """
        with self._changing:
            self._check_open()
            self.engine.abandon(reason)
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
        self._engine = self._start()
        self._engine.observe(self._observer)
        self.restarts += 1
