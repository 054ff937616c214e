from __future__ import annotations

import pytest

from muxjax.errors import PlanError
from muxjax.placement.planner.plan import PlacementPlan
from muxjax.placement.planner.spatial import spatial_units
from tests.placement.simple_costs import SHAPE, SimpleCosts, plan, planned, unit

SHAPES = {"small": SHAPE, "large": SHAPE}


def spread(found: PlacementPlan) -> dict[str, tuple[int, ...]]:
    return {u.models[0].name: u.devices for u in spatial_units(found, SimpleCosts(), SHAPES)}


def test_everyone_has_devices_of_its_own_and_the_neediest_more() -> None:
    found = spread(plan(unit(planned("a", rate=9.0), planned("b")), devices=4))
    assert len(found["a"]) == 2
    assert not set(found["a"]) & set(found["b"])


def test_a_large_model_gets_the_devices_that_it_needs() -> None:
    found = spread(plan(unit(planned("a"), planned("b", "large")), devices=3))
    assert (len(found["a"]), len(found["b"])) == (1, 2)


def test_replicas_become_one() -> None:
    both = plan(unit(planned("a", rate=2.0)), unit(planned("a", rate=3.0), name="unit-1"))
    (only,) = spatial_units(both, SimpleCosts(), SHAPES)
    assert only.models[0].rate == 5.0


def test_too_few_devices_and_too_small_ones_are_refused() -> None:
    three = plan(unit(planned("a"), planned("b"), planned("c")), devices=2)
    with pytest.raises(PlanError, match="needs 3 devices for 3 models, and there are 2"):
        spread(three)
    with pytest.raises(PlanError, match=r"b .* fits no mesh of up to 1 devices"):
        spread(plan(unit(planned("b", "large")), devices=1))
    with pytest.raises(PlanError, match="fits no mesh"):
        spread(plan(unit(planned("a")), memory=0.2e6))
