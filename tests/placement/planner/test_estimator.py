from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxjax.placement.planner.batch_curve import (
    POOL_SHARE,
    build_batch_curve,
    decode_seconds,
    mesh_seconds,
    pool_bytes,
    prefill_seconds,
)
from muxjax.placement.planner.estimator import PAGED, find_operating_point
from muxjax.placement.planner.latency import expected_latencies
from muxjax.placement.planner.load import ModelLoad
from muxjax.scheduling.expected_load import ExpectedLoad
from tests.placement.fake_costs import MEMORY, FakeCosts, curve, load


def test_models_that_do_not_fit_have_no_operating_point() -> None:
    c = curve(weights=MEMORY)
    assert pool_bytes([c], MEMORY) == 0
    for execution in ("concurrent", "time_sliced"):
        assert find_operating_point([c], MEMORY, execution) is None
        # The weights fit, but not one request of each model: 0.9 (10,000 - 9,800) < 2 x 150.
        half = curve(weights=4900.0)
        assert find_operating_point([half, half], MEMORY, execution) is None
        assert find_operating_point([half], MEMORY, execution) is not None


def test_the_pool_fits_the_longest_request_and_a_mean_request_of_each_other_model() -> None:
    # A mean request uses 150 bytes. The pool needs 1,000 + 150 bytes, divided by `PAGED`.
    long = ModelLoad("a", "m", ExpectedLoad(1.0, 100.0, 50.0), longest=1000)
    curves = [
        build_batch_curve(model_load, FakeCosts(), size=1, tp=1) for model_load in (long, load())
    ]
    weights = sum(c.weight_bytes for c in curves)
    for needed, fits in ((1150 / PAGED + 1, True), (1150, False)):
        memory = weights + needed / POOL_SHARE
        assert (find_operating_point(curves, memory, "time_sliced") is not None) == fits
        assert find_operating_point([curve(), curve()], memory, "time_sliced") is not None


def test_time_sliced_units_serve_up_to_their_mesh_time() -> None:
    # An isolated request takes 0.1 + 0.5 s. The pool of 8,910 bytes fits 59.4 requests.
    c = curve(rate=5.0)
    point = find_operating_point([c], MEMORY, "time_sliced")
    assert point is not None
    assert point.served == (1.0,)
    assert point.batches[0] == pytest.approx(POOL_SHARE * (MEMORY - 100) / 150)
    # At four times the rate the mesh is overloaded: a request takes its prefill of 0.1 s and its
    # part of the decode steps.
    busy = find_operating_point([curve(rate=20.0)], MEMORY, "time_sliced")
    assert busy is not None
    assert busy.utilization == 1.0
    assert busy.served[0] == pytest.approx(1 / (20 * mesh_seconds(c, 59.4)), rel=1e-6)


def test_time_sliced_models_are_served_equal_fractions() -> None:
    point = find_operating_point([curve(rate=10.0), curve(rate=30.0)], MEMORY, "time_sliced")
    assert point is not None
    assert point.served[0] == point.served[1] < 1


def test_concurrent_batches_are_the_fixed_point_of_equation_3() -> None:
    curves = [curve(rate=2.0), curve(rate=3.0)]
    point = find_operating_point(curves, MEMORY, "concurrent")
    assert point is not None
    assert point.served == (1.0, 1.0)
    total = 0.0
    for c, batch in zip(curves, point.batches, strict=True):
        served = batch / (point.seconds + decode_seconds(c, batch) * batch)
        assert served == pytest.approx(c.rate, rel=1e-3)
        total += batch * prefill_seconds(c, batch)
    assert total == pytest.approx(point.seconds, rel=1e-3)


def test_concurrent_decodes_do_not_delay_each_other() -> None:
    # Decode steps of each model take 90 % of the time: too much if time-sliced.
    curves = [curve(rate=3.0, prefill=1e-6, per_sequence=0.006)] * 2
    concurrent = find_operating_point(curves, MEMORY, "concurrent")
    time_sliced = find_operating_point(curves, MEMORY, "time_sliced")
    assert concurrent is not None
    assert time_sliced is not None
    assert concurrent.served == (1.0, 1.0)
    assert time_sliced.served[0] < 1


def test_an_overloaded_model_does_not_limit_other_models() -> None:
    greedy, modest = curve(rate=1000.0, prefill=1e-6), curve(rate=1.0, prefill=1e-6)
    point = find_operating_point([greedy, modest], MEMORY, "concurrent")
    assert point is not None
    assert point.served[0] < 1
    assert point.served[1] == 1.0
    # All of the pool is used, with at least one request of each model.
    assert sum(max(1.0, batch) for batch in point.batches) * 150 == pytest.approx(
        pool_bytes([greedy, modest], MEMORY)
    )


def test_slower_decodes_lower_the_throughput() -> None:
    normal = find_operating_point([curve(rate=200.0)], MEMORY, "concurrent")
    slow = find_operating_point([curve(rate=200.0)], MEMORY, "concurrent", 1.5)
    assert normal is not None
    assert slow is not None
    assert slow.served[0] < normal.served[0]


def test_a_model_without_load_is_served_in_full() -> None:
    for execution in ("concurrent", "time_sliced"):
        point = find_operating_point([curve(rate=0.0), curve(rate=1.0)], MEMORY, execution)
        assert point is not None
        assert point.served == (1.0, 1.0)
        assert point.batches[0] == 0
        latencies = expected_latencies([curve(rate=0.0), curve(rate=1.0)], point, execution)
        assert all(latency is not None and math.isfinite(latency.tpot) for latency in latencies)


fleets = st.lists(
    st.tuples(
        st.floats(0.01, 100), st.floats(1, 500), st.floats(1, 500), st.sampled_from((1, 2, 4))
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(fleets, st.sampled_from(("concurrent", "time_sliced")), st.floats(1e-5, 0.01))
def test_the_operating_point_respects_pool_and_load(
    fleet: list[tuple[float, float, float, int]], execution: str, per_sequence: float
) -> None:
    costs = FakeCosts(per_sequence=per_sequence)
    curves = [
        build_batch_curve(
            ModelLoad("a", "m", ExpectedLoad(rate, prompt, output)), costs, size=4, tp=tp
        )
        for rate, prompt, output, tp in fleet
    ]
    memory = 30_000.0
    point = find_operating_point(curves, memory, execution)  # type: ignore[arg-type]
    assert point is not None
    held = sum(
        c.sequence_bytes * max(1.0, min(1024.0, b))
        for c, b in zip(curves, point.batches, strict=True)
    )
    assert held <= pool_bytes(curves, memory) * (1 + 1e-3)
    assert all(0 < fraction <= 1 for fraction in point.served)
    assert 0 <= point.utilization <= 1
    if execution == "time_sliced":
        busy = sum(
            f * c.rate * mesh_seconds(c, b)
            for c, b, f in zip(curves, point.batches, point.served, strict=True)
        )
        assert busy <= 1 + 1e-6
