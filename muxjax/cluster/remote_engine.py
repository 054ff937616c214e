"""The router's interface to the engine of a unit in another process.

One thread polls the other process and delivers the events to their requests. It uses no device.
When the other process ends, every request of the unit fails with `EngineDead`. The router resumes
each from the tokens that its stream has received.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Protocol, runtime_checkable

from muxjax.cluster.messages import AddRequest, PollResult, RequestEvent
from muxjax.engine.engine import Observer, Sink
from muxjax.errors import EngineDead, MuxError
from muxjax.scheduling.requests import Request, RequestUpdate

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Maximum time that a poll waits for events."""


@runtime_checkable
class Peer(Protocol):
    """A connection to a `UnitHost` in another process. Safe to use from any thread.

    All methods except `end` raise `EngineDead` if the other process has ended.
    """

    def submit(self, message: AddRequest) -> None:
        """See `UnitHost.submit`; does not wait. Requests and cancellations arrive in order."""
        ...

    def cancel(self, request_id: int) -> None:
        """See `UnitHost.cancel`; does not wait."""
        ...

    def poll(self, seconds: float) -> PollResult:
        """See `UnitHost.poll`."""
        ...

    def stats(self) -> dict[str, Any]:
        """Returns the unit's counters, and its node and process."""
        ...

    def end(self) -> None:
        """Ends the other process, and every call that waits for it."""
        ...


class RemoteEngine:
    """See `muxjax.engine.supervisor.UnitEngine`.

    Args:
      name: of the unit.
      peer: connection to the unit; ended with the engine.
    """

    def __init__(self, name: str, peer: Peer) -> None:
        self.peer = peer
        # Held while an event is delivered, so that a sink receives nothing after its request's end.
        self._lock = threading.RLock()
        self._running: dict[int, tuple[Request, Sink]] = {}
        self._closing = False
        self._error: BaseException | None = None
        self._stalled = 0.0
        self._last_poll = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"muxjax-unit-{name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """See `UnitEngine`."""
        return self._error is None and not self._closing

    @property
    def error(self) -> BaseException | None:
        """See `UnitEngine`."""
        return self._error

    @property
    def stalled_seconds(self) -> float:
        """See `UnitEngine`. A process that does not answer polls is stalled as well."""
        if not self._running:
            return 0.0
        silent = time.monotonic() - self._last_poll
        return max(self._stalled, silent if silent > 2 * POLL_SECONDS else 0.0)

    def submit(self, request: Request, sink: Sink) -> None:
        """See `UnitEngine`."""
        with self._lock:
            if not self.alive:
                raise EngineDead(self._exit_reason()) from self._error
            self._running[request.id] = request, sink
        try:
            self.peer.submit(AddRequest.from_request(request, time.perf_counter()))
        except EngineDead as error:
            self._end(error)

    def cancel(self, request_id: int) -> None:
        """See `UnitEngine`. The caller does not wait for the other process."""
        sink = self._pop(request_id)
        if sink is not None:
            self._cancel_remote(request_id)
            sink.cancelled()

    def observe(self, observer: Observer | None) -> None:
        """See `UnitEngine`.

        Raises:
          MuxError: `observer` is not None; steps of other processes cannot be observed.
        """
        if observer is not None:
            raise MuxError("the steps of units in other processes cannot be recorded")

    def stats(self) -> dict[str, Any]:
        """Returns the unit's counters, and its node and process.

        Raises:
          EngineDead: the engine has ended.
        """
        if not self.alive:
            raise EngineDead(self._exit_reason()) from self._error
        return self.peer.stats()

    def abandon(self, reason: str) -> None:
        """See `UnitEngine`. Ends the other process."""
        self._end(EngineDead(reason))

    def close(self) -> None:
        """See `UnitEngine`."""
        self._closing = True
        self._end(EngineDead("the engine is closed"))
        self._thread.join()

    def _run(self) -> None:
        while self.alive:
            try:
                result = self.peer.poll(POLL_SECONDS)
            except EngineDead as error:
                self._end(error)
                return
            self._last_poll, self._stalled = time.monotonic(), result.stalled_seconds
            for event in result.events:
                self._deliver(event)
            if result.ended is not None:
                self._end(EngineDead(f"the engine has ended: {result.ended}"))

    def _deliver(self, event: RequestEvent) -> None:
        with self._lock:
            running = self._running.get(event.id)
            if running is None:
                return  # it was cancelled, or ended by a stop string
            request, sink = running
            if event.error is not None:
                self._pop(event.id)
                sink.failed(event.error)
                return
            request.output.extend(event.tokens)
            if event.prompt_logprobs is not None:
                request.prompt_logprobs = event.prompt_logprobs
            request.cached_tokens += event.cached_tokens
            reason = event.finish_reason
            stopped = sink.update(RequestUpdate(request, event.tokens, event.logprobs, reason))
            if stopped or reason is not None:
                self._pop(event.id)
        if stopped and reason is None:
            self._cancel_remote(event.id)

    def _pop(self, request_id: int) -> Sink | None:
        with self._lock:
            return self._running.pop(request_id, (None, None))[1]

    def _cancel_remote(self, request_id: int) -> None:
        try:
            self.peer.cancel(request_id)
        except EngineDead as error:
            self._end(error)

    def _end(self, error: EngineDead) -> None:
        with self._lock:
            if self._error is None and not self._closing:
                self._error = error
                log.error("%s", error)
            running, self._running = self._running, {}
        self.peer.end()
        for _, sink in running.values():
            sink.failed(error)

    def _exit_reason(self) -> str:
        return "the engine is closed" if self._error is None else str(self._error)
