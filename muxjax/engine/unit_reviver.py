"""Restarts units whose engine has died, each in a separate thread.

If the unit's process or machine is gone, a restart reads the weights again. A unit that dies more
than `MAX_DEATHS` times within `DEATH_WINDOW_SECONDS` is not restarted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from muxjax.engine.supervisor import UnitSupervisor
from muxjax.errors import EngineDead, MuxError

log = logging.getLogger(__name__)

MAX_DEATHS = 5
"""Maximum number of restarts of a unit within the window."""
DEATH_WINDOW_SECONDS = 60.0


class UnitReviver:
    """Restarts dead units. `revive` is called by one thread; the other methods by any.

    Args:
      on_settled: called when a restart has succeeded or failed, in that restart's thread.
    """

    def __init__(self, on_settled: Callable[[], None]) -> None:
        self._on_settled = on_settled
        self._deaths: dict[str, deque[float]] = {}
        self._failed: dict[str, BaseException] = {}
        self._restarts: dict[str, threading.Thread] = {}

    def failure(self, unit: str) -> BaseException | None:
        """The error of a unit that has failed permanently, or None."""
        return self._failed.get(unit)

    def revive(self, unit: UnitSupervisor) -> bool:
        """Starts to restart a dead unit, unless a restart is in progress.

        Returns:
          Whether the unit is alive or being restarted; False if it has failed permanently.
        """
        if unit.name in self._restarts or unit.alive:
            return True
        if unit.name in self._failed:
            return False
        now = time.monotonic()
        deaths = self._deaths.setdefault(unit.name, deque())
        deaths.append(now)
        while now - deaths[0] > DEATH_WINDOW_SECONDS:
            deaths.popleft()
        if len(deaths) > MAX_DEATHS:
            reason = (
                f"unit {unit.name} died {len(deaths)} times in {DEATH_WINDOW_SECONDS:.0f} seconds"
            )
            self._failed[unit.name] = EngineDead(reason)
            log.error("%s: it is not restarted again", reason)
            return False
        restart = threading.Thread(
            target=self._restart, args=(unit,), name=f"muxjax-revive-{unit.name}", daemon=True
        )
        self._restarts[unit.name] = restart
        restart.start()
        return True

    def join(self) -> None:
        """Waits for the restarts in progress."""
        for restart in list(self._restarts.values()):
            restart.join()

    def _restart(self, unit: UnitSupervisor) -> None:
        began = time.perf_counter()
        try:
            unit.revive()
        except (MuxError, RuntimeError) as error:  # JAX's errors are RuntimeErrors
            self._failed[unit.name] = error
            log.exception("unit %s cannot be restarted", unit.name)
        else:
            seconds = time.perf_counter() - began
            log.warning("unit %s was restarted in %.2f s", unit.name, seconds)
        finally:
            del self._restarts[unit.name]
            self._on_settled()
