"""The loop of a unit in another process, as the router sees it.

One thread asks the far end for reports and hands out what they bring. It touches no device: when
the far end is gone, every request of the unit fails with `EngineDead`, and the router carries them
on from the tokens that their streams were given.
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

WAIT = 1.0
"""Seconds that the far end waits for news before it reports that there are none."""


@runtime_checkable
class Peer(Protocol):
    """A way to a `UnitHost` in another process. Its methods may be called from any thread.

    All but `end` raise `EngineDead` when the other process is gone.
    """

    def submit(self, asked: AddRequest) -> None:
        """See `UnitHost.submit`; does not wait. Requests and cancellations arrive in order."""
        ...

    def cancel(self, request_id: int) -> None:
        """See `UnitHost.cancel`; does not wait."""
        ...

    def report(self, seconds: float) -> PollResult:
        """See `UnitHost.report`."""
        ...

    def stats(self) -> dict[str, Any]:
        """The unit's counters, and where it runs."""
        ...

    def end(self) -> None:
        """Ends the other process, and with it every call that waits for it."""
        ...


class RemoteEngine:
    """See `muxjax.engine.supervisor.UnitEngine`.

    Args:
      name: of the unit.
      peer: the way to it; ended with the engine.
    """

    def __init__(self, name: str, peer: Peer) -> None:
        self.peer = peer
        self._lock = (
            threading.RLock()
        )  # held while news are handed out: nothing comes after the end
        self._running: dict[int, tuple[Request, Sink]] = {}
        self._closing = False
        self._error: BaseException | None = None
        self._stalled = 0.0
        self._heard = time.monotonic()
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
        """See `UnitEngine`. A process that says nothing hangs, too."""
        if not self._running:
            return 0.0
        silent = time.monotonic() - self._heard
        return max(self._stalled, silent if silent > 2 * WAIT else 0.0)

    def submit(self, request: Request, sink: Sink) -> None:
        """See `UnitEngine`."""
        with self._lock:
            if not self.alive:
                raise EngineDead(self._exit_reason()) from self._error
            self._running[request.id] = request, sink
        try:
            self.peer.submit(AddRequest.of(request, time.perf_counter()))
        except EngineDead as error:
            self._end(error)

    def cancel(self, request_id: int) -> None:
        """See `UnitEngine`. The caller does not wait for the other process."""
        sink = self._take(request_id)
        if sink is not None:
            self._drop(request_id)
            sink.cancelled()

    def observe(self, observer: Observer | None) -> None:
        """See `UnitEngine`.

        Raises:
          MuxError: steps of another process are not shown.
        """
        if observer is not None:
            raise MuxError("the steps of units in other processes cannot be recorded")

    def stats(self) -> dict[str, Any]:
        """The unit's counters, and where it runs.

        Raises:
          EngineDead: it has ended.
        """
        if not self.alive:
            raise EngineDead(self._exit_reason()) from self._error
        return self.peer.stats()

    def abandon(self, reason: str) -> None:
        """See `UnitEngine`. The other process is ended."""
        self._end(EngineDead(reason))

    def close(self) -> None:
        """See `UnitEngine`."""
        self._closing = True
        self._end(EngineDead("the engine is closed"))
        self._thread.join()

    def _run(self) -> None:
        while self.alive:
            try:
                report = self.peer.report(WAIT)
            except EngineDead as error:
                self._end(error)
                return
            self._heard, self._stalled = time.monotonic(), report.stalled_seconds
            for news in report.news:
                self._deliver(news)
            if report.ended is not None:
                self._end(EngineDead(f"the engine has ended: {report.ended}"))

    def _deliver(self, news: RequestEvent) -> None:
        with self._lock:
            found = self._running.get(news.id)
            if found is None:
                return  # it was cancelled, or ended by a stop string
            request, sink = found
            if news.error is not None:
                self._take(news.id)
                sink.failed(news.error)
                return
            request.output.extend(news.tokens)
            if news.prompt_logprobs is not None:
                request.prompt_logprobs = news.prompt_logprobs
            request.cached_tokens += news.cached_tokens
            reason = news.finish_reason
            stopped = sink.update(RequestUpdate(request, news.tokens, news.logprobs, reason))
            if stopped or reason is not None:
                self._take(news.id)
        if stopped and reason is None:
            self._drop(news.id)

    def _take(self, request_id: int) -> Sink | None:
        with self._lock:
            return self._running.pop(request_id, (None, None))[1]

    def _drop(self, request_id: int) -> None:
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
