from __future__ import annotations

import math

import pytest

from muxjax.errors import WorkloadError
from muxjax.placement.workload.trace import (
    ScaledWorkload,
    TraceRequest,
    TruncatedWorkload,
    validate_requests,
)


def requests_at(*arrivals: float) -> list[TraceRequest]:
    return [TraceRequest(arrival, "a", 3, 4) for arrival in arrivals]


def test_a_higher_rate_shortens_the_gaps() -> None:
    assert [request.arrival for request in ScaledWorkload(requests_at(0.0, 2.0, 4.0), 2.0)] == [
        0.0,
        1.0,
        2.0,
    ]
    with pytest.raises(WorkloadError, match="rate scale must be above 0"):
        ScaledWorkload(requests_at(0.0), 0.0)


def test_a_workload_is_truncated_by_count_or_time() -> None:
    assert len(list(TruncatedWorkload(requests_at(0.0, 1.0, 2.0), count=2))) == 2
    assert len(list(TruncatedWorkload(requests_at(0.0, 1.0, 2.0), seconds=1.0))) == 2
    assert len(list(TruncatedWorkload(requests_at(0.0, 1.0, 2.0)))) == 3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (TraceRequest(0.5, "a", 1, 1), r"here: out of order: this arrival \(0.5 s\)"),
        (TraceRequest(-1.0, "a", 1, 1), "here: the arrival must be 0 s or later"),
        (TraceRequest(math.nan, "a", 1, 1), "here: the arrival must be 0 s or later"),
        (TraceRequest(2.0, "a", 0, 1), "here: the prompt must have at least 1 token"),
        (TraceRequest(2.0, "a", 1, -4), "here: the output must have at least 1 token"),
    ],
)
def test_invalid_requests_raise(request_: TraceRequest, message: str) -> None:
    rows = [("there", TraceRequest(1.0, "a", 1, 1)), ("here", request_)]
    with pytest.raises(WorkloadError, match=message):
        list(validate_requests(rows))
