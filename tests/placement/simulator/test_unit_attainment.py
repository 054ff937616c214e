from __future__ import annotations

import pytest

from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.plan import PlannedTarget
from muxjax.placement.planner.planner import PlannerOptions, create_scorer
from muxjax.placement.planner.scorer import CandidateUnit
from muxjax.placement.simulator.simulated_units import SystemConfig
from muxjax.placement.simulator.unit_attainment import UnitSimulator
from muxjax.scheduling.expected_load import ExpectedLoad
from tests.placement.fleets import SHAPES

LIGHT = ModelLoad("light", "llama-7b", ExpectedLoad(2.0, 100, 20))
HEAVY = ModelLoad("heavy", "llama-13b", ExpectedLoad(20.0, 1500, 10))
IDLE = ModelLoad("idle", "llama-7b", ExpectedLoad(0.0, 100, 20))


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> UnitSimulator:
    monkeypatch.setattr("muxjax.placement.simulator.unit_attainment.MAX_SECONDS", 30.0)
    cluster = parse_cluster("1x2:a100-80gb")
    costs = [Roofline(SHAPES, cluster.groups[0].device)]
    scorer = create_scorer([LIGHT, HEAVY, IDLE], cluster, costs, PlannerOptions())
    targets = {"heavy": PlannedTarget(ttft=1.0)}
    return UnitSimulator(scorer, targets, SystemConfig(), seed=3)


def unit_of(*models: int) -> CandidateUnit:
    return CandidateUnit(0, 1, tuple((model, 1.0) for model in models))


def test_light_load_meets_its_target(simulator: UnitSimulator) -> None:
    result = simulator.attainment(unit_of(0))
    assert result is not None
    assert result.attained > 1.95
    assert result.attained + result.lost == pytest.approx(2.0)


def test_results_are_cached(simulator: UnitSimulator) -> None:
    first = simulator.attainment(unit_of(0))
    count = simulator.requests
    assert count > 0
    assert simulator.attainment(unit_of(0)) is first
    assert simulator.requests == count


def test_overload_attains_at_most_what_is_served(simulator: UnitSimulator) -> None:
    result = simulator.attainment(unit_of(1))
    assert result is not None
    assert result.attained < 10.0
    assert result.attained + result.lost == pytest.approx(20.0)


def test_simulation_stops_when_too_many_requests_are_lost(simulator: UnitSimulator) -> None:
    assert simulator.attainment(unit_of(1), max_lost=0.1) is None
    stopped = simulator.requests
    assert simulator.attainment(unit_of(1)) is not None
    assert simulator.requests > 2 * stopped
    assert simulator.attainment(unit_of(1), max_lost=0.1) is None  # from the cache


def test_unit_without_load_loses_nothing(simulator: UnitSimulator) -> None:
    result = simulator.attainment(unit_of(2))
    assert result is not None
    assert (result.attained, result.lost) == (0.0, 0.0)
