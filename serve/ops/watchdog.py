"""Watches the units from a thread of its own, and starts one anew that has ended or hangs.

A unit hangs when it has work and has made no step for `stall_timeout` seconds. Before it is
restarted its state is logged: the stacks of all threads, queues, quotas. Stacks are lines of code,
without the values of variables, so nothing of a prompt is in them. The requests of the unit end
with an error that says why.

A unit that ends again and again is left ended after `restarts` times in ten minutes; `/health` then
says so, for whatever supervises the process.
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
from muxjax.serve.fleet_protocol import SupervisedFleet
from muxjax.serve.ops import logs

_PERIOD = 600.0


class Watchdog:
    """Looks after a fleet until closed.

    Args:
      fleet: its units are watched.
      stall_timeout: seconds without a step, while there is work.
      restarts: most restarts of a unit in ten minutes.
      interval: seconds between looks; by default a quarter of `stall_timeout`, at most one.
    """

    def __init__(
        self,
        fleet: SupervisedFleet,
        *,
        stall_timeout: float,
        restarts: int,
        interval: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._stall_timeout = stall_timeout
        self._most = restarts
        self._clock = clock
        self._restarted: dict[str, deque[float]] = {}
        self._given_up: set[str] = set()
        self._stop = threading.Event()
        self._interval = min(1.0, stall_timeout / 4) if interval is None else interval
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to watch; again after `close` too."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="muxjax-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends watching."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def lost(self, unit: str) -> bool:
        """Whether a unit has ended and will not be started again."""
        return unit in self._given_up

    def look(self) -> None:
        """One look at all units, with what follows from it."""
        for unit in self._fleet.health():
            if unit.works(self._stall_timeout):
                self._given_up.discard(unit.unit)
                continue
            if unit.unit in self._given_up or unit.restarting:
                continue
            if not unit.alive and unit.reason is None:
                continue  # closed on purpose
            self._handle(unit)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self.look()
            except Exception:  # whatever it is, the watching goes on, and the log has it
                logging.getLogger(__name__).exception("the watchdog's look failed")

    def _handle(self, unit: UnitHealth) -> None:
        if unit.alive:
            reason = (
                f"unit {unit.unit} made no step for {unit.stalled_seconds:.1f} s with requests "
                "waiting for one, and was restarted"
            )
        else:
            reason = f"unit {unit.unit} ended and was restarted: {unit.reason}"
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
        recent = self._restarted.setdefault(unit.unit, deque())
        now = self._clock()
        while recent and now - recent[0] >= _PERIOD:
            recent.popleft()
        if len(recent) >= self._most:
            self._given_up.add(unit.unit)
            logs.event("unit_given_up", logging.CRITICAL, unit=unit.unit, restarts=len(recent))
            return
        recent.append(now)
        try:
            self._fleet.restart(unit.unit, reason)
        except MuxError as error:
            self._given_up.add(unit.unit)
            logs.event("unit_not_restarted", logging.CRITICAL, unit=unit.unit, reason=str(error))
            return
        logs.event("unit_restarted", logging.WARNING, unit=unit.unit, restarts=len(recent))


def describe_state(fleet: SupervisedFleet) -> str:
    """Queues, pages and quotas of every model, in a line each."""
    try:
        state = fleet.stats(block=False)
    except Exception as error:  # noqa: BLE001  read while a loop changes it: any part may be amiss
        return f"not readable: {type(error).__name__}"
    lines = []
    for model, found in state.get("models", {}).items():
        shown = (f"{key}={value:.6g}" for key, value in found.items() if _is_number(value))
        lines.append(f"{model}: {' '.join(shown)}")
    rest = (f"{key}={value}" for key, value in state.items() if _is_number(value))
    return "\n".join([" ".join(rest), *lines])


def describe_stacks() -> str:
    """Where every thread is: names of threads, lines of code."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        parts.append(f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
