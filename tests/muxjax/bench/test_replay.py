"""Replays on an engine with a mock device: records, errors and interrupts."""

from __future__ import annotations

import pytest

from muxjax.bench.replay import build_requests, replay
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
LIMITS = {model.name: model.max_model_len for model in SPECS}


def engine(executor: type[MockExecutor] = MockExecutor) -> Engine:
    unit = Scheduler(SPECS, 60, create_policy("adbs"))
    return Engine(unit, executor(SPECS, 60))


def requests(workload: list[TraceRequest]) -> list[Request]:
    return build_requests(workload, {"a": VOCAB, "b": VOCAB}, LIMITS)


def test_records_have_the_status_and_times_of_requests() -> None:
    workload = [
        TraceRequest(0.0, "a", 5, 4),
        TraceRequest(0.05, "b", 3, 1),
        TraceRequest(0.05, "a", 6, 10_000),  # beyond the model's limit
    ]
    ended: list[int] = []
    running = engine()
    result = replay(running, workload, requests(workload), unit="u", done=ended.append)
    running.close()
    assert sum(ended) == 3
    assert [(r.id, r.model, r.unit, r.status) for r in result.records] == [
        (0, "a", "u", "finished"),
        (1, "b", "u", "finished"),
        (2, "a", "u", "finished"),
    ]
    assert [r.made_tokens for r in result.records] == [4, 1, LIMITS["a"] - 6]
    for record in result.records:
        assert record.first_token is not None
        assert record.end is not None
        assert record.arrival <= record.first_token <= record.end <= result.seconds
    assert result.interrupted == 0
    assert 0 <= result.late < 1


def test_prompts_depend_on_the_seed_only() -> None:
    workload = [TraceRequest(0.0, "a", 5, 4)]
    vocab = {"a": VOCAB}
    first, second = (build_requests(workload, vocab, LIMITS, seed=7)[0].prompt for _ in range(2))
    assert first == second
    assert build_requests(workload, vocab, LIMITS, seed=8)[0].prompt != first


def test_invalid_requests_are_rejected() -> None:
    with pytest.raises(WorkloadError, match="is for c"):
        requests([TraceRequest(0.0, "c", 1, 1)])
    with pytest.raises(WorkloadError, match="raise `max_model_len`"):
        requests([TraceRequest(0.0, "a", LIMITS["a"], 1)])


def test_an_interrupt_keeps_finished_requests() -> None:
    workload = [TraceRequest(0.0, "a", 2, 1), TraceRequest(0.0, "b", 2, 20)]
    workload += [TraceRequest(1000.0, "a", 2, 1)]

    def stop(ended: int) -> None:
        raise KeyboardInterrupt

    running = engine()
    result = replay(running, workload, requests(workload), done=stop)
    assert running.stats()["requests"] == 0  # running requests are cancelled
    running.close()
    assert result.records[0].id == 0
    assert result.interrupted == 3 - len(result.records) >= 1


def test_an_engine_failure_is_raised() -> None:
    class Breaking(MockExecutor):
        def submit(self, step: Step) -> object:
            raise RuntimeError("the device is gone")

    workload = [TraceRequest(0.0, "a", 2, 1)]
    running = engine(Breaking)
    with pytest.raises(EngineDead, match="the device is gone"):
        replay(running, workload, requests(workload))
    running.close()
