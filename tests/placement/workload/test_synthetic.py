from __future__ import annotations

from collections import Counter

import pytest

from muxjax.errors import WorkloadError
from muxjax.placement.workload.synthetic import (
    ArrivalProcess,
    AssignedWorkload,
    SyntheticWorkload,
    Traffic,
    scale_rate,
)
from muxjax.placement.workload.trace import TraceRequest

TWO = (Traffic("a", 5.0), Traffic("b", 1.0))


def test_requests_have_the_rates_and_are_in_order() -> None:
    requests = list(SyntheticWorkload(TWO, seconds=1000))
    counts = Counter(request.model for request in requests)
    assert counts["a"] == pytest.approx(5000, rel=0.05)
    assert counts["b"] == pytest.approx(1000, rel=0.1)
    arrivals = [request.arrival for request in requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] <= 1000


def test_the_seed_determines_the_requests() -> None:
    workload = SyntheticWorkload(TWO, count=200, seed=3)
    assert list(workload) == list(workload)
    assert list(workload) != list(SyntheticWorkload(TWO, count=200, seed=4))
    assert len(list(workload)) == 200


def test_requests_of_a_model_do_not_depend_on_other_models() -> None:
    isolated = list(SyntheticWorkload(TWO[:1], seconds=50))
    both = list(SyntheticWorkload(TWO, seconds=50))
    assert [request for request in both if request.model == "a"] == isolated


@pytest.mark.parametrize(
    "arrivals",
    [
        ArrivalProcess(cv=3.0),
        ArrivalProcess(on_off=(2.0, 4.0)),
        ArrivalProcess(change_points=(900.0,)),
    ],
)
def test_arrival_processes_keep_the_mean_rate(arrivals: ArrivalProcess) -> None:
    requests = list(SyntheticWorkload(TWO, seconds=1800, arrivals=arrivals))
    assert len(requests) == pytest.approx(6 * 1800, rel=0.15)


def test_scaling_adds_requests_or_shortens_gaps() -> None:
    faster = list(scale_rate(SyntheticWorkload(TWO, seconds=500), 2.0))
    assert len(faster) == pytest.approx(2 * 6 * 500, rel=0.1)
    assert faster[-1].arrival == pytest.approx(500, rel=0.02)
    trace = [TraceRequest(4.0, "a", 1, 1)]
    assert [request.arrival for request in scale_rate(trace, 2.0)] == [2.0]
    with pytest.raises(WorkloadError, match="rate scale must be above 0"):
        scale_rate(SyntheticWorkload(TWO, seconds=1), -1.0)


def test_a_change_point_may_swap_the_rates() -> None:
    swapped = []
    for seed in range(8):
        workload = SyntheticWorkload(
            TWO, seconds=200, arrivals=ArrivalProcess(change_points=(100.0,)), seed=seed
        )
        late = Counter(request.model for request in workload if request.arrival > 100)
        swapped.append(late["b"] > late["a"])
    assert any(swapped)
    assert not all(swapped)


def test_requests_without_a_model_are_assigned_by_weight() -> None:
    trace = [TraceRequest(float(index), "", 1, 1) for index in range(4000)]
    counts = Counter(request.model for request in AssignedWorkload(trace, {"a": 3.0, "b": 1.0}))
    assert counts["a"] / counts["b"] == pytest.approx(3, rel=0.15)


def test_models_of_a_trace_are_kept_mapped_or_raise() -> None:
    trace = [TraceRequest(0.0, "a", 1, 1), TraceRequest(1.0, "GPT-4", 1, 1)]
    mapped = AssignedWorkload(trace, {"a": 1.0, "b": 1.0}, {"GPT-4": "b"})
    assert [request.model for request in mapped] == ["a", "b"]
    with pytest.raises(WorkloadError, match="has requests for GPT-4, which is not in the fleet"):
        list(AssignedWorkload(trace, {"a": 1.0}))
    with pytest.raises(WorkloadError, match="the fleet has no model b; it has a"):
        AssignedWorkload(trace, {"a": 1.0}, {"GPT-4": "b"})


def test_invalid_arguments_raise() -> None:
    with pytest.raises(WorkloadError, match="bad: the rate must be 0 or more"):
        Traffic("bad", -1.0)
    with pytest.raises(WorkloadError, match="duration or a number"):
        SyntheticWorkload(TWO)
    with pytest.raises(WorkloadError, match="all rates are 0"):
        SyntheticWorkload([Traffic("a", 0.0)], count=1)
    with pytest.raises(WorkloadError, match="cannot be combined"):
        ArrivalProcess(on_off=(1.0, 1.0), change_points=(1.0,))
