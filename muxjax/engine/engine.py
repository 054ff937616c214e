"""The engine of a unit: one thread that schedules steps, submits them, and delivers their results.

It runs one step ahead of the device: step n+1 is submitted before the tokens of step n are read, so
that the device does not wait for the host. Only this thread touches the scheduler; other threads
put commands into an inbox.
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

_RETRY_SECONDS = 0.05
"""Seconds to wait before scheduling again when there are requests but no step is possible."""

Observer = Callable[[Scheduler, Step, StepResult], None]
"""Receives each step whose results were applied. Called in the engine's thread; must not block."""


@runtime_checkable
class Sink(Protocol):
    """Receives the updates of one request. Called in the engine's thread; must not block."""

    def update(self, update: RequestUpdate) -> bool:
        """Receives new tokens; returns True to end the request (a stop string was found)."""
        ...

    def cancelled(self) -> None:
        """The request was cancelled; this is the last call."""
        ...

    def failed(self, error: BaseException) -> None:
        """The request has failed, or the engine has ended; this is the last call."""
        ...


class Engine:
    """Runs the steps of a scheduler on an executor until closed.

    Args:
      scheduler: used by the engine's thread only; its requests come from `submit` only.
      executor: closed with the engine.
      poison: test mode: freed pages are filled with NaN.

    Raises:
      ValueError: `poison` is set and the executor cannot poison pages.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, *, poison: bool = False) -> None:
        self._scheduler = scheduler
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
        # Time of the last submitted or read step, or of the first work after idling.
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="muxjax-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request that was checked by the caller (`InputProcessor`).

        Raises:
          EngineDead: the engine has ended.
        """

        def add() -> None:
            try:
                self._scheduler.add(request)
            except (InvalidRequest, Overloaded) as error:
                self._sinks.pop(request.id, None)
                sink.failed(error)

        with self._wake:
            self._check_alive()
            self._note_work()
            # Before the command runs: an engine that ends must fail this sink too.
            self._sinks[request.id] = sink
            self._inbox.append(add)
            self._wake.notify()

    def cancel(self, request_id: int) -> None:
        """Ends a request and frees its pages; does nothing if it, or the engine, has ended."""

        def drop() -> None:
            sink = self._sinks.pop(request_id, None)
            if sink is not None:
                self._scheduler.cancel(request_id)
                sink.cancelled()

        with self._wake:
            if self.alive:
                self._inbox.append(drop)
                self._wake.notify()

    def withdraw(self, request_ids: Collection[int]) -> list[int]:
        """Removes requests: frees their pages, and does not call their sinks again.

        Returns:
          The ids of the requests that had not ended.

        Raises:
          EngineDead: the engine has ended, and has failed the sinks.
        """

        def remove(scheduler: Scheduler) -> list[int]:
            running = [id_ for id_ in request_ids if self._sinks.pop(id_, None) is not None]
            for id_ in running:
                scheduler.cancel(id_)
            return running

        return self.call(remove)

    def call(self, function: Callable[[Scheduler], Any]) -> Any:
        """Runs a function on the scheduler in the engine's thread, between two steps.

        Raises:
          EngineDead: the engine has ended.
        """
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function(self._scheduler))
            except Exception as error:  # noqa: BLE001  raised in the caller's thread
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
        """Calls `observer` for every later step; None removes the observer."""
        self._observer = observer

    def stats(self) -> dict[str, Any]:
        """The scheduler's counters, and `steps`: the number of steps by phase.

        Raises:
          EngineDead: the engine has ended.
        """
        return self.call(lambda scheduler: {**scheduler.stats(), "steps": dict(self._steps)})

    @property
    def error(self) -> BaseException | None:
        """The error that ended the engine, or None; `close` is not an error."""
        return self._error

    @property
    def stalled_seconds(self) -> float:
        """Seconds since the last step while there is work; 0 when idle. From any thread."""
        return time.monotonic() - self._last_progress if self._sinks or self._calls else 0.0

    def abandon(self, reason: str) -> None:
        """Gives up an engine that has ended or hangs: every request fails now.

        Does not wait for its thread; results that the thread still delivers are dropped.
        """
        with self._wake:
            self._closing = True
            if self._error is None:
                self._error = EngineDead(reason)
            # The loop looks up sinks in the dict, so later results are dropped.
            sinks, self._sinks = self._sinks, {}
            calls = [future for future in self._calls if not future.done()]
            self._wake.notify()
        error = EngineDead(self._exit_reason())
        for sink in sinks.values():
            sink.failed(error)
        for future in calls:
            with contextlib.suppress(InvalidStateError):  # the loop has just set it
                future.set_exception(error)
        self._executor.close()

    def _note_work(self) -> None:
        """Starts the stall clock when an idle engine receives work."""
        if not (self._sinks or self._calls):
            self._last_progress = time.monotonic()

    @property
    def alive(self) -> bool:
        """Whether requests are still served."""
        return self._error is None and not self._closing

    def close(self) -> None:
        """Fails the running requests, waits for the device, and closes the executor."""
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
                while not (
                    self._inbox or self._closing or in_flight or self._scheduler.num_requests
                ):
                    self._wake.wait()
                commands = list(self._inbox)
                self._inbox.clear()
                if self._closing:
                    break
            for command in commands:
                command()
            step = self._scheduler.next_step(time.perf_counter())
            if step is not None:
                if self._poisoner is not None:
                    self._poisoner.poison(self._scheduler.take_freed_pages())
                in_flight.append((step, self._executor.submit(step)))
                self._last_progress = time.monotonic()
                self._steps[type(step).__name__.lower()] += 1
            if in_flight and (step is None or len(in_flight) >= STEPS_AHEAD):
                oldest, handle = in_flight.popleft()
                result = self._executor.result(handle)
                self._deliver(self._scheduler.apply(oldest, result, time.perf_counter()))
                self._last_progress = time.monotonic()
                if self._observer is not None:
                    self._observer(self._scheduler, oldest, result)
            elif step is None and self._scheduler.num_requests:
                with self._wake:
                    if not self._inbox and not self._closing:
                        self._wake.wait(_RETRY_SECONDS)
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
                self._scheduler.finish(request, "stop", time.perf_counter())
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
