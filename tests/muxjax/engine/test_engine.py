"""The engine, on the mock executor."""

import threading

import pytest

from muxjax.engine.engine import Engine
from muxjax.errors import EngineDead, InvalidRequest
from muxjax.scheduling.policies.registry import create_policy
from muxjax.scheduling.requests import Request
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Step
from muxjax.testing.mock_executor import MockExecutor
from tests.muxjax.engine.harness import SPECS, WAIT, Collector, make_engine
from tests.muxjax.scheduling.harness import isolated_tokens, request


class Breaking(MockExecutor):
    """Fails at its third step."""

    def submit(self, step: Step) -> object:
        if self.steps == 2:
            raise RuntimeError("the device is gone")
        return super().submit(step)


def ask(engine: Engine, *requests: Request) -> list[Collector]:
    collectors = [Collector() for _ in requests]
    for pending, collector in zip(requests, collectors, strict=True):
        engine.submit(pending, collector)
    for collector in collectors:
        assert collector.done.wait(WAIT)
    return collectors


def test_every_request_gets_its_tokens():
    engine = make_engine()
    requests = [request(i, "ab"[i % 2], 3 + i, 9) for i in range(12)]
    collectors = ask(engine, *requests)
    scheduler = Scheduler(SPECS, 60, create_policy("adbs"))
    for submitted, collector in zip(requests, collectors, strict=True):
        assert collector.tokens == isolated_tokens(scheduler, submitted)
        assert collector.reason == "length"
    stats = engine.stats()
    assert stats["requests"] == 0
    assert stats["steps"]["prefill"] > 0
    engine.close()


def test_a_sink_may_end_its_request():
    engine = make_engine()
    collector = Collector(stop_after=5)
    engine.submit(request(0, "a", 5, 40), collector)
    assert collector.done.wait(WAIT)
    assert engine.call(lambda scheduler: scheduler.num_requests) == 0
    assert engine.call(lambda scheduler: scheduler.check_invariants()) is None
    engine.close()


def test_cancel_frees_pages_and_may_be_repeated():
    engine = make_engine()
    collector = Collector()
    engine.submit(request(0, "a", 5, 50), collector)
    engine.cancel(0)
    engine.cancel(0)
    engine.cancel(99)
    assert collector.done.wait(WAIT)
    assert collector.reason in ("cancelled", "length")
    assert engine.stats()["models"]["a"]["kv_pages_used"] == 0
    engine.close()
    engine.cancel(0)


def test_request_that_the_scheduler_refuses_fails_without_affecting_others():
    engine = make_engine()
    bad, good = ask(engine, request(0, "a", 64, 5), request(1, "a", 5, 5))
    assert isinstance(bad.error, InvalidRequest)
    assert good.reason == "length"
    engine.close()


def test_device_error_ends_every_request():
    engine = make_engine(Breaking)
    collectors = ask(engine, *(request(i, "a", 5, 40) for i in range(3)))
    for collector in collectors:
        assert isinstance(collector.error, EngineDead)
        assert "the device is gone" in str(collector.error)
    assert not engine.alive
    with pytest.raises(EngineDead, match="the device is gone"):
        engine.submit(request(9), Collector())
    with pytest.raises(EngineDead, match="the device is gone"):
        engine.stats()
    engine.close()


def test_close_fails_running_requests():
    engine = make_engine()
    collectors = [Collector() for _ in range(5)]
    for number, collector in enumerate(collectors):
        engine.submit(request(number, "a", 5, 50), collector)
    engine.close()
    for collector in collectors:
        assert collector.done.wait(WAIT)
        assert collector.reason == "length" or isinstance(collector.error, EngineDead)
    with pytest.raises(EngineDead, match="closed"):
        engine.call(lambda scheduler: scheduler)


def test_error_of_a_called_function_is_raised_to_the_caller():
    engine = make_engine()
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda scheduler: 1 / 0)
    assert engine.alive
    engine.close()


class Hanging(MockExecutor):
    """Blocks at its second result until `resume` is set."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.reached, self.resume, self.results = threading.Event(), threading.Event(), 0

    def result(self, handle: object) -> object:
        self.results += 1
        if self.results == 2:
            self.reached.set()
            assert self.resume.wait(WAIT)
        return super().result(handle)


def test_hanging_loop_is_detected_and_abandoned():
    executor = Hanging(SPECS, 60)
    engine = Engine(
        Scheduler(SPECS, 60, create_policy("adbs"), record_freed=True), executor, poison=True
    )
    assert engine.stalled_seconds == 0.0
    collectors = [Collector() for _ in range(2)]
    engine.submit(request(0, "a", 5, 40), collectors[0])
    assert executor.reached.wait(WAIT)
    first = engine.stalled_seconds
    engine.submit(request(1, "b", 5, 40), collectors[1])  # no step: the stall clock continues
    assert engine.stalled_seconds >= first > 0.0
    errors: list[BaseException] = []

    def read_stats() -> None:
        try:
            engine.stats()
        except EngineDead as error:
            errors.append(error)

    reader = threading.Thread(target=read_stats)
    reader.start()
    engine.abandon("no step for a while")
    for collector in collectors:
        assert collector.done.is_set()
        assert "no step for a while" in str(collector.error)
    reader.join(WAIT)
    assert len(errors) == 1
    assert not engine.alive
    assert engine.stalled_seconds == 0.0
    # Updates of the abandoned loop are dropped.
    before = [list(collector.tokens) for collector in collectors]
    executor.resume.set()
    engine.close()
    assert [collector.tokens for collector in collectors] == before


def test_idle_time_is_not_a_stall():
    engine = make_engine()
    ask(engine, request(0, "a", 3, 3))
    engine._last_progress -= 1000.0  # as after a long idle time
    assert engine.stalled_seconds == 0.0
    engine.stats()
    ask(engine, request(1, "a", 3, 3))
    assert engine.stalled_seconds < 100.0
    engine.close()


class _Unpoisonable:
    """An executor without the capability `PoisonsPages`."""

    def __init__(self, executor: MockExecutor) -> None:
        for name in ("submit", "result", "add_model", "remove_model", "close"):
            setattr(self, name, getattr(executor, name))


def test_poison_needs_an_executor_that_can_poison_pages():
    scheduler = Scheduler(SPECS, 60, create_policy("adbs"))
    executor = _Unpoisonable(MockExecutor(SPECS, 60))
    with pytest.raises(ValueError, match="_Unpoisonable cannot poison pages"):
        Engine(scheduler, executor, poison=True)
    engine = Engine(scheduler, executor)
    collector = Collector()
    engine.submit(request(0, "a", 5, 4), collector)
    assert collector.done.wait(WAIT)
    engine.close()
