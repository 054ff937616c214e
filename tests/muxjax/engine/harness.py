"""Engines on the mock executor, and a sink that records a request's updates."""

import threading

from muxjax.engine.engine import Engine
from muxjax.scheduling.policies.registry import create_policy
from muxjax.scheduling.requests import RequestUpdate
from muxjax.scheduling.scheduler import Scheduler
from muxjax.testing.mock_executor import MockExecutor
from tests.muxjax.scheduling.harness import spec

WAIT = 20.0
SPECS = [spec("a", 2, 4), spec("b", 3, 6)]


class Collector:
    """A sink that records the updates."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.tokens: list[int] = []
        self.error: BaseException | None = None
        self.reason: str | None = None
        self.done = threading.Event()
        self._stop_after = stop_after

    def update(self, update: RequestUpdate) -> bool:
        self.tokens += update.tokens
        self.reason = update.finish_reason
        stop = self._stop_after is not None and len(self.tokens) >= self._stop_after
        if stop:
            self.reason = "stop"
        if self.reason is not None:
            self.done.set()
        return stop

    def cancelled(self) -> None:
        self.reason = "cancelled"
        self.done.set()

    def failed(self, error: BaseException) -> None:
        self.error = error
        self.done.set()


def make_engine(executor: type[MockExecutor] = MockExecutor, pages: int = 60) -> Engine:
    scheduler = Scheduler(SPECS, pages, create_policy("adbs"), record_freed=True)
    return Engine(scheduler, executor(SPECS, pages), poison=True)
