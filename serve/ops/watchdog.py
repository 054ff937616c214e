"""Watchdog: restarts units that have ended or hang.

A unit hangs if it has work and has executed no step for `stall_timeout` seconds. Before a restart
the watchdog logs the counters of all models and the stacks of all threads. Stacks contain lines of
code but no values of variables, and therefore no prompts. The unit's requests continue on a replica
or on the restarted unit.

A unit that ends more than `restarts` times in ten minutes stays down. `/health` then reports it, so
that the supervisor of the process can act.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

from muxjax.engine.health import UnitHealth
from muxjax.errors import MuxError
from muxjax.serve import logs
from muxjax.serve.fleet_protocol import ManagedFleet

_PERIOD = 600.0
"""Seconds for which a restart counts toward the limit."""


class Watchdog:
    """Checks the units of a fleet periodically, in a thread, until it is closed.

    Args:
      fleet: the fleet to watch.
      stall_timeout: seconds without a step after which a unit with work counts as hanging.
      restarts: maximum number of restarts of a unit in ten minutes.
      interval: seconds between checks; by default a quarter of `stall_timeout`, at most one.
      clock: current time in seconds.
    """

    def __init__(
        self,
        fleet: ManagedFleet,
        *,
        stall_timeout: float,
        restarts: int,
        interval: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._stall_timeout = stall_timeout
        self._max_restarts = restarts
        self._clock = clock
        self._restart_times: dict[str, deque[float]] = {}
        self._lost: set[str] = set()
        self._stop = threading.Event()
        self._interval = min(1.0, stall_timeout / 4) if interval is None else interval
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread; possible again after `close`."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="muxjax-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def is_lost(self, unit: str) -> bool:
        """Whether a unit has ended and will not be restarted."""
        return unit in self._lost

    def check_units(self) -> None:
        """Checks all units once and restarts those that have ended or hang."""
        for unit in self._fleet.health():
            if unit.works(self._stall_timeout):
                self._lost.discard(unit.unit)
                continue
            if unit.unit in self._lost or unit.restarting:
                continue
            if not unit.alive and unit.reason is None:
                continue  # closed on purpose
            self._recover(unit)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self.check_units()
            except Exception:  # the watchdog must survive any error
                logging.getLogger(__name__).exception("watchdog check failed")

    def _recover(self, unit: UnitHealth) -> None:
        if unit.alive:
            reason = (
                f"unit {unit.unit} was restarted: it executed no step for "
                f"{unit.stalled_seconds:.1f} s although requests were waiting"
            )
        else:
            reason = f"unit {unit.unit} was restarted: it had ended with: {unit.reason}"
        logs.event(
            "unit_failed",
            logging.ERROR,
            unit=unit.unit,
            alive=unit.alive,
            stalled_seconds=round(unit.stalled_seconds, 3),
            reason=unit.reason,
            state=describe_state(self._fleet),
            stacks=describe_stacks(),
        )
        recent = self._restart_times.setdefault(unit.unit, deque())
        now = self._clock()
        while recent and now - recent[0] >= _PERIOD:
            recent.popleft()
        if len(recent) >= self._max_restarts:
            self._lost.add(unit.unit)
            logs.event("unit_given_up", logging.CRITICAL, unit=unit.unit, restarts=len(recent))
            return
        recent.append(now)
        try:
            self._fleet.restart(unit.unit, reason)
        except MuxError as error:
            self._lost.add(unit.unit)
            logs.event("unit_not_restarted", logging.CRITICAL, unit=unit.unit, reason=str(error))
            return
        logs.event("unit_restarted", logging.WARNING, unit=unit.unit, restarts=len(recent))


def describe_state(fleet: ManagedFleet) -> str:
    """Formats the counters of the fleet and of each model, one line each."""
    try:
        state = fleet.stats(block=False)
    except Exception as error:  # noqa: BLE001  the engine may change it at the same time
        return f"not readable: {type(error).__name__}"
    lines = []
    for model, counters in state.get("models", {}).items():
        values = (f"{key}={value:.6g}" for key, value in counters.items() if _is_number(value))
        lines.append(f"{model}: {' '.join(values)}")
    fleet_values = (f"{key}={value}" for key, value in state.items() if _is_number(value))
    return "\n".join([" ".join(fleet_values), *lines])


def describe_stacks() -> str:
    """Formats the stacks of all other threads: thread names and lines of code."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        parts.append(f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
