"""A unit in another process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from muxjax.cluster.remote_engine import Peer, RemoteEngine
from muxjax.engine.loaded_model import LoadedModel
from muxjax.engine.supervisor import UnitSupervisor
from muxjax.scheduling.routing import PlannedLoad

Connect = Callable[[threading.Event], tuple[Peer, dict[str, LoadedModel]]]
"""Starts a process with the unit and waits until it serves. Returns the connection to it and its
models. Raises `EngineDead` early when the event is set."""


class RemoteUnit(UnitSupervisor[RemoteEngine]):
    """A `ServedUnit` in another process. A restart starts another process.

    Args:
      name: in the plan.
      models: names of its models.
      planned_load: what the plan expects of the unit.
      connect: called by the constructor, and for every restart.

    Raises:
      MuxError: the process cannot be started, or cannot load the unit.
    """

    def __init__(
        self, name: str, models: Iterable[str], planned_load: PlannedLoad, connect: Connect
    ) -> None:
        self.models: dict[str, LoadedModel] = {}
        self._closing = threading.Event()
        self._latest: dict[str, Any] = {"models": {}}

        def start() -> RemoteEngine:
            peer, loaded = connect(self._closing)
            self.models = self.models or loaded
            return RemoteEngine(name, peer)

        super().__init__(name, models, start, planned_load)

    @property
    def supervisor(self) -> UnitSupervisor:
        """See `ServedUnit`."""
        return self

    def state(self) -> dict[str, Any]:
        """Returns the latest counters that the other process has sent."""
        return self._latest

    def stats(self) -> dict[str, Any]:
        """Returns counters and gauges as `LocalUnit.stats`, and its `node` and `pid`.

        Raises:
          EngineDead: the engine has ended.
        """
        self._latest = {**self.engine.stats(), "restarts": self.restarts}
        return self._latest

    def close(self) -> None:
        """Ends running requests and the process. May be called several times."""
        self._closing.set()
        super().close()
