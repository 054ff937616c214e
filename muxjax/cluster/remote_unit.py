"""A unit in another process, as a fleet sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from muxjax.cluster.remote_engine import Peer, RemoteEngine
from muxjax.engine.supervisor import UnitSupervisor
from muxjax.units.unit_spec import LoadedModel

Connect = Callable[[threading.Event], tuple[Peer, dict[str, LoadedModel]]]
"""Starts another process with the unit and waits until it serves; gives the way to it, and what it
holds. Ends early, with `EngineDead`, when the event is set."""


class RemoteUnit(UnitSupervisor[RemoteEngine]):
    """See `muxjax.units.local_unit.LocalUnit`. It is started anew by starting another process.

    Args:
      name: in the plan.
      seconds: for each of its models, see `UnitSupervisor`.
      connect: called at once, and for every new start.

    Raises:
      MuxError: the process cannot be started, or the unit not be loaded there.
    """

    def __init__(self, name: str, seconds: Mapping[str, float], connect: Connect) -> None:
        self.models: dict[str, LoadedModel] = {}
        self._closing = threading.Event()
        self._latest: dict[str, Any] = {"models": {}}

        def start() -> RemoteEngine:
            peer, models = connect(self._closing)
            self.models = self.models or models
            return RemoteEngine(name, peer)

        super().__init__(name, seconds, start, seconds)

    def state(self) -> dict[str, Any]:
        """The counters as they were told last."""
        return self._latest

    def stats(self) -> dict[str, Any]:
        """Counters and gauges, as `LiveUnit.stats`; and `node` and `pid`, where it runs.

        Raises:
          EngineDead: it has ended.
        """
        self._latest = {**self.engine.stats(), "restarts": self.restarts}
        return self._latest

    def close(self) -> None:
        """Ends running requests and the process. May be called more than once."""
        self._closing.set()
        super().close()
