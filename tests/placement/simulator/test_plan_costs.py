from __future__ import annotations

import pytest

from muxjax.errors import PlanError, ProfileError
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.simulator.metrics import AttainmentCriterion
from muxjax.placement.simulator.plan_costs import plan_costs, plan_criteria
from muxjax.scheduling.specs import LatencySlo
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


def test_criteria_are_the_slos_of_the_models_or_the_default() -> None:
    original = plan(unit(planned("a"), planned("b")))
    costs = plan_costs(original)
    criteria = plan_criteria(
        original, costs, AttainmentCriterion.from_targets(scale=8.0), {"b": LatencySlo(ttft=0.5)}
    )
    assert criteria["a"] == AttainmentCriterion.from_targets(scale=8.0, kind="small", tp=1)
    assert criteria["b"] == AttainmentCriterion.from_targets(ttft=0.5, kind="small", tp=1)
    with pytest.raises(PlanError, match="target for tpot must be above 0"):
        plan_criteria(original, costs, AttainmentCriterion.from_targets(tpot=0.0))
