"""One loaded fleet with a new scheduler for each run."""

from __future__ import annotations

import pytest

from muxjax.bench.replay import build_requests, replay
from muxjax.bench.session import BenchSession
from muxjax.errors import BenchError, MuxError
from muxjax.placement.workload.trace import TraceRequest
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.specs import LatencySlo

WORKLOAD = [
    TraceRequest(0.0, "llama", 40, 6),
    TraceRequest(0.0, "qwen3", 3, 9),
    TraceRequest(0.01, "llama", 5, 1),
]


def outputs(session: BenchSession, policy: str) -> list[list[int]]:
    vocab = {name: model.config.vocab_size for name, model in session.models.items()}
    limits = {name: model.max_model_len for name, model in session.models.items()}
    requests = build_requests(WORKLOAD, vocab, limits, seed=3)
    scheduler = session.new_scheduler(policy)
    with session.engine(scheduler) as engine:
        replay(engine, WORKLOAD, requests)
        assert engine.stats()["policy"] == policy
    assert scheduler.allocator.used_pages("llama") == 0
    return [request.output for request in requests]


def test_all_policies_generate_the_same_tokens_on_one_pool(session: BenchSession) -> None:
    address = session.executor.pool_address
    first = outputs(session, "adbs")
    assert [len(tokens) for tokens in first] == [6, 9, 1]
    assert outputs(session, "fcfs") == first
    assert outputs(session, "adbs") == first
    assert session.executor.pool_address == address


def test_schedulers_have_separate_estimates_and_allocators(session: BenchSession) -> None:
    estimates = StepEstimates(["llama", "qwen3"])
    estimates.observe_decode("llama", 1, 1, 3.0)
    first, second = (session.new_scheduler("adbs", estimates) for _ in range(2))
    first.estimates.observe_decode("llama", 1, 1, 9.0)
    assert second.estimates.decode("llama", 1) == estimates.decode("llama", 1) == 3.0
    assert first.allocator is not second.allocator


def test_given_targets_replace_those_of_the_fleet_file(session: BenchSession) -> None:
    targets = LatencySlo(scale=3.0, isolated_ttft=0.5, isolated_tpot=0.25)
    scheduler = session.new_scheduler("slo", targets={"llama": targets})
    assert scheduler.models["llama"].spec.targets == targets
    assert (
        scheduler.models["qwen3"].spec
        == session.specs["qwen3"]
        == session.new_scheduler("slo").models["qwen3"].spec
    )
    assert session.new_scheduler("slo").models["llama"].spec == session.specs["llama"]


def test_given_rates_replace_those_of_the_fleet_file(session: BenchSession) -> None:
    shares = {}
    for rate in (1.0, 9.0):
        scheduler = session.new_scheduler("static", rates={"llama": rate, "qwen3": 1.0})
        assert scheduler.models["llama"].spec.load.rate == rate
        shares[rate] = scheduler.fair_share.shares["llama", "decode"]
    assert shares[9.0] > 1.2 * shares[1.0]
    assert session.new_scheduler("static").models["llama"].spec == session.specs["llama"]


def test_an_unknown_policy_is_rejected(session: BenchSession) -> None:
    with pytest.raises(BenchError, match="no policy 'best'; there are slo, adbs"):
        session.new_scheduler("best")


def test_the_pool_outlives_the_engine(session: BenchSession) -> None:
    with session.engine(session.new_scheduler("adbs")) as engine:
        pass
    with pytest.raises(MuxError, match="closed"):
        engine.stats()
    assert session.executor.pool_address
