"""Plans a fleet and simulates the plan, so that its promise includes queueing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from muxjax.errors import PlanError
from muxjax.placement.costs.cluster import Cluster
from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.plan import (
    PlacementPlan,
    PlannedTarget,
    PlanSimulation,
    SimulatedService,
)
from muxjax.placement.planner.plan_builder import build_plan
from muxjax.placement.planner.planner import (
    PlannerOptions,
    create_scorer,
    plan_placement,
    search_units,
)
from muxjax.placement.planner.scorer import CandidateUnit, Scorer
from muxjax.placement.planner.spatial import spatial_units
from muxjax.placement.simulator.group_attainment import GroupSimulator
from muxjax.placement.simulator.guided_search import search_by_simulation
from muxjax.placement.simulator.plan_costs import plan_costs, plan_criteria
from muxjax.placement.simulator.planned_workload import planned_traffic
from muxjax.placement.simulator.simulated_units import SystemConfig
from muxjax.placement.simulator.simulation import SimulationSetup, run_simulation
from muxjax.placement.workload.synthetic import SyntheticWorkload

SECONDS = 120.0
"""Least length of the workload, except at rates that would exceed `MAX_REQUESTS`."""
MIN_REQUESTS, MAX_REQUESTS = 10_000, 20_000
"""Requests of the workload: enough for a p99, and few enough for a short simulation."""
MIN_SECONDS, MAX_SECONDS = 20.0, 7_200.0
_CLOSE = 0.05
"""Part of the requests by which spatial partitioning may be behind in the search and is still
simulated in full."""
_SEARCH_SEED = 1_000_003
"""Added to the seed of the search's workload: the promise is measured on different requests."""


def plan_fleet(
    loads: Sequence[ModelLoad],
    cluster: Cluster,
    costs: Sequence[PlanningCosts],
    options: PlannerOptions,
    *,
    policy: str,
    profile: str | None = None,
    report: Callable[[float, float], None] = lambda progress, value: None,
) -> PlacementPlan:
    """Plans a fleet and simulates the plan.

    Under the objective `slo` the placement is searched by simulation (see `guided_search`), and
    compared with spatial partitioning. Other objectives use the planner's steady-state estimate.

    Args:
      loads: the models, their expected loads and targets.
      cluster: the devices.
      costs: one cost model for each group of nodes.
      options: objective, execution, effort and seed.
      policy: the scheduling policy of the simulation.
      profile: path of the profile behind the costs.
      report: called with the progress, 0 to 1, and the best value so far.

    Raises:
      PlanError: as `planner.plan_placement`.
    """
    began = time.perf_counter()
    targets = model_targets(loads)
    if options.objective != "slo" or options.as_upstream:
        plan = plan_placement(
            loads, cluster, costs, options, profile=profile, began=began, report=report
        )
        return simulate_plan(plan.model_copy(update={"targets": targets}), policy)
    # Units are configured for throughput; simulation compares them by attainment.
    scorer = create_scorer(loads, cluster, costs, replace(options, objective="throughput"))
    system = SystemConfig(policy, options.execution)
    simulator = GroupSimulator(scorer, targets, system, options.seed + _SEARCH_SEED)
    starts = [search_units(scorer, options)]
    spatial = _spatial_placement(scorer, build_plan(scorer, starts[0], options, profile, began))
    if spatial is not None:
        starts.append(spatial)
    units = search_by_simulation(
        scorer, simulator, options, starts, lambda done, value: report(0.9 * done, value)
    )
    candidates = [units]
    if (
        spatial is not None
        and simulator.placement_loss(spatial)
        <= simulator.placement_loss(units) + _CLOSE * scorer.total_rate
    ):
        candidates.append(spatial)
    plans = []
    for candidate in candidates:
        plan = build_plan(scorer, candidate, options, profile, began)
        plans.append(simulate_plan(plan.model_copy(update={"targets": targets}), policy))
    best = max(plans, key=lambda plan: plan.slo_attainment)
    report(1.0, best.slo_attainment)
    score = best.slo_attainment * best.rate
    bound = max(best.bound, score)
    return best.model_copy(
        update={
            "score": score,
            "bound": bound,
            "gap": 1 - score / bound if bound else 0.0,
            "seconds": time.perf_counter() - began,
        }
    )


def model_targets(loads: Sequence[ModelLoad]) -> dict[str, PlannedTarget]:
    """The target of each model: its explicit `ttft` and `tpot`, or else its latency scale."""
    return {
        load.name: PlannedTarget(ttft=load.slo.ttft, tpot=load.slo.tpot)
        if load.slo.ttft is not None or load.slo.tpot is not None
        else PlannedTarget(scale=load.slo.scale)
        for load in loads
    }


def simulate_plan(plan: PlacementPlan, policy: str) -> PlacementPlan:
    """Simulates a plan at its expected load and records the result in it.

    Args:
      plan: the plan, with its targets. Its seed is that of the workload, as by default in
        `muxjax simulate`.
      policy: the scheduling policy.

    Returns:
      The plan with `simulation` and `slo_attainment`; unchanged if no load is expected.

    Raises:
      PlanError: the plan cannot be run, for example because a pool is too small.
    """
    if plan.rate <= 0:
        return plan
    costs = plan_costs(plan)
    seconds = promise_seconds(plan.rate)
    workload = SyntheticWorkload(planned_traffic(plan), seconds, seed=plan.seed)
    if next(iter(workload), None) is None:
        return plan
    setup = SimulationSetup(plan, costs, plan_criteria(plan, costs), seed=plan.seed)
    result = run_simulation(setup, SystemConfig(policy, plan.execution), workload)
    simulation = PlanSimulation(
        policy=policy,
        seconds=seconds,
        seed=plan.seed,
        models={name: SimulatedService(**_service(m)) for name, m in result["models"].items()},
        **_service(result | {"throughput": result["total_throughput"]}),
    )
    attainment = simulation.slo_attainment
    return plan.model_copy(
        update={
            "simulation": simulation,
            "slo_attainment": plan.slo_attainment if attainment is None else attainment,
        }
    )


def promise_seconds(rate: float) -> float:
    """Length in seconds of the simulated workload at a rate of all models, in requests/s."""
    seconds = min(max(SECONDS, MIN_REQUESTS / rate), MAX_REQUESTS / rate)
    return float(round(min(MAX_SECONDS, max(MIN_SECONDS, seconds))))


def _service(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "requests": result["requests"],
        "slo_attainment": result["slo_attainment"],
        "throughput": result["throughput"],
        "ttft_p50": result["ttft_s"]["p50"],
        "ttft_p99": result["ttft_s"]["p99"],
        "tpot_p50": result["tpot_s"]["p50"],
        "tpot_p99": result["tpot_s"]["p99"],
    }


def _spatial_placement(scorer: Scorer, plan: PlacementPlan) -> list[CandidateUnit] | None:
    """Each model of a plan on separate devices; None if the cluster is too small for that."""
    try:
        planned = spatial_units(plan, scorer.costs[0], plan.shapes)
    except PlanError:
        return None
    names = [load.name for load in scorer.loads]
    group_of_node = [
        index for index, group in enumerate(scorer.cluster.groups) for _ in range(group.nodes)
    ]
    units = [
        CandidateUnit(group_of_node[unit.node], unit.size, ((names.index(unit.name), 1.0),))
        for unit in planned
    ]
    return units if all(scorer.score(*unit) for unit in units) else None
