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


def unfinished(number: int, model: str = "a", *, failed: bool = False) -> RequestRecord:
    status = "failed" if failed else "rejected"
    return RequestRecord(number, model, "", status, 0.0, 20, 10, reason="full")


def test_quantiles_have_an_error_of_at_most_one_bin() -> None:
    values = np.random.default_rng(0).lognormal(0.0, 2.0, 5000)
    histogram = LatencyHistogram()
    for value in values.tolist():
        histogram.add(value)
    assert histogram.mean == pytest.approx(values.mean())
    for part in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = np.quantile(values, part, method="inverted_cdf")
        assert histogram.quantile(part) == pytest.approx(exact, rel=1e-3)


def test_an_empty_histogram_and_a_time_of_zero() -> None:
    histogram = LatencyHistogram()
    assert histogram.mean is None
    assert histogram.quantile(0.5) is None
    histogram.add(0.0)
    assert histogram.quantile(0.5) == 0.0


def test_the_summary_follows_the_table_of_metrics() -> None:
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
    metrics.add(unfinished(9, "b"))
    metrics.add(unfinished(10, "b", failed=True))
    summary = metrics.summary()
    assert summary["requests"] == 11
    assert (summary["finished"], summary["rejected"], summary["failed"]) == (9, 1, 1)
    assert summary["models"]["a"]["throughput"] == pytest.approx(8 / 9)
    assert summary["models"]["b"]["throughput"] == pytest.approx(1 / 2)
    assert summary["total_throughput"] == pytest.approx(8 / 9 + 1 / 2)
    assert summary["rate_weighted_throughput"] == pytest.approx((8 * 8 / 9 + 3 * 1 / 2) / 11)
    assert summary["slo_attainment"] == pytest.approx(8 / 11)
    assert summary["request_goodput"] == pytest.approx(8 / 9)
    assert summary["tokens_per_s"] == pytest.approx(9 * 30 / 9)
    assert summary["offered_rate"] == pytest.approx(11 / 7)
    assert summary["models"]["b"]["slo_attainment"] == 0.0
    assert summary["latency_s"]["p50"] == pytest.approx(2.0, rel=1e-3)


def test_criteria_check_their_targets() -> None:
    costs = SimpleCosts()
    # Isolated: a prefill of 20 ms and 9 decode steps of 10 ms: 0.11 s.
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
    assert not AttainmentCriterion().met(unfinished(0), costs)


def test_the_summary_without_requests() -> None:
    summary = SimulationMetrics({"a": AttainmentCriterion()}, SimpleCosts()).summary()
    assert summary["total_throughput"] == 0.0
    assert summary["slo_attainment"] is None
    assert summary["offered_rate"] is None
