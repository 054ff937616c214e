from __future__ import annotations

import pytest

from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.plan import PlannedTarget
from muxjax.placement.planner.planner import PlannerOptions, create_scorer
from muxjax.placement.planner.scorer import CandidateUnit
from muxjax.placement.simulator.group_attainment import GroupSimulator, group_units
from muxjax.placement.simulator.simulated_units import SystemConfig
from muxjax.scheduling.expected_load import ExpectedLoad
from tests.placement.fleets import SHAPES

LIGHT = ModelLoad("light", "llama-7b", ExpectedLoad(2.0, 100, 20))
HEAVY = ModelLoad("heavy", "llama-13b", ExpectedLoad(20.0, 1500, 10))
IDLE = ModelLoad("idle", "llama-7b", ExpectedLoad(0.0, 100, 20))


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> GroupSimulator:
    monkeypatch.setattr("muxjax.placement.simulator.group_attainment.MAX_SECONDS", 30.0)
    cluster = parse_cluster("1x2:a100-80gb")
    costs = [Roofline(SHAPES, cluster.groups[0].device)]
    scorer = create_scorer([LIGHT, HEAVY, IDLE], cluster, costs, PlannerOptions())
    targets = {"heavy": PlannedTarget(ttft=1.0)}
    return GroupSimulator(scorer, targets, SystemConfig(), seed=3)


def unit_of(*models: int, part: float = 1.0) -> CandidateUnit:
    return CandidateUnit(0, 1, tuple((model, part) for model in models))


def test_light_load_meets_its_target(simulator: GroupSimulator) -> None:
    assert simulator.loss((unit_of(0),)).total < 0.05


def test_results_are_cached(simulator: GroupSimulator) -> None:
    first = simulator.loss((unit_of(0),))
    count = simulator.requests
    assert count > 0
    assert simulator.loss((unit_of(0),)) is first
    assert simulator.requests == count


def test_overload_loses_at_least_what_is_refused(simulator: GroupSimulator) -> None:
    result = simulator.loss((unit_of(1),))
    assert 10.0 < result.total <= 20.5
    assert result.by_unit == (result.total,)


def test_simulation_stops_when_too_many_requests_are_lost(simulator: GroupSimulator) -> None:
    group = (unit_of(1),)
    assert simulator.loss_within(group, 0.1) is None
    stopped = simulator.requests
    assert simulator.loss(group).total > 0.1
    assert simulator.requests > 2 * stopped
    assert simulator.loss_within(group, 0.1) is None  # from the cache


def test_unit_without_load_loses_nothing(simulator: GroupSimulator) -> None:
    assert simulator.loss((unit_of(2),)).total == 0.0


def test_units_that_share_a_model_are_simulated_together(simulator: GroupSimulator) -> None:
    half = unit_of(0, part=0.5)
    assert group_units([half, unit_of(2), half]) == [(unit_of(2),), (half, half)]
    result = simulator.loss((half, half))
    assert len(result.by_unit) == 2
    assert result.total < 0.05


def test_groups_are_joined_by_a_unit_with_models_of_both() -> None:
    first, second, both = unit_of(0, part=0.5), unit_of(1, part=0.5), unit_of(0, 1, part=0.5)
    assert group_units([first, second]) == [(first,), (second,)]
    assert group_units([first, second, both]) == [tuple(sorted([first, second, both]))]
