from __future__ import annotations

from collections import Counter

import pytest

from muxjax.errors import WorkloadError
from muxjax.placement.workload.synthetic import Arrivals, Assigned, Synthetic, Traffic, at_rate
from muxjax.placement.workload.trace import TraceRequest

TWO = (Traffic("a", 5.0), Traffic("b", 1.0))


def test_rates_are_met_and_arrivals_are_in_order() -> None:
    requests = list(Synthetic(TWO, seconds=1000))
    counts = Counter(request.model for request in requests)
    assert counts["a"] == pytest.approx(5000, rel=0.05)
    assert counts["b"] == pytest.approx(1000, rel=0.1)
    arrivals = [request.arrival for request in requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] <= 1000


def test_the_seed_decides_everything() -> None:
    workload = Synthetic(TWO, count=200, seed=3)
    assert list(workload) == list(workload)
    assert list(workload) != list(Synthetic(TWO, count=200, seed=4))
    assert len(list(workload)) == 200


def test_another_model_changes_nothing_for_the_first() -> None:
    alone = list(Synthetic(TWO[:1], seconds=50))
    both = list(Synthetic(TWO, seconds=50))
    assert [request for request in both if request.model == "a"] == alone


@pytest.mark.parametrize(
    "arrivals", [Arrivals(cv=3.0), Arrivals(on_off=(2.0, 4.0)), Arrivals(change_points=(900.0,))]
)
def test_other_arrivals_keep_the_rate(arrivals: Arrivals) -> None:
    requests = list(Synthetic(TWO, seconds=1800, arrivals=arrivals))
    assert len(requests) == pytest.approx(6 * 1800, rel=0.15)


def test_another_rate_keeps_the_length_of_what_is_synthetic() -> None:
    faster = list(at_rate(Synthetic(TWO, seconds=500), 2.0))
    assert len(faster) == pytest.approx(2 * 6 * 500, rel=0.1)
    assert faster[-1].arrival == pytest.approx(500, rel=0.02)
    trace = [TraceRequest(4.0, "a", 1, 1)]
    assert [request.arrival for request in at_rate(trace, 2.0)] == [2.0]
    with pytest.raises(WorkloadError, match="rate scale must be above 0"):
        at_rate(Synthetic(TWO, seconds=1), -1.0)


def test_drift_swaps_the_models() -> None:
    found = []
    for seed in range(8):
        workload = Synthetic(TWO, seconds=200, arrivals=Arrivals(change_points=(100.0,)), seed=seed)
        late = Counter(request.model for request in workload if request.arrival > 100)
        found.append(late["b"] > late["a"])
    assert any(found)
    assert not all(found)


def test_a_trace_without_models_is_dealt_out_by_weight() -> None:
    trace = [TraceRequest(float(index), "", 1, 1) for index in range(4000)]
    found = Counter(request.model for request in Assigned(trace, {"a": 3.0, "b": 1.0}))
    assert found["a"] / found["b"] == pytest.approx(3, rel=0.15)


def test_names_of_a_trace_are_kept_mapped_or_refused() -> None:
    trace = [TraceRequest(0.0, "a", 1, 1), TraceRequest(1.0, "GPT-4", 1, 1)]
    mapped = Assigned(trace, {"a": 1.0, "b": 1.0}, {"GPT-4": "b"})
    assert [request.model for request in mapped] == ["a", "b"]
    with pytest.raises(WorkloadError, match="asks for GPT-4, which the fleet does not have"):
        list(Assigned(trace, {"a": 1.0}))
    with pytest.raises(WorkloadError, match="no such model, it has a"):
        Assigned(trace, {"a": 1.0}, {"GPT-4": "b"})


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(WorkloadError, match="bad: the rate must be 0 or more"):
        Traffic("bad", -1.0)
    with pytest.raises(WorkloadError, match="duration or a number"):
        Synthetic(TWO)
    with pytest.raises(WorkloadError, match="all rates are 0"):
        Synthetic([Traffic("a", 0.0)], count=1)
    with pytest.raises(WorkloadError, match="cannot be combined"):
        Arrivals(on_off=(1.0, 1.0), change_points=(1.0,))
