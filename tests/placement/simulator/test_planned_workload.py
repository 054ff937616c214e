from __future__ import annotations

import pytest

from muxjax.errors import WorkloadError
from muxjax.placement.simulator.planned_workload import planned_rates, planned_traffic
from muxjax.placement.workload.lengths import LogNormal, Sampled
from tests.placement.simple_costs import plan, planned, unit

PLAN = plan(
    unit(planned("a", rate=1.0), planned("b", rate=5.0)),
    unit(planned("a", rate=2.0), name="unit-1"),
)


def test_replicas_add_up() -> None:
    assert planned_rates(PLAN) == {"a": 3.0, "b": 5.0}


def test_rates_can_be_scaled_or_dealt_anew() -> None:
    assert {t.name: t.rate for t in planned_traffic(PLAN, rate=16.0)} == {"a": 6.0, "b": 10.0}
    dealt = {t.name: t.rate for t in planned_traffic(PLAN, alpha=1.0)}
    assert dealt["b"] == pytest.approx(2 * dealt["a"])
    assert sum(dealt.values()) == pytest.approx(8.0)
    with pytest.raises(WorkloadError, match="the rate must be"):
        planned_traffic(PLAN, rate=-1.0)


def test_lengths_are_the_plans_within_the_models_limit() -> None:
    traffic = planned_traffic(PLAN)[0]
    # 20 tokens in, 10 out, 512 at most.
    assert traffic.lengths == LogNormal(20.0, 10.0, max_prompt=341, max_output=170)
    short = plan(unit(planned("a", longest=150)))
    assert planned_traffic(short)[0].lengths == LogNormal(20.0, 10.0, max_prompt=100, max_output=50)
    sampled = planned_traffic(PLAN, pairs=[(1, 2)])[0]
    assert sampled.lengths == Sampled([(1, 2)])
