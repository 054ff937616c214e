from __future__ import annotations

import pytest

from muxjax.placement.planner.batch_curve import mesh_seconds
from muxjax.placement.planner.estimator import find_operating_point
from muxjax.placement.planner.latency import expected_latencies, min_latency_point
from tests.placement.fake_costs import MEMORY, curve


def test_an_overloaded_model_has_no_latency() -> None:
    c = curve(rate=20.0)
    point = find_operating_point([c], MEMORY, "time_sliced")
    assert point is not None
    assert expected_latencies([c], point, "time_sliced") == [None]


def test_latency_at_low_load_is_the_duration_of_the_steps() -> None:
    c = curve(rate=0.01)
    for execution in ("concurrent", "time_sliced"):
        point = find_operating_point([c], MEMORY, execution)
        assert point is not None
        (latency,) = expected_latencies([c], min_latency_point([c], point), execution)
        assert latency is not None
        assert latency.ttft == pytest.approx(0.1, rel=0.02)
        assert latency.tpot == pytest.approx(0.01, rel=0.2)


def test_the_min_latency_point_uses_all_of_the_time() -> None:
    c = curve(rate=5.0)
    point = find_operating_point([c], MEMORY, "time_sliced")
    assert point is not None
    fastest = min_latency_point([c], point)
    assert fastest.seconds < point.seconds
    assert c.rate * mesh_seconds(c, fastest.batches[0]) == pytest.approx(1.0, rel=1e-3)
