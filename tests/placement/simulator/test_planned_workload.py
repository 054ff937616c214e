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


def test_rates_of_replicas_are_summed() -> None:
    assert planned_rates(PLAN) == {"a": 3.0, "b": 5.0}


def test_rates_are_scaled_or_follow_a_power_law() -> None:
    assert {t.name: t.rate for t in planned_traffic(PLAN, rate=16.0)} == {"a": 6.0, "b": 10.0}
    by_power_law = {t.name: t.rate for t in planned_traffic(PLAN, alpha=1.0)}
    assert by_power_law["b"] == pytest.approx(2 * by_power_law["a"])
    assert sum(by_power_law.values()) == pytest.approx(8.0)
    with pytest.raises(WorkloadError, match="the rate must be"):
        planned_traffic(PLAN, rate=-1.0)


def test_lengths_follow_the_plan_within_the_limit_of_the_model() -> None:
    traffic = planned_traffic(PLAN)[0]
    # Prompts of 20 tokens, outputs of 10, at most 512 in total.
    assert traffic.lengths == LogNormal(20.0, 10.0, max_prompt=341, max_output=170)
    short = plan(unit(planned("a", longest=150)))
    assert planned_traffic(short)[0].lengths == LogNormal(20.0, 10.0, max_prompt=100, max_output=50)
    sampled = planned_traffic(PLAN, pairs=[(1, 2)])[0]
    assert sampled.lengths == Sampled([(1, 2)])
