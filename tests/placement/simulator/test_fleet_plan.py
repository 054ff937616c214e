from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.plan import PlacementPlan, PlannedTarget, load_plan
from muxjax.placement.planner.planner import PlannerOptions
from muxjax.placement.simulator.fleet_plan import (
    MAX_REQUESTS,
    MAX_SECONDS,
    model_targets,
    plan_fleet,
    promise_seconds,
    simulate_plan,
)
from muxjax.placement.simulator.plan_costs import plan_costs, plan_criteria
from muxjax.placement.simulator.planned_workload import planned_traffic
from muxjax.placement.simulator.simulated_units import SystemConfig
from muxjax.placement.simulator.simulation import SimulationSetup, run_simulation
from muxjax.placement.workload.synthetic import SyntheticWorkload
from muxjax.scheduling.expected_load import ExpectedLoad
from muxjax.scheduling.specs import DEFAULT_SCALE, LatencySlo
from tests.placement.fleets import SHAPES

TITLES = ModelLoad("titles", "llama-7b", ExpectedLoad(2.0, 100, 4), LatencySlo(ttft=0.1))
LONG = ModelLoad("long", "llama-13b", ExpectedLoad(1.0, 1500, 30))


@pytest.fixture(autouse=True, scope="module")
def _short_simulations() -> Iterator[None]:
    """The type checks of the tests make simulations slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("muxjax.placement.simulator.fleet_plan.SECONDS", 30.0)
        patch.setattr("muxjax.placement.simulator.fleet_plan.MIN_REQUESTS", 60)
        patch.setattr("muxjax.placement.simulator.group_attainment.MAX_SECONDS", 30.0)
        yield


@pytest.fixture(scope="module")
def plan() -> PlacementPlan:
    """The plan of short requests and of long prompts on two devices."""
    return planned([TITLES, LONG])


def planned(
    loads: Sequence[ModelLoad],
    cluster: str = "1x2:a100-80gb",
    objective: str = "slo",
    **options: float,
) -> PlacementPlan:
    parsed = parse_cluster(cluster)
    costs = [Roofline(SHAPES, group.device) for group in parsed.groups]
    settings = PlannerOptions(objective=objective, effort=0.05, **options)  # type: ignore[arg-type]
    return plan_fleet(loads, parsed, costs, settings, policy="adbs")


def simulated(plan: PlacementPlan, policy: str, seed: int) -> dict[str, object]:
    costs = plan_costs(plan)
    workload = SyntheticWorkload(planned_traffic(plan), promise_seconds(plan.rate), seed=seed)
    setup = SimulationSetup(plan, costs, plan_criteria(plan, costs), seed=seed)
    return run_simulation(setup, SystemConfig(policy, plan.execution), workload)


def test_promise_is_the_result_of_a_simulation(plan: PlacementPlan) -> None:
    assert plan.simulation is not None
    result = simulated(plan, "adbs", plan.seed)
    assert plan.slo_attainment == plan.simulation.slo_attainment == result["slo_attainment"]
    assert plan.simulation.ttft_p99 == result["ttft_s"]["p99"]
    assert plan.simulation.requests == result["requests"]
    assert set(plan.simulation.models) == {"titles", "long"}


def test_spatial_partitioning_is_not_ahead_of_the_plan(plan: PlacementPlan) -> None:
    spatial = simulated(plan, "spatial", plan.seed)["slo_attainment"]
    assert plan.slo_attainment >= spatial


def test_short_requests_are_separated_from_long_prefills(plan: PlacementPlan) -> None:
    assert plan.slo_attainment > 0.98
    assert [len(unit.models) for unit in plan.units] == [1, 1]


@pytest.mark.parametrize("objective", ["throughput"])
def test_plans_for_other_objectives_are_simulated_as_well(objective: str) -> None:
    plan = planned([TITLES, LONG], objective=objective)
    assert plan.simulation is not None
    assert plan.slo_attainment == simulated(plan, "adbs", plan.seed)["slo_attainment"]


def test_overload_is_not_promised() -> None:
    heavy = ModelLoad("long", "llama-13b", ExpectedLoad(15.0, 1500, 10))
    plan = planned([heavy], "1x1:a100-80gb")
    assert plan.slo_attainment < 0.5
    assert plan.simulation is not None
    assert plan.simulation.throughput < 15.0


def test_fleet_without_load_has_no_promise() -> None:
    idle = ModelLoad("idle", "llama-7b", ExpectedLoad(0.0, 100, 10))
    assert planned([idle]).simulation is None


def test_plan_file_keeps_targets_and_promise(plan: PlacementPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded.targets == plan.targets
    assert loaded.simulation == plan.simulation
    assert simulate_plan(loaded, "adbs").simulation == plan.simulation


def test_targets_are_the_models_slos() -> None:
    scaled = ModelLoad("scaled", "llama-7b", slo=LatencySlo(scale=3.0))
    assert model_targets([TITLES, LONG, scaled]) == {
        "titles": PlannedTarget(ttft=0.1),
        "long": PlannedTarget(scale=DEFAULT_SCALE),
        "scaled": PlannedTarget(scale=3.0),
    }


def test_promise_has_enough_requests_and_not_too_many() -> None:
    assert promise_seconds(10.0) == 30.0
    assert promise_seconds(1.0) == 60.0
    assert promise_seconds(900.0) * 900 == pytest.approx(MAX_REQUESTS, rel=0.03)
    assert promise_seconds(1e-6) == MAX_SECONDS
