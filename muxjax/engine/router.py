"""Which unit serves a request, and what becomes of it when that unit dies.

A model may be on several units (replicas). A request goes to the unit with the least of what the
plan expects requests to take, over all that are outstanding there and itself.

The router stands between engine and stream. It keeps each request's prompt, settings (the seed
among them) and the tokens that its stream was given. When a unit's loop ends, its requests go on in
a replica, or in the unit itself once that has been started anew: as a request that was preempted
does, by a prefill of prompt and emitted tokens. Sampling depends on the seed and the position only,
so the stream goes on with the tokens that it would have had.

A model may be held: its requests then wait here, in the order in which they came, until it is
released or refused. That is how a model sleeps, wakes and is replaced without losing a request.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from muxjax.engine.engine import Sink
from muxjax.engine.routed_request import RoutedRequest
from muxjax.engine.supervisor import UnitSupervisor
from muxjax.errors import EngineDead, ModelUnavailable, MuxError, UnknownModel
from muxjax.scheduling.requests import Request
from muxjax.scheduling.routing import least_loaded

log = logging.getLogger(__name__)

MOST_MOVES = 3
MOST_DEATHS = 5
DEATHS_SECONDS = 60.0


class _News(enum.Enum):
    LOOK = "those that wait should be looked at again"
    CLOSE = "no more comes"


@dataclass(frozen=True)
class _Orphan:
    """A request whose unit has died, and of what."""

    carried: RoutedRequest
    error: BaseException


class Router:
    """Sends requests to units and carries them over their deaths.

    Args:
      units: all of a fleet. Closed by `close`.
      clock: seconds, for `idle_seconds`.

    Attributes:
      on_held: told the name of the model whenever a request is held; must not wait.
    """

    def __init__(
        self, units: Sequence[UnitSupervisor], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.on_held: Callable[[str], None] = lambda model: None
        self._units = list(units)
        self._clock = clock
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)  # some request left its unit
        self._held: dict[str, list[RoutedRequest]] = {}  # of models that are held
        self._refused: dict[str, ModelUnavailable] = {}
        self._used: dict[str, float] = {}
        self._began = clock()
        self._carried: dict[int, RoutedRequest] = {}
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
          ModelUnavailable, UnknownModel: the model is refused, or there is none.
        """
        carried = RoutedRequest(self, request, sink)
        with self._lock:
            self._check_open(request.model)
            self._carried[request.id] = carried
        try:
            self._place(carried)
        except EngineDead as error:
            self.orphaned(carried, error)
        except ModelUnavailable:
            self.forget(carried)
            raise

    def cancel(self, request_id: int) -> None:
        """Ends a request; does nothing if it has ended."""
        with self._lock:
            carried = self._carried.get(request_id)
            if carried is None:
                return
            carried.dropped = True
            unit = carried.unit
            held = self._held.get(carried.request.model, [])
            waited = carried in held
            if waited:
                held.remove(carried)
        if unit is not None:
            unit.engine.cancel(request_id)
        elif waited:
            carried.cancelled()
        self._news.put(_News.LOOK)  # it may wait for a unit

    # Models that are held

    def hold(self, model: str) -> None:
        """Keeps a model's further requests here; those on a unit go on."""
        with self._lock:
            self._held.setdefault(model, [])
            self._refused.pop(model, None)
        self._news.put(_News.LOOK)  # what waits for a unit waits here now

    def release(self, model: str) -> None:
        """Sends a model's held requests to its units, in order, and then whatever comes."""
        while True:
            with self._lock:
                waiting = sorted(self._held.get(model, []), key=lambda one: one.request.id)
                self._used[model] = self._clock()
                if not waiting:
                    self._held.pop(model, None)
                    self._refused.pop(model, None)
                    return
                self._held[model] = []  # what comes now waits behind those
            for carried in waiting:
                try:
                    with self._lock:
                        self._assign(carried)
                    self._submit(carried)
                except EngineDead as error:
                    self.orphaned(carried, error)

    def refuse(self, model: str, error: ModelUnavailable) -> None:
        """Ends a model's held requests with an error, and refuses all that come, until `hold`."""
        with self._lock:
            self._refused[model] = error
            waiting = self._held.pop(model, [])
        for carried in waiting:
            carried.give_up(error)

    def forget_model(self, model: str) -> None:
        """Drops what is remembered of a model that no unit has any more."""
        with self._lock:
            self._refused.pop(model, None)
            self._used.pop(model, None)

    def held(self, model: str) -> int:
        """How many requests of a model are held."""
        with self._lock:
            return len(self._held.get(model, ()))

    def drained(self, model: str, seconds: float) -> bool:
        """Waits until no unit has requests of a model; False if some still has after so long."""
        with self._lock:
            return self._ended.wait_for(lambda: not self._on_units(model), seconds)

    def take_back(self, model: str) -> None:
        """Takes what the units still have of a model that is held: it waits here, and goes on with
        what it has emitted when the model is released.
        """
        with self._lock:
            running = {carried.request.id: carried for carried in self._on_units(model)}
            units = [unit for unit in self._units if model in unit.model_names]
        for unit in units:
            try:
                taken = unit.engine.withdraw(running)
            except EngineDead:
                continue  # it gave them back itself
            with self._lock:
                for number in taken:
                    self._leave(running[number])
                    self._keep(running[number])

    def idle_seconds(self, model: str) -> float:
        """For how long a model has had no request; 0 while it has one."""
        with self._lock:
            if self._held.get(model) or self._on_units(model):
                return 0.0
            return self._clock() - self._used.get(model, self._began)

    def _on_units(self, model: str) -> list[RoutedRequest]:
        carried = self._carried.values()
        return [c for c in carried if c.request.model == model and c.unit is not None]

    def _keep(self, carried: RoutedRequest) -> None:
        carried.unit = None
        self._held[carried.request.model].append(carried)
        self._ended.notify_all()

    def unit_names(self, model: str) -> list[str]:
        """The units that have a model."""
        return [unit.name for unit in self._units if model in unit.model_names]

    def waits(self) -> dict[str, float]:
        """What all that is outstanding on each unit is expected to take, in seconds."""
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

    def forget(self, carried: RoutedRequest) -> None:
        """Drops a request that has ended."""
        with self._lock:
            if self._carried.pop(carried.request.id, None) is not None:
                self._used[carried.request.model] = self._clock()
                self._leave(carried)
                self._ended.notify_all()

    def orphaned(self, carried: RoutedRequest, error: BaseException) -> None:
        """Takes a request back whose unit has died."""
        with self._lock:
            self._leave(carried)
            closing = self._closing
        if closing:
            carried.give_up(error)
        else:
            self._news.put(_Orphan(carried, error))

    # Placing

    def _leave(self, carried: RoutedRequest) -> None:
        if carried.unit is not None:
            self._waits[carried.unit.name] -= carried.seconds
            carried.seconds = 0.0

    def _check_open(self, model: str) -> None:
        if self._closing:
            raise EngineDead("the engine is closed")
        if model in self._refused:
            raise self._refused[model]
        units = [unit for unit in self._units if model in unit.model_names]
        if not units:
            raise UnknownModel(f"no model {model!r}: it was unloaded", field="model")
        failed = [self._failed[u.name] for u in units if u.name in self._failed and not u.alive]
        if len(failed) == len(units):
            raise EngineDead(f"the engine has ended: {failed[0]}") from failed[0]

    def _place(self, carried: RoutedRequest) -> None:
        """Hands a request to the living unit that is least laden with it, or holds it.

        Raises:
          ModelUnavailable: the model is refused.
          EngineDead: none is alive, or it died just now.
        """
        model = carried.request.model
        with self._lock:
            if model in self._refused:
                raise self._refused[model]
            held = model in self._held
            if held and not carried.dropped:
                self._keep(carried)
            elif not held:
                self._assign(carried)
        if not held:
            self._submit(carried)
        elif carried.dropped:
            carried.cancelled()
        else:
            self.on_held(model)

    def _assign(self, carried: RoutedRequest) -> None:
        """Chooses a unit.

        Raises:
          EngineDead: none is alive.
        """
        request = carried.request
        tokens = len(request.prompt) + request.params.max_tokens
        living = [u for u in self._units if request.model in u.model_names and u.alive]
        if not living:
            raise EngineDead(f"no unit with {request.model} is alive")
        unit = least_loaded(living, self._waits, request.model, tokens)
        carried.unit = unit
        carried.seconds = unit.seconds(request.model, tokens)
        self._waits[unit.name] += carried.seconds

    def _submit(self, carried: RoutedRequest) -> None:
        unit, request = carried.unit, carried.request
        assert unit is not None, "a unit was chosen"
        again, carried.placed = carried.placed, True
        unit.engine.submit(carried.again() if again else request, carried)
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

    def _placed(self, carried: RoutedRequest) -> bool:
        try:
            self._place(carried)
        except EngineDead:
            with self._lock:
                self._leave(carried)
            return False
        return True

    def _revive(self, unit: UnitSupervisor) -> bool:
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

    def _start_anew(self, unit: UnitSupervisor) -> None:
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
