from __future__ import annotations

import pytest

from muxjax.errors import PlanError
from muxjax.placement.planner.plan import PlacementPlan
from muxjax.placement.planner.spatial import spatial_units
from tests.placement.simple_costs import SHAPE, SimpleCosts, plan, planned, unit

SHAPES = {"small": SHAPE, "large": SHAPE}


def devices_by_model(original: PlacementPlan) -> dict[str, tuple[int, ...]]:
    return {u.models[0].name: u.devices for u in spatial_units(original, SimpleCosts(), SHAPES)}


def test_models_have_separate_devices_and_the_busiest_model_the_most() -> None:
    devices = devices_by_model(plan(unit(planned("a", rate=9.0), planned("b")), devices=4))
    assert len(devices["a"]) == 2
    assert not set(devices["a"]) & set(devices["b"])


def test_a_large_model_has_its_minimum_number_of_devices() -> None:
    devices = devices_by_model(plan(unit(planned("a"), planned("b", "large")), devices=3))
    assert (len(devices["a"]), len(devices["b"])) == (1, 2)


def test_replicas_are_merged() -> None:
    replicas = plan(unit(planned("a", rate=2.0)), unit(planned("a", rate=3.0), name="unit-1"))
    (merged,) = spatial_units(replicas, SimpleCosts(), SHAPES)
    assert merged.models[0].rate == 5.0


def test_too_few_or_too_small_devices_raise() -> None:
    three = plan(unit(planned("a"), planned("b"), planned("c")), devices=2)
    with pytest.raises(PlanError, match="needs 3 devices for 3 models, but the cluster has 2"):
        devices_by_model(three)
    with pytest.raises(PlanError, match=r"b .* fits no mesh of up to 1 devices"):
        devices_by_model(plan(unit(planned("b", "large")), devices=1))
    with pytest.raises(PlanError, match="fits no mesh"):
        devices_by_model(plan(unit(planned("a")), memory=0.2e6))
