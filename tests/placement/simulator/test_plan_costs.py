from __future__ import annotations

import pytest

from muxjax.errors import PlanError, ProfileError
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import Slo
from muxjax.placement.simulator.metrics import AttainmentTarget
from muxjax.placement.simulator.plan_costs import plan_costs, plan_targets
from tests.placement.data import a100_profile
from tests.placement.simple_costs import plan, planned, unit


def test_costs_come_from_the_roofline_or_the_profile() -> None:
    found = plan(unit(planned("a")))
    costs = plan_costs(found)
    assert isinstance(costs["toy"], Roofline)
    assert costs["toy"].decode_seconds("small", 1, 10) > 0
    with pytest.raises(ProfileError, match="nowhere"):
        plan_costs(found.model_copy(update={"profile": "nowhere.json"}))
    measured = found.model_copy(update={"profile": str(a100_profile())})
    assert isinstance(plan_costs(measured)["toy"], ProfileTable)


def test_targets_are_the_models_own_or_what_was_asked() -> None:
    found = plan(unit(planned("a"), planned("b")))
    costs = plan_costs(found)
    targets = plan_targets(found, costs, AttainmentTarget(scale=8.0), {"b": Slo(ttft=0.5)})
    assert targets["a"] == AttainmentTarget(scale=8.0, kind="small", tp=1)
    assert targets["b"] == AttainmentTarget(ttft=0.5, kind="small", tp=1)
    with pytest.raises(PlanError, match="target for tpot must be above 0"):
        plan_targets(found, costs, AttainmentTarget(tpot=0.0))
