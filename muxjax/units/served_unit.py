"""The interface of a unit for its fleet, in this process or in another one."""

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
        """Its engine, for the router."""
        ...

    @property
    def models(self) -> Mapping[str, LoadedModel]:
        """Its models by name, sleeping ones included."""
        ...

    def health(self) -> UnitHealth:
        """Returns its health without calling the engine, which may hang."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns the counters without calling the engine; they may be inconsistent."""
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
          reason: message of the error for the present engine's requests.

        Raises:
          EngineDead: the unit is closed.
        """
        ...

    def observe(self, observer: Observer | None) -> None:
        """Calls `observer` for every later step, also after a restart; None removes it.

        Raises:
          EngineDead: no engine was ever started.
          MuxError: the steps of this unit cannot be observed.
        """
        ...
