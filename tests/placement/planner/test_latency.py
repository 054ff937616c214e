from __future__ import annotations

import pytest

from muxjax.placement.planner.batch_curve import (
    mesh_seconds,
)
from muxjax.placement.planner.estimator import find_operating_point
from muxjax.placement.planner.latency import expected_latencies, min_latency_point
from tests.placement.fake_costs import MEMORY, curve


def test_latency_grows_without_bound_where_more_comes_than_is_served() -> None:
    c = curve(rate=20.0)
    point = find_operating_point([c], MEMORY, "time_sliced")
    assert point is not None
    assert expected_latencies([c], point, "time_sliced") == [None]


def test_latency_of_a_quiet_unit_is_that_of_its_steps() -> None:
    c = curve(rate=0.01)
    for execution in ("concurrent", "time_sliced"):
        point = find_operating_point([c], MEMORY, execution)
        assert point is not None
        (wait,) = expected_latencies([c], min_latency_point([c], point), execution)
        assert wait is not None
        assert wait.ttft == pytest.approx(0.1, rel=0.02)
        assert wait.tpot == pytest.approx(0.01, rel=0.2)


def test_a_min_latency_point_takes_the_whole_time_or_no_batch() -> None:
    c = curve(rate=5.0)
    point = find_operating_point([c], MEMORY, "time_sliced")
    assert point is not None
    quiet = min_latency_point([c], point)
    assert quiet.seconds < point.seconds
    assert c.rate * mesh_seconds(c, quiet.batches[0]) == pytest.approx(1.0, rel=1e-3)
