"""One loaded fleet, scheduled anew for each run."""

from __future__ import annotations

import pytest

from muxjax.bench.replay import make_requests, replay
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


def outputs(rig: BenchSession, policy: str) -> list[list[int]]:
    vocab = {name: model.config.vocab_size for name, model in rig.models.items()}
    limits = {name: model.max_model_len for name, model in rig.models.items()}
    requests = make_requests(WORKLOAD, vocab, limits, seed=3)
    unit = rig.unit(policy)
    with rig.engine(unit) as engine:
        replay(engine, WORKLOAD, requests)
        assert engine.stats()["policy"] == policy
    assert unit.allocator.used_pages("llama") == 0
    return [request.output for request in requests]


def test_every_policy_gives_the_same_tokens_on_one_pool(rig: BenchSession) -> None:
    address = rig.executor.pool_address
    first = outputs(rig, "adbs")
    assert [len(tokens) for tokens in first] == [6, 9, 1]
    assert outputs(rig, "fcfs") == first
    assert outputs(rig, "adbs") == first
    assert rig.executor.pool_address == address


def test_a_unit_is_new_and_keeps_its_estimates_to_itself(rig: BenchSession) -> None:
    estimates = StepEstimates(["llama", "qwen3"])
    estimates.observe_decode("llama", 1, 1, 3.0)
    one, two = rig.unit("adbs", estimates), rig.unit("adbs", estimates)
    one.estimates.observe_decode("llama", 1, 1, 9.0)
    assert two.estimates.decode("llama", 1) == estimates.decode("llama", 1) == 3.0
    assert one.allocator is not two.allocator


def test_a_unit_takes_the_targets_that_are_asked_for(rig: BenchSession) -> None:
    asked = LatencySlo(scale=3.0, isolated_ttft=0.5, isolated_tpot=0.25)
    unit = rig.unit("slo", targets={"llama": asked})
    assert unit.models["llama"].spec.targets == asked
    assert unit.models["qwen3"].spec == rig.specs["qwen3"] == rig.unit("slo").models["qwen3"].spec
    assert rig.unit("slo").models["llama"].spec == rig.specs["llama"]


def test_a_unit_expects_the_rates_that_it_is_told(rig: BenchSession) -> None:
    shares = {}
    for rate in (1.0, 9.0):
        unit = rig.unit("static", rates={"llama": rate, "qwen3": 1.0})
        assert unit.models["llama"].spec.rate == rate
        shares[rate] = unit.fair_share.shares["llama", "decode"]
    assert shares[9.0] > 1.2 * shares[1.0]
    assert rig.unit("static").models["llama"].spec == rig.specs["llama"]


def test_a_policy_that_there_is_not(rig: BenchSession) -> None:
    with pytest.raises(BenchError, match="no policy 'best'; there are slo, adbs"):
        rig.unit("best")


def test_the_engine_is_closed_and_the_pool_stays(rig: BenchSession) -> None:
    with rig.engine(rig.unit("adbs")) as engine:
        pass
    with pytest.raises(MuxError, match="closed"):
        engine.stats()
    assert rig.executor.pool_address
