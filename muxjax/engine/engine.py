"""The loop of a unit: one thread that makes steps, runs them, and hands out what they gave.

It stays one step ahead of the device: step n+1 is submitted before the tokens of step n are read,
so the device does not wait for the host. All state of the unit is touched by this thread only;
others leave commands in an inbox.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, InvalidStateError
from typing import Any, Protocol, runtime_checkable

from muxjax.errors import EngineDead, InvalidRequest, Overloaded
from muxjax.scheduling.requests import Request, RequestUpdate
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import (
    STEPS_AHEAD,
    Executor,
    Handle,
    PoisonsPages,
    Step,
    StepResult,
)

log = logging.getLogger(__name__)

_STUCK_SECONDS = 0.05
"""How long to wait where requests exist and no step can be made: time moves quotas."""

Observer = Callable[[Scheduler, Step, StepResult], None]
"""Is shown each step that has been applied; called in the engine's thread, must not wait."""


@runtime_checkable
class Sink(Protocol):
    """Where the updates of one request go. Called in the engine's thread; must not wait."""

    def update(self, update: RequestUpdate) -> bool:
        """Takes new tokens; True ends the request (a stop string was met)."""
        ...

    def cancelled(self) -> None:
        """The request was cancelled; nothing follows."""
        ...

    def failed(self, error: BaseException) -> None:
        """The engine has ended, and the request with it; nothing follows."""
        ...


class Engine:
    """Runs a unit on an executor until closed.

    Args:
      unit: its requests come from `submit` only.
      executor: closed with the engine.
      poison: test mode: pages that are freed are filled with NaN.

    Raises:
      ValueError: `poison` is set and the executor cannot poison pages.
    """

    def __init__(self, unit: Scheduler, executor: Executor, *, poison: bool = False) -> None:
        self._unit = unit
        self._executor = executor
        self._poisoner: PoisonsPages | None = None
        if poison:
            if not isinstance(executor, PoisonsPages):
                raise ValueError(f"{type(executor).__name__} cannot poison pages")
            self._poisoner = executor
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._sinks: dict[int, Sink] = {}
        self._calls: set[Future[Any]] = set()
        self._closing = False
        self._observer: Observer | None = None
        self._error: BaseException | None = None
        self._steps = {"prefill": 0, "decode": 0}
        self._moved = time.monotonic()  # when work came to an idle loop, or a step was made or read
        self._thread = threading.Thread(target=self._run, name="muxjax-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request whose fit was checked by the caller.

        Raises:
          EngineDead: the engine has ended.
        """

        def add() -> None:
            try:
                self._unit.add(request)
            except (InvalidRequest, Overloaded) as error:
                self._sinks.pop(request.id, None)
                sink.failed(error)

        with self._wake:
            self._check_alive()
            self._note_work()
            self._sinks[request.id] = sink  # at once, so that an ending engine reaches it
            self._inbox.append(add)
            self._wake.notify()

    def cancel(self, request_id: int) -> None:
        """Ends a request and frees its pages; does nothing if it, or the engine, has ended."""

        def drop() -> None:
            sink = self._sinks.pop(request_id, None)
            if sink is not None:
                self._unit.cancel(request_id)
                sink.cancelled()

        with self._wake:
            if self.alive:
                self._inbox.append(drop)
                self._wake.notify()

    def withdraw(self, request_ids: Collection[int]) -> list[int]:
        """Takes requests back: their pages are freed, and their sinks are told nothing more.

        Returns:
          Those that had not ended.

        Raises:
          EngineDead: the engine has ended; their sinks are told of it.
        """

        def take(unit: Scheduler) -> list[int]:
            taken = [each for each in request_ids if self._sinks.pop(each, None) is not None]
            for each in taken:
                unit.cancel(each)
            return taken

        return self.call(take)

    def call(self, function: Callable[[Scheduler], Any]) -> Any:
        """Runs a function of the unit in the engine's thread, between two steps.

        Raises:
          EngineDead: the engine has ended.
        """
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function(self._unit))
            except Exception as error:  # noqa: BLE001  the caller's function: its error is the caller's
                future.set_exception(error)

        with self._wake:
            self._check_alive()
            self._note_work()
            self._calls.add(future)
            self._inbox.append(run)
            self._wake.notify()
        try:
            return future.result()
        finally:
            self._calls.discard(future)

    def observe(self, observer: Observer | None) -> None:
        """Shows every step from now on to a function, or to none."""
        self._observer = observer

    def stats(self) -> dict[str, Any]:
        """The unit's counters and how many steps were run.

        Raises:
          EngineDead: the engine has ended.
        """
        return self.call(lambda unit: {**unit.stats(), "steps": dict(self._steps)})

    @property
    def error(self) -> BaseException | None:
        """What ended the loop, other than `close`."""
        return self._error

    @property
    def stalled_seconds(self) -> float:
        """How long there has been work and no step; 0 for one that is idle. From any thread."""
        return time.monotonic() - self._moved if self._sinks or self._calls else 0.0

    def abandon(self, reason: str) -> None:
        """Gives up a loop that has ended or hangs: every request fails now, and nothing that the
        loop may do later reaches anyone. Its thread is not waited for.
        """
        with self._wake:
            self._closing = True
            if self._error is None:
                self._error = EngineDead(reason)
            # The loop looks sinks up here, so what it still delivers finds nobody.
            sinks, self._sinks = self._sinks, {}
            calls = [future for future in self._calls if not future.done()]
            self._wake.notify()
        error = EngineDead(self._exit_reason())
        for sink in sinks.values():
            sink.failed(error)
        for future in calls:
            with contextlib.suppress(InvalidStateError):  # the loop was quicker
                future.set_exception(error)
        self._executor.close()

    def _note_work(self) -> None:
        """The time without a step begins when work comes to an idle loop."""
        if not (self._sinks or self._calls):
            self._moved = time.monotonic()

    @property
    def alive(self) -> bool:
        """Whether requests are still served."""
        return self._error is None and not self._closing

    def close(self) -> None:
        """Ends running requests as failed, waits for the device, and closes the executor."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _check_alive(self) -> None:
        if not self.alive:
            raise EngineDead(self._exit_reason()) from self._error

    def _exit_reason(self) -> str:
        if self._error is None:
            return "the engine is closed"
        return f"the engine has ended: {type(self._error).__name__}: {self._error}"

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            log.exception("the engine has ended")
            with self._wake:
                self._error = error
        finally:
            self._end()

    def _loop(self) -> None:
        in_flight: deque[tuple[Step, Handle]] = deque()
        while True:
            with self._wake:
                while not (self._inbox or self._closing or in_flight or self._unit.num_requests):
                    self._wake.wait()
                commands = list(self._inbox)
                self._inbox.clear()
                if self._closing:
                    break
            for command in commands:
                command()
            step = self._unit.next_step(time.perf_counter())
            if step is not None:
                if self._poisoner is not None:
                    self._poisoner.poison(self._unit.take_freed_pages())
                in_flight.append((step, self._executor.submit(step)))
                self._moved = time.monotonic()
                self._steps[type(step).__name__.lower()] += 1
            if in_flight and (step is None or len(in_flight) >= STEPS_AHEAD):
                done, handle = in_flight.popleft()
                result = self._executor.result(handle)
                self._deliver(self._unit.apply(done, result, time.perf_counter()))
                self._moved = time.monotonic()
                if self._observer is not None:
                    self._observer(self._unit, done, result)
            elif step is None and self._unit.num_requests:
                with self._wake:
                    if not self._inbox and not self._closing:
                        self._wake.wait(_STUCK_SECONDS)
        while in_flight:
            self._executor.result(in_flight.popleft()[1])

    def _deliver(self, updates: list[RequestUpdate]) -> None:
        sinks = self._sinks
        for update in updates:
            request, _, _, reason = update
            sink = sinks.get(request.id)
            if sink is None:
                continue
            stopped = sink.update(update)
            if reason is None and not stopped:
                continue
            if not request.finished:
                self._unit.finish(request, "stop", time.perf_counter())
            sinks.pop(request.id, None)

    def _end(self) -> None:
        with self._wake:
            self._closing = True
            self._inbox.clear()
            calls = [future for future in self._calls if not future.done()]
        error = EngineDead(self._exit_reason())
        for sink in self._sinks.values():
            sink.failed(error)
        self._sinks.clear()
        for future in calls:
            future.set_exception(error)
        self._executor.close()
