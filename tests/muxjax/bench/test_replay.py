"""A workload on an engine: when it is sent, what is recorded, what an interrupt leaves."""

from __future__ import annotations

import pytest

from muxjax.bench.replay import make_requests, replay
from muxjax.engine.engine import Engine
from muxjax.errors import EngineDead, WorkloadError
from muxjax.placement.workload.trace import TraceRequest
from muxjax.scheduling.policies.registry import create_policy
from muxjax.scheduling.requests import Request
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Step
from muxjax.testing.mock_executor import VOCAB, MockExecutor
from tests.muxjax.scheduling.harness import spec

SPECS = [spec("a", 2, 4), spec("b", 3, 6)]
LIMITS = {one.name: one.max_model_len for one in SPECS}


def engine(executor: type[MockExecutor] = MockExecutor) -> Engine:
    unit = Scheduler(SPECS, 60, create_policy("adbs"))
    return Engine(unit, executor(SPECS, 60))


def requests(workload: list[TraceRequest]) -> list[Request]:
    return make_requests(workload, {"a": VOCAB, "b": VOCAB}, LIMITS)


def test_records_say_what_became_of_each_request() -> None:
    workload = [
        TraceRequest(0.0, "a", 5, 4),
        TraceRequest(0.05, "b", 3, 1),
        TraceRequest(0.05, "a", 6, 10_000),  # beyond the model's limit
    ]
    ended: list[int] = []
    running = engine()
    found = replay(running, workload, requests(workload), unit="u", done=ended.append)
    running.close()
    assert sum(ended) == 3
    assert [(r.id, r.model, r.unit, r.status) for r in found.records] == [
        (0, "a", "u", "finished"),
        (1, "b", "u", "finished"),
        (2, "a", "u", "finished"),
    ]
    assert [r.made_tokens for r in found.records] == [4, 1, LIMITS["a"] - 6]
    for record in found.records:
        assert record.first_token is not None
        assert record.end is not None
        assert record.arrival <= record.first_token <= record.end <= found.seconds
    assert found.interrupted == 0
    assert 0 <= found.late < 1


def test_prompts_depend_on_the_seed_only() -> None:
    workload = [TraceRequest(0.0, "a", 5, 4)]
    vocab = {"a": VOCAB}
    one, two = (make_requests(workload, vocab, LIMITS, seed=7)[0].prompt for _ in range(2))
    assert one == two
    assert make_requests(workload, vocab, LIMITS, seed=8)[0].prompt != one


def test_what_cannot_be_replayed() -> None:
    with pytest.raises(WorkloadError, match="asks for c"):
        requests([TraceRequest(0.0, "c", 1, 1)])
    with pytest.raises(WorkloadError, match="raise `max_model_len`"):
        requests([TraceRequest(0.0, "a", LIMITS["a"], 1)])


def test_an_interrupt_keeps_what_has_ended() -> None:
    workload = [TraceRequest(0.0, "a", 2, 1), TraceRequest(0.0, "b", 2, 20)]
    workload += [TraceRequest(1000.0, "a", 2, 1)]

    def stop(more: int) -> None:
        raise KeyboardInterrupt

    running = engine()
    found = replay(running, workload, requests(workload), done=stop)
    assert running.stats()["requests"] == 0  # nothing goes on
    running.close()
    assert found.records[0].id == 0
    assert found.interrupted == 3 - len(found.records) >= 1


def test_an_engine_that_dies() -> None:
    class Breaking(MockExecutor):
        def submit(self, step: Step) -> object:
            raise RuntimeError("the device is gone")

    workload = [TraceRequest(0.0, "a", 2, 1)]
    running = engine(Breaking)
    with pytest.raises(EngineDead, match="the device is gone"):
        replay(running, workload, requests(workload))
    running.close()
