"""Which unit serves a request, and what becomes of it when that unit dies.

A model may be on several units (replicas). A request goes to the unit with the least expected wait:
the device time, as planned, of all that is outstanding there.

The router stands between engine and stream. It keeps each request's prompt, settings (the seed
among them) and the tokens that its stream was given. When a unit's loop ends, its requests go on in
a replica, or in the unit itself once that has been started anew: as a request that was preempted
does, by a prefill of prompt and emitted tokens. Sampling depends on the seed and the position only,
so the stream goes on with the tokens that it would have had.

Each unit is started anew in a thread of its own, since that may take as long as reading its weights
(when its process or its machine is gone). Requests that no living unit can take wait for it.

A request that has been on a unit for `MOST_MOVES` deaths is ended, since it may be what kills them;
a unit that dies `MOST_DEATHS` times within `DEATHS_SECONDS` is not started again.
"""

from __future__ import annotations

import enum
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from muxjax.engine import Sink
from muxjax.errors import EngineDead, MuxError
from muxjax.runner import Runner
from muxjax.scheduling.requests import Request, RequestUpdate

log = logging.getLogger(__name__)

MOST_MOVES = 3
MOST_DEATHS = 5
DEATHS_SECONDS = 60.0


class _News(enum.Enum):
    LOOK = "those that wait should be looked at again"
    CLOSE = "no more comes"


class _Carried:
    """A request and where it is; the engine's `Sink` for it.

    Attributes:
      request: as it was asked for.
      unit: where it runs or waits.
      seconds: what it counts for there.
      moves: how often its unit died.
      dropped: its caller does not want it any more.
      tokens: what its stream was given.
    """

    def __init__(self, router: Router, request: Request, sink: Sink) -> None:
        self._router = router
        self._sink = sink
        self.request = request
        self.unit: Runner | None = None
        self.seconds = 0.0
        self.moves = 0
        self.dropped = False
        self.tokens: list[int] = []

    def update(self, update: RequestUpdate) -> bool:
        """See `engine.Sink`."""
        self.tokens.extend(update.tokens)
        stopped = self._sink.update(update)
        if stopped or update.finish_reason is not None:
            self._router.forget(self)
        return stopped

    def cancelled(self) -> None:
        """See `engine.Sink`."""
        self._router.forget(self)
        self._sink.cancelled()

    def failed(self, error: BaseException) -> None:
        """See `engine.Sink`. Only a unit's death is got over."""
        if isinstance(error, EngineDead):
            self._router.orphaned(self, error)
        else:
            self.give_up(error)

    def give_up(self, error: BaseException) -> None:
        self._router.forget(self)
        self._sink.failed(error)

    def again(self) -> Request:
        """The request anew, with what it has emitted: for a unit that does not know it."""
        old = self.request
        return Request(
            id=old.id,
            model=old.model,
            prompt=old.prompt,
            params=old.params,
            stop_ids=old.stop_ids,
            arrival=old.arrival,
            output=list(self.tokens),
            constraint=None if old.constraint is None else old.constraint.anew(self.tokens),
        )


@dataclass(frozen=True)
class _Orphan:
    """A request whose unit has died, and of what."""

    carried: _Carried
    error: BaseException


class Router:
    """Sends requests to units and carries them over their deaths.

    Args:
      units: all of a fleet. Closed by `close`.
    """

    def __init__(self, units: Sequence[Runner]) -> None:
        self._units = list(units)
        self._lock = threading.Lock()
        self._carried: dict[int, _Carried] = {}
        self._waits = {unit.name: 0.0 for unit in units}
        self._deaths: dict[str, deque[float]] = {unit.name: deque() for unit in units}
        self._failed: dict[str, BaseException] = {}
        self._closing = False
        self._revivals: dict[str, threading.Thread] = {}
        self._waiting: list[_Orphan] = []  # the router's thread alone looks at it
        self._news: queue.SimpleQueue[_Orphan | _News] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._recover, name="muxjax-router", daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request whose fit was checked by the caller.

        Raises:
          EngineDead: the fleet is closed, or all units that have the model have failed for good.
        """
        carried = _Carried(self, request, sink)
        with self._lock:
            self._check_open(request.model)
            self._carried[request.id] = carried
        try:
            self._place(carried)
        except EngineDead as error:
            self.orphaned(carried, error)

    def cancel(self, request_id: int) -> None:
        """Ends a request; does nothing if it has ended."""
        with self._lock:
            carried = self._carried.get(request_id)
            if carried is None:
                return
            carried.dropped = True
            unit = carried.unit
        if unit is not None:
            unit.engine.cancel(request_id)
        self._news.put(_News.LOOK)  # it may wait for a unit

    def unit_names(self, model: str) -> list[str]:
        """The units that have a model."""
        return [unit.name for unit in self._units if model in unit.model_names]

    def waits(self) -> dict[str, float]:
        """Device time that is outstanding on each unit, as planned."""
        with self._lock:
            return dict(self._waits)

    def failure(self, unit: str) -> BaseException | None:
        """What a unit has failed with for good, or None."""
        return self._failed.get(unit)

    def close(self) -> None:
        """Ends all requests and closes the units. May be called more than once."""
        with self._lock:
            self._closing = True
        self._news.put(_News.CLOSE)
        self._thread.join()
        for unit in self._units:
            unit.close()
        for revival in list(self._revivals.values()):
            revival.join()
        with self._lock:
            left = list(self._carried.values())
        for carried in left:
            carried.give_up(EngineDead("the engine is closed"))

    # Called by carried requests, in the engines' threads

    def forget(self, carried: _Carried) -> None:
        """Drops a request that has ended."""
        with self._lock:
            if self._carried.pop(carried.request.id, None) is not None:
                self._leave(carried)

    def orphaned(self, carried: _Carried, error: BaseException) -> None:
        """Takes a request back whose unit has died."""
        with self._lock:
            self._leave(carried)
            closing = self._closing
        if closing:
            carried.give_up(error)
        else:
            self._news.put(_Orphan(carried, error))

    # Placing

    def _leave(self, carried: _Carried) -> None:
        if carried.unit is not None:
            self._waits[carried.unit.name] -= carried.seconds
            carried.seconds = 0.0

    def _check_open(self, model: str) -> None:
        if self._closing:
            raise EngineDead("the engine is closed")
        units = [unit for unit in self._units if model in unit.model_names]
        failed = [self._failed[u.name] for u in units if u.name in self._failed and not u.alive]
        if len(failed) == len(units):
            raise EngineDead(f"the engine has ended: {failed[0]}") from failed[0]

    def _place(self, carried: _Carried) -> None:
        """Hands a request to the living unit with the least expected wait.

        Raises:
          EngineDead: none is alive, or it died just now.
        """
        request = carried.request
        tokens = len(request.prompt) + request.params.max_tokens
        with self._lock:
            living = [u for u in self._units if request.model in u.model_names and u.alive]
            if not living:
                raise EngineDead(f"no unit with {request.model} is alive")
            unit = min(living, key=lambda unit: self._waits[unit.name])
            carried.unit = unit
            carried.seconds = unit.seconds(request.model, tokens)
            self._waits[unit.name] += carried.seconds
        unit.engine.submit(carried.again() if carried.moves else request, carried)
        if carried.dropped:  # cancelled before the unit knew it
            unit.engine.cancel(request.id)

    # Recovery, in a thread of its own

    def _recover(self) -> None:
        while (news := self._news.get()) is not _News.CLOSE:
            if isinstance(news, _Orphan):
                carried = news.carried
                carried.moves += 1
                if carried.unit is not None:
                    self._revive(carried.unit)
                if carried.moves > MOST_MOVES:
                    reason = f"given up after {MOST_MOVES} units died: {news.error}"
                    carried.give_up(EngineDead(reason))
                else:
                    self._carry_on(news)
            else:
                waiting, self._waiting = self._waiting, []
                for orphan in waiting:
                    self._carry_on(orphan)

    def _carry_on(self, orphan: _Orphan) -> None:
        """Places an orphan where it can go on, or lets it wait for a unit that is started anew."""
        carried = orphan.carried
        if carried.dropped:
            carried.cancelled()
            return
        try:
            if self._placed(carried):
                return
        except MuxError as fault:  # its output cannot be gone on with
            carried.give_up(fault)
            return
        units = [u for u in self._units if carried.request.model in u.model_names]
        hopes = [self._revive(unit) for unit in units]
        if any(hopes):
            self._waiting.append(orphan)
        else:
            carried.give_up(orphan.error)

    def _placed(self, carried: _Carried) -> bool:
        try:
            self._place(carried)
        except EngineDead:
            with self._lock:
                self._leave(carried)
            return False
        return True

    def _revive(self, unit: Runner) -> bool:
        """Begins to start a unit anew if it is dead; whether it lives or may live again."""
        if unit.name in self._revivals:
            return True
        if unit.alive:
            self._news.put(_News.LOOK)
            return True
        if unit.name in self._failed or self._closing:
            return False
        now, deaths = time.monotonic(), self._deaths[unit.name]
        deaths.append(now)
        while now - deaths[0] > DEATHS_SECONDS:
            deaths.popleft()
        if len(deaths) > MOST_DEATHS:
            reason = f"unit {unit.name} died {len(deaths)} times in {DEATHS_SECONDS:.0f} seconds"
            self._failed[unit.name] = EngineDead(reason)
            log.error("%s: it is not started again", reason)
            return False
        revival = threading.Thread(
            target=self._start_anew, args=(unit,), name=f"muxjax-revive-{unit.name}", daemon=True
        )
        self._revivals[unit.name] = revival
        revival.start()
        return True

    def _start_anew(self, unit: Runner) -> None:
        began = time.perf_counter()
        try:
            unit.revive()
        except (MuxError, RuntimeError) as error:  # JAX's errors are RuntimeErrors
            self._failed[unit.name] = error
            log.exception("unit %s cannot be started again", unit.name)
        else:
            seconds = time.perf_counter() - began
            log.warning("unit %s has been started again in %.2f s", unit.name, seconds)
        finally:
            del self._revivals[unit.name]
            self._news.put(_News.LOOK)
