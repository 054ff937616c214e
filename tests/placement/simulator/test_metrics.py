from __future__ import annotations

import numpy as np
import pytest

from muxjax.placement.simulator.metrics import (
    AttainmentCriterion,
    LatencyHistogram,
    SimulationMetrics,
)
from muxjax.placement.simulator.records import RequestRecord
from tests.placement.simple_costs import SimpleCosts


def record(
    number: int,
    model: str = "a",
    *,
    arrival: float = 0.0,
    first: float = 0.1,
    end: float = 1.0,
    tokens: int = 10,
) -> RequestRecord:
    return RequestRecord(
        number, model, "u", "finished", arrival, 20, tokens, tokens, arrival + first, arrival + end
    )


def refused(number: int, model: str = "a", *, failed: bool = False) -> RequestRecord:
    status = "failed" if failed else "rejected"
    return RequestRecord(number, model, "", status, 0.0, 20, 10, reason="full")


def test_quantiles_are_within_a_tenth_of_a_percent() -> None:
    values = np.random.default_rng(0).lognormal(0.0, 2.0, 5000)
    distribution = LatencyHistogram()
    for value in values.tolist():
        distribution.add(value)
    assert distribution.mean == pytest.approx(values.mean())
    for part in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = np.quantile(values, part, method="inverted_cdf")
        assert distribution.quantile(part) == pytest.approx(exact, rel=1e-3)


def test_a_distribution_of_nothing_and_of_zeros() -> None:
    distribution = LatencyHistogram()
    assert distribution.mean is None
    assert distribution.quantile(0.5) is None
    distribution.add(0.0)
    assert distribution.quantile(0.5) == 0.0


def test_keys_are_separate_and_mean_what_they_say() -> None:
    metrics = SimulationMetrics(
        {
            "a": AttainmentCriterion.from_targets(ttft=0.2),
            "b": AttainmentCriterion.from_targets(ttft=0.2),
        },
        SimpleCosts(),
    )
    for number in range(8):
        metrics.add(record(number, "a", arrival=number, end=2.0))  # the last ends at 9 s
    metrics.add(record(8, "b", first=0.5, end=2.0))  # too late
    metrics.add(refused(9, "b"))
    metrics.add(refused(10, "b", failed=True))
    found = metrics.summary()
    assert found["requests"] == 11
    assert (found["finished"], found["rejected"], found["failed"]) == (9, 1, 1)
    assert found["models"]["a"]["throughput"] == pytest.approx(8 / 9)
    assert found["models"]["b"]["throughput"] == pytest.approx(1 / 2)
    assert found["total_throughput"] == pytest.approx(8 / 9 + 1 / 2)
    assert found["rate_weighted_throughput"] == pytest.approx((8 * 8 / 9 + 3 * 1 / 2) / 11)
    assert found["slo_attainment"] == pytest.approx(8 / 11)
    assert found["request_goodput"] == pytest.approx(8 / 9)
    assert found["tokens_per_s"] == pytest.approx(9 * 30 / 9)
    assert found["offered_rate"] == pytest.approx(11 / 7)
    assert found["models"]["b"]["slo_attainment"] == 0.0
    assert found["latency_s"]["p50"] == pytest.approx(2.0, rel=1e-3)


def test_targets() -> None:
    costs = SimpleCosts()
    # Alone: 20 ms of prefill and 9 steps of 10 ms: 0.11 s.
    assert AttainmentCriterion.from_targets(scale=8.0, kind="small").isolated_latency(
        record(0), costs
    ) == pytest.approx(0.11)
    assert AttainmentCriterion.from_targets(scale=8.0, kind="small").met(record(0, end=0.87), costs)
    assert not AttainmentCriterion.from_targets(scale=8.0, kind="small").met(
        record(0, end=0.89), costs
    )
    assert AttainmentCriterion.from_targets(tpot=0.1).met(record(0, first=0.1, end=0.99), costs)
    assert not AttainmentCriterion.from_targets(tpot=0.1).met(record(0, first=0.1, end=1.01), costs)
    assert AttainmentCriterion.from_targets(tpot=0.1).met(
        record(0, first=5.0, end=5.0, tokens=1), costs
    )
    assert not AttainmentCriterion.from_targets(ttft=0.1).met(record(0, first=0.2), costs)
    assert not AttainmentCriterion().met(refused(0), costs)


def test_nothing_is_no_division_by_zero() -> None:
    found = SimulationMetrics({"a": AttainmentCriterion()}, SimpleCosts()).summary()
    assert found["total_throughput"] == 0.0
    assert found["slo_attainment"] is None
    assert found["offered_rate"] is None
