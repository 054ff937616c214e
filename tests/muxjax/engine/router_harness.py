"""Requests to a router, and executors that fail at given steps."""

from muxjax.engine.router import Router
from muxjax.scheduling.policies.registry import create_policy
from muxjax.scheduling.requests import Request
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Step
from muxjax.testing.mock_executor import MockExecutor
from tests.muxjax.engine.harness import WAIT, Collector
from tests.muxjax.scheduling.harness import isolated_tokens, request, spec

PAGES = 60
SPECS = {"a": spec("a", 2, 4), "b": spec("b", 3, 6)}


class Dying(MockExecutor):
    """Fails once at each of the given step numbers."""

    def __init__(self, specs: list, pages: int, deaths: list[int]) -> None:
        super().__init__(specs, pages)
        self._deaths = deaths

    def submit(self, step: Step) -> object:
        if self._deaths and self.steps == self._deaths[0]:
            del self._deaths[0]
            raise RuntimeError("the device is gone")
        return super().submit(step)


def ask(router: Router, requests: list[Request]) -> list[Collector]:
    collectors = [Collector() for _ in requests]
    for pending, collector in zip(requests, collectors, strict=True):
        router.submit(pending, collector)
    for collector in collectors:
        assert collector.done.wait(WAIT)
    return collectors


def alone(one: Request) -> list[int]:
    return isolated_tokens(Scheduler(SPECS.values(), PAGES, create_policy("adbs")), one)


def requests_of(models: str, count: int, **params: float) -> list[Request]:
    return [request(i, models[i % len(models)], 3 + i, 20, **params) for i in range(count)]
