from __future__ import annotations

import pytest

from muxjax.placement.planner.batch_curve import (
    build_batch_curve,
    decode_seconds,
    mesh_seconds,
    prefill_seconds,
)
from muxjax.placement.planner.load import ModelLoad
from muxjax.scheduling.expected_load import ExpectedLoad
from tests.placement.fake_costs import FakeCosts, curve


def test_a_curve_has_the_times_and_sizes_of_a_replica() -> None:
    c = curve(size=4, tp=2)
    assert (c.tp, c.replicas, c.rate) == (2, 2, 0.5)
    assert c.weight_bytes == 50
    assert c.sequence_bytes == 150 / 2
    # A batch of 2 on two devices: 200 prompt tokens, 50 decode steps.
    assert prefill_seconds(c, 2) == pytest.approx(0.1 / 2)
    assert decode_seconds(c, 2) == pytest.approx(50 * 0.01 / 2 / 2)
    assert mesh_seconds(c, 2) == pytest.approx(0.05 + 0.125)
    # A batch below 1 takes the time of 1.
    assert mesh_seconds(c, 0.1) == pytest.approx(0.05 + 0.25)


def test_a_batch_above_the_limit_runs_in_rounds() -> None:
    limited = build_batch_curve(
        ModelLoad("a", "m", ExpectedLoad(1.0, 100.0, 50.0), max_batch=4), FakeCosts(), size=1, tp=1
    )
    assert decode_seconds(limited, 4) == decode_seconds(limited, 16)
    assert mesh_seconds(limited, 4) == pytest.approx(0.1 + 50 * 0.01 / 4)
