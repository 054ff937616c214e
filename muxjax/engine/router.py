"""Routes requests to units, and moves them when their unit dies.

A model may be on several units (replicas). A request goes to the unit with the least expected load:
the seconds that the plan expects all its outstanding requests to take, this one included.

The router is between engine and stream. It stores each request's prompt, parameters (with the
seed) and emitted tokens. When an engine dies, its requests continue on a replica, or on the same
unit after a restart. The prompt and the emitted tokens are prefilled, as after a preemption.
Sampling depends on the seed and the position only, so the output does not change. Requests that no
living unit can serve wait for a restart.

A model may be held: its requests then wait here, in order of arrival, until it is released or
refused. A model can therefore sleep, wake or be replaced without losing a request.

A request fails when more than `MAX_MOVES` of its units have died, since it may be the cause.

Locks: `_lock` guards the fields below it in `Router.__init__`, and is not held while an engine is
called. Orphans are handled by the router's own thread.
"""

from __future__ import annotations

import enum
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from muxjax.engine.engine import Sink
from muxjax.engine.routed_request import RoutedRequest
from muxjax.engine.supervisor import UnitSupervisor
from muxjax.engine.unit_reviver import UnitReviver
from muxjax.errors import EngineDead, ModelUnavailable, MuxError, UnknownModel
from muxjax.scheduling.requests import Request
from muxjax.scheduling.routing import fastest_unit

MAX_MOVES = 3
"""Maximum number of unit deaths that a request survives."""


class _Event(enum.Enum):
    RETRY = "try to place the waiting orphans again"
    CLOSE = "end the router's thread"


@dataclass(frozen=True)
class _Orphan:
    """A request whose unit has died, and the error of that unit."""

    routed: RoutedRequest
    error: BaseException


class Router:
    """Routes the requests of a fleet. Its methods may be called from any thread.

    Args:
      units: all units of the fleet; closed by `close`.
      clock: seconds, for `idle_seconds`.

    Attributes:
      on_held: called with the model's name whenever a request is held; must not block.
    """

    def __init__(
        self, units: Sequence[UnitSupervisor], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.on_held: Callable[[str], None] = lambda model: None
        self._units = list(units)
        self._clock = clock
        self._began = clock()
        self._lock = threading.Lock()
        self._left_unit = threading.Condition(self._lock)  # a request has left its unit
        self._routed: dict[int, RoutedRequest] = {}
        self._held: dict[str, list[RoutedRequest]] = {}  # by model; a held model has a key
        self._refused: dict[str, ModelUnavailable] = {}
        self._last_used: dict[str, float] = {}
        self._load = {unit.name: 0.0 for unit in units}
        self._closing = False
        self._waiting: list[_Orphan] = []  # used by the router's thread only
        self._events: queue.SimpleQueue[_Orphan | _Event] = queue.SimpleQueue()
        self._reviver = UnitReviver(on_settled=lambda: self._events.put(_Event.RETRY))
        self._thread = threading.Thread(target=self._recover, name="muxjax-router", daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request that was checked by the caller.

        Raises:
          EngineDead: the fleet is closed, or all units of the model have failed permanently.
          ModelUnavailable, UnknownModel: the model is refused, or does not exist.
        """
        routed = RoutedRequest(self, request, sink)
        with self._lock:
            self._check_open(request.model)
            self._routed[request.id] = routed
        try:
            self._place(routed)
        except EngineDead as error:
            self.orphaned(routed, error)
        except ModelUnavailable:
            self.forget(routed)
            raise

    def cancel(self, request_id: int) -> None:
        """Ends a request; does nothing if it has ended."""
        with self._lock:
            routed = self._routed.get(request_id)
            if routed is None:
                return
            routed.cancel_requested = True
            unit = routed.unit
            held = self._held.get(routed.request.model, [])
            was_held = routed in held
            if was_held:
                held.remove(routed)
        if unit is not None:
            unit.engine.cancel(request_id)
        elif was_held:
            routed.cancelled()
        self._events.put(_Event.RETRY)  # the request may be a waiting orphan

    # Held models

    def hold(self, model: str) -> None:
        """Holds a model's new requests; those on a unit continue."""
        with self._lock:
            self._held.setdefault(model, [])
            self._refused.pop(model, None)
        self._events.put(_Event.RETRY)  # also holds the orphans of the model

    def release(self, model: str) -> None:
        """Submits a model's held requests to its units, in order, and no longer holds new ones."""
        while True:
            with self._lock:
                waiting = sorted(self._held.get(model, []), key=lambda routed: routed.request.id)
                self._last_used[model] = self._clock()
                if not waiting:
                    self._held.pop(model, None)
                    self._refused.pop(model, None)
                    return
                self._held[model] = []  # requests that arrive now wait behind these
            for routed in waiting:
                try:
                    with self._lock:
                        self._assign(routed)
                    self._submit(routed)
                except EngineDead as error:
                    self.orphaned(routed, error)

    def refuse(self, model: str, error: ModelUnavailable) -> None:
        """Fails a model's held requests, and refuses new ones until `hold` or `release`."""
        with self._lock:
            self._refused[model] = error
            waiting = self._held.pop(model, [])
        for routed in waiting:
            routed.fail(error)

    def forget_model(self, model: str) -> None:
        """Drops the state of a model that was removed from its units."""
        with self._lock:
            self._refused.pop(model, None)
            self._last_used.pop(model, None)

    def num_held(self, model: str) -> int:
        """Number of held requests of a model."""
        with self._lock:
            return len(self._held.get(model, ()))

    def wait_drained(self, model: str, seconds: float) -> bool:
        """Waits until no unit has requests of a model; False if some remain after `seconds`."""
        with self._lock:
            return self._left_unit.wait_for(lambda: not self._on_units(model), seconds)

    def withdraw(self, model: str) -> None:
        """Withdraws the running requests of a held model from their units.

        They are held, and continue after their emitted tokens when the model is released.
        """
        with self._lock:
            running = {routed.request.id: routed for routed in self._on_units(model)}
            units = [unit for unit in self._units if model in unit.model_names]
        for unit in units:
            try:
                withdrawn = unit.engine.withdraw(running)
            except EngineDead:
                continue  # its requests are recovered as orphans
            with self._lock:
                for request_id in withdrawn:
                    self._unload(running[request_id])
                    self._add_held(running[request_id])

    def idle_seconds(self, model: str) -> float:
        """Seconds since a model had a request; 0 while it has one."""
        with self._lock:
            if self._held.get(model) or self._on_units(model):
                return 0.0
            return self._clock() - self._last_used.get(model, self._began)

    def _on_units(self, model: str) -> list[RoutedRequest]:
        return [
            routed
            for routed in self._routed.values()
            if routed.request.model == model and routed.unit is not None
        ]

    def _add_held(self, routed: RoutedRequest) -> None:
        routed.unit = None
        self._held[routed.request.model].append(routed)
        self._left_unit.notify_all()

    # State

    def unit_names(self, model: str) -> list[str]:
        """Names of the units that have a model."""
        return [unit.name for unit in self._units if model in unit.model_names]

    def expected_load(self) -> dict[str, float]:
        """By unit: the seconds that its outstanding requests are expected to take."""
        with self._lock:
            return dict(self._load)

    def failure(self, unit: str) -> BaseException | None:
        """The error of a unit that has failed permanently, or None."""
        return self._reviver.failure(unit)

    def close(self) -> None:
        """Ends all requests and closes the units. May be called more than once."""
        with self._lock:
            self._closing = True
        self._events.put(_Event.CLOSE)
        self._thread.join()
        for unit in self._units:
            unit.close()
        self._reviver.join()
        with self._lock:
            remaining = list(self._routed.values())
        for routed in remaining:
            routed.fail(EngineDead("the engine is closed"))

    # Called by routed requests, in the engines' threads

    def forget(self, routed: RoutedRequest) -> None:
        """See `RequestOwner`."""
        with self._lock:
            if self._routed.pop(routed.request.id, None) is not None:
                self._last_used[routed.request.model] = self._clock()
                self._unload(routed)
                self._left_unit.notify_all()

    def orphaned(self, routed: RoutedRequest, error: BaseException) -> None:
        """See `RequestOwner`."""
        with self._lock:
            self._unload(routed)
            closing = self._closing
        if closing:
            routed.fail(error)
        else:
            self._events.put(_Orphan(routed, error))

    # Placement on units

    def _unload(self, routed: RoutedRequest) -> None:
        """Subtracts a request from the expected load of its unit."""
        if routed.unit is not None:
            self._load[routed.unit.name] -= routed.expected_seconds
            routed.expected_seconds = 0.0

    def _check_open(self, model: str) -> None:
        if self._closing:
            raise EngineDead("the engine is closed")
        if model in self._refused:
            raise self._refused[model]
        units = [unit for unit in self._units if model in unit.model_names]
        if not units:
            raise UnknownModel(f"no model {model!r}: it was unloaded", field="model")
        failures = [None if unit.alive else self.failure(unit.name) for unit in units]
        if all(failures):
            raise EngineDead(f"the engine has ended: {failures[0]}") from failures[0]

    def _place(self, routed: RoutedRequest) -> None:
        """Submits a request to the least loaded living unit of its model, or holds it.

        Raises:
          ModelUnavailable: the model is refused.
          EngineDead: no unit is alive, or the chosen unit has just died.
        """
        model = routed.request.model
        with self._lock:
            if model in self._refused:
                raise self._refused[model]
            held = model in self._held
            if held and not routed.cancel_requested:
                self._add_held(routed)
            elif not held:
                self._assign(routed)
        if not held:
            self._submit(routed)
        elif routed.cancel_requested:
            routed.cancelled()
        else:
            self.on_held(model)

    def _assign(self, routed: RoutedRequest) -> None:
        """Chooses the unit of a request.

        Raises:
          EngineDead: no unit is alive.
        """
        request = routed.request
        num_tokens = len(request.prompt) + request.params.max_tokens
        living = [unit for unit in self._units if request.model in unit.model_names and unit.alive]
        if not living:
            raise EngineDead(f"no unit with {request.model} is alive")
        unit = fastest_unit(living, self._load, request.model, num_tokens)
        routed.unit = unit
        routed.expected_seconds = unit.planned_load.seconds(request.model, num_tokens)
        self._load[unit.name] += routed.expected_seconds

    def _submit(self, routed: RoutedRequest) -> None:
        unit, request = routed.unit, routed.request
        assert unit is not None, "set by _assign"
        if routed.was_placed:
            request = routed.resubmission()
        routed.was_placed = True
        unit.engine.submit(request, routed)
        if routed.cancel_requested:  # `cancel` may have run before the unit had the request
            unit.engine.cancel(request.id)

    # Recovery of orphans, in the router's thread

    def _recover(self) -> None:
        while (event := self._events.get()) is not _Event.CLOSE:
            if isinstance(event, _Orphan):
                routed = event.routed
                routed.moves += 1
                if routed.unit is not None:
                    self._revive(routed.unit)
                if routed.moves > MAX_MOVES:
                    reason = f"given up after {MAX_MOVES} units died: {event.error}"
                    routed.fail(EngineDead(reason))
                else:
                    self._recover_orphan(event)
            else:
                waiting, self._waiting = self._waiting, []
                for orphan in waiting:
                    self._recover_orphan(orphan)

    def _recover_orphan(self, orphan: _Orphan) -> None:
        """Places an orphan on a living unit, or queues it until a unit is restarted."""
        routed = orphan.routed
        if routed.cancel_requested:
            routed.cancelled()
            return
        try:
            if self._try_place(routed):
                return
        except MuxError as error:  # the model is refused, or the output cannot be continued
            routed.fail(error)
            return
        units = [unit for unit in self._units if routed.request.model in unit.model_names]
        recoverable = [self._revive(unit) for unit in units]
        if any(recoverable):
            self._waiting.append(orphan)
        else:
            routed.fail(orphan.error)

    def _try_place(self, routed: RoutedRequest) -> bool:
        try:
            self._place(routed)
        except EngineDead:
            with self._lock:
                self._unload(routed)
            return False
        return True

    def _revive(self, unit: UnitSupervisor) -> bool:
        """Restarts a unit if it is dead; returns whether it is alive or being restarted."""
        if unit.alive:
            self._events.put(_Event.RETRY)
            return True
        return not self._closing and self._reviver.revive(unit)
