"""What a fleet needs of a unit, in this process or in another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from muxjax.engine.engine import Observer
from muxjax.engine.health import UnitHealth
from muxjax.engine.loaded_model import LoadedModel
from muxjax.engine.supervisor import UnitSupervisor


@runtime_checkable
class ServedUnit(Protocol):
    """A unit of a fleet: `LocalUnit`, or `cluster.RemoteUnit` in another process."""

    @property
    def name(self) -> str:
        """Unique in the fleet."""
        ...

    @property
    def supervisor(self) -> UnitSupervisor:
        """Its engine, as the router sees it."""
        ...

    @property
    def models(self) -> Mapping[str, LoadedModel]:
        """Its models by name, sleeping ones included."""
        ...

    def health(self) -> UnitHealth:
        """Returns whether it works; asks no engine, so it answers while one hangs."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns the counters without asking the engine; they may not agree with each other."""
        ...

    def stats(self) -> dict[str, Any]:
        """Returns counters and gauges.

        Raises:
          EngineDead: the engine has ended.
        """
        ...

    def restart(self, reason: str) -> None:
        """Starts a new engine with an empty pool, even if the present one runs or hangs.

        Args:
          reason: for the requests that end with the present engine.

        Raises:
          EngineDead: the unit is closed.
        """
        ...

    def observe(self, observer: Observer | None) -> None:
        """Passes every later step to a function, also after a restart; None ends that.

        Raises:
          EngineDead: no engine was ever started.
          MuxError: the steps of this unit cannot be observed.
        """
        ...
