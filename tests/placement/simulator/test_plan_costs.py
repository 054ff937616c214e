from __future__ import annotations

import pytest

from muxjax.errors import PlanError, ProfileError
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.plan import PlannedTarget
from muxjax.placement.simulator.metrics import AttainmentCriterion
from muxjax.placement.simulator.plan_costs import plan_costs, plan_criteria
from muxjax.scheduling.specs import DEFAULT_SCALE
from tests.placement.data import a100_profile
from tests.placement.simple_costs import plan, planned, unit


def test_costs_are_a_roofline_or_the_profile_of_the_plan() -> None:
    original = plan(unit(planned("a")))
    costs = plan_costs(original)
    assert isinstance(costs["toy"], Roofline)
    assert costs["toy"].decode_seconds("small", 1, 10) > 0
    with pytest.raises(ProfileError, match="nowhere"):
        plan_costs(original.model_copy(update={"profile": "nowhere.json"}))
    measured = original.model_copy(update={"profile": str(a100_profile())})
    assert isinstance(plan_costs(measured)["toy"], ProfileTable)


def test_criteria_are_the_targets_of_the_plan_or_a_default() -> None:
    targets = {"b": PlannedTarget(ttft=0.5), "c": PlannedTarget(scale=4.0)}
    original = plan(unit(planned("a"), planned("b"), planned("c"))).model_copy(
        update={"targets": targets}
    )
    costs = plan_costs(original)
    build = AttainmentCriterion.from_targets
    criteria = plan_criteria(original, costs)
    assert criteria["a"] == build(scale=DEFAULT_SCALE, kind="small", tp=1)
    assert criteria["b"] == build(ttft=0.5, kind="small", tp=1)
    assert criteria["c"] == build(scale=4.0, kind="small", tp=1)
    same = plan_criteria(original, costs, build(tpot=0.1))
    assert set(same.values()) == {build(tpot=0.1, kind="small", tp=1)}
    with pytest.raises(PlanError, match="target for tpot must be above 0"):
        plan_criteria(original, costs, build(tpot=0.0))
