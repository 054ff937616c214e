from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxjax.placement.planner.estimator import (
    PAGED,
    POOL_SHARE,
    BatchCurve,
    build_batch_curve,
    busy_seconds,
    decode_seconds,
    latencies,
    pool_bytes,
    prefill_seconds,
    quiet_point,
    settle,
)
from muxjax.placement.planner.load import ModelLoad
from tests.placement.fake_costs import FakeCosts

MEMORY = 10_000.0


def load(rate: float = 1.0, prompt: float = 100.0, output: float = 50.0) -> ModelLoad:
    return ModelLoad("a", "m", rate, prompt, output)


def curve(rate: float = 1.0, size: int = 1, tp: int = 1, **costs: float) -> BatchCurve:
    return build_batch_curve(load(rate), FakeCosts(**costs), size=size, tp=tp)  # type: ignore[arg-type]


def test_a_curve_on_paper() -> None:
    c = curve(size=4, tp=2)
    assert (c.tp, c.replicas, c.rate) == (2, 2, 0.5)
    assert c.weight_bytes == 50
    assert c.sequence_bytes == 150 / 2
    # A batch of 2 on two devices: 200 prompt tokens, 50 decode steps.
    assert prefill_seconds(c, 2) == pytest.approx(0.1 / 2)
    assert decode_seconds(c, 2) == pytest.approx(50 * 0.01 / 2 / 2)
    assert busy_seconds(c, 2) == pytest.approx(0.05 + 0.125)
    # Fewer than one at a time cost what one costs.
    assert busy_seconds(c, 0.1) == pytest.approx(0.05 + 0.25)


def test_more_than_may_run_at_once_takes_rounds() -> None:
    limited = build_batch_curve(
        ModelLoad("a", "m", 1.0, 100.0, 50.0, max_batch=4), FakeCosts(), size=1, tp=1
    )
    assert decode_seconds(limited, 4) == decode_seconds(limited, 16)
    assert busy_seconds(limited, 4) == pytest.approx(0.1 + 50 * 0.01 / 4)


def test_what_does_not_fit_is_none() -> None:
    c = curve(weights=MEMORY)
    assert pool_bytes([c], MEMORY) == 0
    for execution in ("concurrent", "time_sliced"):
        assert settle([c], MEMORY, execution) is None
        # Weights fit, but not one request of each: 0.9 (10,000 - 9,800) < 2 x 150.
        half = curve(weights=4900.0)
        assert settle([half, half], MEMORY, execution) is None
        assert settle([half], MEMORY, execution) is not None


def test_the_longest_request_of_one_fits_beside_a_mean_one_of_each_other() -> None:
    # A mean request holds 150 bytes. The pool needs 1,000 and 150, and a little for its pages.
    long = ModelLoad("a", "m", 1.0, 100.0, 50.0, longest=1000)
    curves = [build_batch_curve(one, FakeCosts(), size=1, tp=1) for one in (long, load())]
    weights = sum(c.weight_bytes for c in curves)
    for needed, fits in ((1150 / PAGED + 1, True), (1150, False)):
        memory = weights + needed / POOL_SHARE
        assert (settle(curves, memory, "time_sliced") is not None) == fits
        assert settle([curve(), curve()], memory, "time_sliced") is not None


def test_time_sliced_serves_what_the_time_allows() -> None:
    # One at a time would take 0.1 + 0.5 s a request. The pool of 8,910 bytes holds 59.4 requests.
    c = curve(rate=5.0)
    point = settle([c], MEMORY, "time_sliced")
    assert point is not None
    assert point.fractions == (1.0,)
    assert point.batches[0] == pytest.approx(POOL_SHARE * (MEMORY - 100) / 150)
    # At twice the rate time runs out: each takes 0.1 s for its prompt, and its part of the decode.
    busy = settle([curve(rate=20.0)], MEMORY, "time_sliced")
    assert busy is not None
    assert busy.use == 1.0
    assert busy.fractions[0] == pytest.approx(1 / (20 * busy_seconds(c, 59.4)), rel=1e-6)


def test_time_sliced_models_are_served_the_same_part() -> None:
    point = settle([curve(rate=10.0), curve(rate=30.0)], MEMORY, "time_sliced")
    assert point is not None
    assert point.fractions[0] == point.fractions[1] < 1


def test_concurrent_is_the_fixed_point_of_equation_3() -> None:
    curves = [curve(rate=2.0), curve(rate=3.0)]
    point = settle(curves, MEMORY, "concurrent")
    assert point is not None
    assert point.fractions == (1.0, 1.0)
    total = 0.0
    for c, batch in zip(curves, point.batches, strict=True):
        served = batch / (point.seconds + decode_seconds(c, batch) * batch)
        assert served == pytest.approx(c.rate, rel=1e-3)
        total += batch * prefill_seconds(c, batch)
    assert total == pytest.approx(point.seconds, rel=1e-3)


def test_concurrent_decodes_do_not_wait_for_each_other() -> None:
    # Decode alone takes 0.9 of the time of each: in turn they cannot be served, at once they can.
    curves = [curve(rate=3.0, prefill=1e-6, more=0.006)] * 2
    together = settle(curves, MEMORY, "concurrent")
    in_turn = settle(curves, MEMORY, "time_sliced")
    assert together is not None
    assert in_turn is not None
    assert together.fractions == (1.0, 1.0)
    assert in_turn.fractions[0] < 1


def test_a_model_that_needs_little_is_not_held_up_by_one_that_needs_too_much() -> None:
    greedy, modest = curve(rate=1000.0, prefill=1e-6), curve(rate=1.0, prefill=1e-6)
    point = settle([greedy, modest], MEMORY, "concurrent")
    assert point is not None
    assert point.fractions[0] < 1
    assert point.fractions[1] == 1.0
    # And all of the pool is used, one request at least for each.
    assert sum(max(1.0, batch) for batch in point.batches) * 150 == pytest.approx(
        pool_bytes([greedy, modest], MEMORY)
    )


def test_slowed_decodes_serve_less() -> None:
    one = settle([curve(rate=200.0)], MEMORY, "concurrent")
    slow = settle([curve(rate=200.0)], MEMORY, "concurrent", 1.5)
    assert one is not None
    assert slow is not None
    assert slow.fractions[0] < one.fractions[0]


def test_a_model_without_load_is_served_in_full() -> None:
    for execution in ("concurrent", "time_sliced"):
        point = settle([curve(rate=0.0), curve(rate=1.0)], MEMORY, execution)
        assert point is not None
        assert point.fractions == (1.0, 1.0)
        assert point.batches[0] == 0
        waits = latencies([curve(rate=0.0), curve(rate=1.0)], point, execution)
        assert all(wait is not None and math.isfinite(wait.tpot) for wait in waits)


def test_latency_grows_without_bound_where_more_comes_than_is_served() -> None:
    c = curve(rate=20.0)
    point = settle([c], MEMORY, "time_sliced")
    assert point is not None
    assert latencies([c], point, "time_sliced") == [None]


def test_latency_of_a_quiet_unit_is_that_of_its_steps() -> None:
    c = curve(rate=0.01)
    for execution in ("concurrent", "time_sliced"):
        point = settle([c], MEMORY, execution)
        assert point is not None
        (wait,) = latencies([c], quiet_point([c], point), execution)
        assert wait is not None
        assert wait.ttft == pytest.approx(0.1, rel=0.02)
        assert wait.tpot == pytest.approx(0.01, rel=0.2)


def test_a_quiet_point_takes_the_whole_time_or_no_batch() -> None:
    c = curve(rate=5.0)
    point = settle([c], MEMORY, "time_sliced")
    assert point is not None
    quiet = quiet_point([c], point)
    assert quiet.seconds < point.seconds
    assert c.rate * busy_seconds(c, quiet.batches[0]) == pytest.approx(1.0, rel=1e-3)


fleets = st.lists(
    st.tuples(
        st.floats(0.01, 100), st.floats(1, 500), st.floats(1, 500), st.sampled_from((1, 2, 4))
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(fleets, st.sampled_from(("concurrent", "time_sliced")), st.floats(1e-5, 0.01))
def test_settling_keeps_to_pool_and_load(
    fleet: list[tuple[float, float, float, int]], execution: str, more: float
) -> None:
    costs = FakeCosts(more=more)
    curves = [
        build_batch_curve(ModelLoad("a", "m", rate, prompt, output), costs, size=4, tp=tp)
        for rate, prompt, output, tp in fleet
    ]
    memory = 30_000.0
    point = settle(curves, memory, execution)  # type: ignore[arg-type]
    assert point is not None
    held = sum(
        c.sequence_bytes * max(1.0, min(1024.0, b))
        for c, b in zip(curves, point.batches, strict=True)
    )
    assert held <= pool_bytes(curves, memory) * (1 + 1e-3)
    assert all(0 < fraction <= 1 for fraction in point.fractions)
    assert 0 <= point.use <= 1
    if execution == "time_sliced":
        busy = sum(
            f * c.rate * busy_seconds(c, b)
            for c, b, f in zip(curves, point.batches, point.fractions, strict=True)
        )
        assert busy <= 1 + 1e-6
