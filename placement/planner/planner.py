"""The planner: from expected loads, a cluster and cost models to a placement plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from muxjax.errors import PlanError
from muxjax.placement.costs.cluster import Cluster
from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.planner.exact import solve
from muxjax.placement.planner.feasibility import check_each_model_fits, fleet_does_not_fit
from muxjax.placement.planner.load import ModelLoad, validate_loads
from muxjax.placement.planner.placements import Placement
from muxjax.placement.planner.plan import PlacementPlan
from muxjax.placement.planner.plan_builder import PlannerOptions, build_plan
from muxjax.placement.planner.scorer import CandidateUnit, Scorer
from muxjax.placement.planner.search import Search
from muxjax.placement.planner.upstream_estimator import (
    UpstreamEstimator,
    supports_profile,
    upstream_model,
)
from muxjax.placement.planner.upstream_search import (
    NODE_SPLITS,
    count_combinations,
    search_as_upstream,
)

__all__ = ["PlannerOptions", "plan_placement"]

STEPS_PER_MODEL = 25
MIN_STEPS, MAX_STEPS = 400, 2000
"""Improvement steps: `STEPS_PER_MODEL` for each model, within these limits."""
STEPS_WITH_UPSTREAM_FLOOR = 150
"""Improvement steps from MuxServe's placement. Its estimator makes each step slower."""
_MAX_UPSTREAM_COMBINATIONS = 5000
"""Maximum combinations of node splits for which MuxServe's own search provides a start."""
_EXACT_ONLY = 5
"""Maximum number of models for which the exact solution is the only start."""


def plan_placement(
    loads: Sequence[ModelLoad],
    cluster: Cluster,
    costs: Sequence[PlanningCosts],
    options: PlannerOptions | None = None,
    *,
    profile: str | None = None,
    began: float | None = None,
    report: Callable[[float, float], None] = lambda progress, value: None,
) -> PlacementPlan:
    """Plans the placement of a fleet.

    Args:
      loads: the models and their expected loads.
      cluster: the devices.
      costs: one cost model for each group of nodes of the cluster.
      options: objective, execution and effort.
      profile: path of the profile behind the costs; written into the plan.
      began: `time.perf_counter()` at the start of the work; now by default.
      report: called with the progress of the search, 0 to 1, and the best value so far.

    Raises:
      PlanError: a model that fits on no mesh, models that do not fit together, or a model without
        costs. With `as_upstream`, a fleet or cluster that MuxServe's search does not support.
    """
    began = time.perf_counter() if began is None else began
    options = options or PlannerOptions()
    scorer = create_scorer(loads, cluster, costs, options)
    units = search_units(scorer, options, report)
    return build_plan(scorer, units, options, profile, began)


def create_scorer(
    loads: Sequence[ModelLoad],
    cluster: Cluster,
    costs: Sequence[PlanningCosts],
    options: PlannerOptions,
) -> Scorer:
    """Creates the scorer of a fleet that can be placed model by model.

    Raises:
      PlanError: a model that fits on no mesh, or a model without costs.
    """
    validate_loads(loads)
    for load in loads:
        if not all(load.kind in cost.models for cost in costs):
            raise PlanError(f"{load.name}: there are no costs for {load.kind}")
    upstream = _upstream_estimator(loads, cluster, costs)
    scorer = Scorer(loads, cluster, costs, options.execution, options.objective, upstream)
    check_each_model_fits(scorer)
    return scorer


def _upstream_estimator(
    loads: Sequence[ModelLoad], cluster: Cluster, costs: Sequence[PlanningCosts]
) -> UpstreamEstimator | None:
    """MuxServe's estimator, if all costs are from its profile and it supports all models."""
    table = costs[0]
    if not isinstance(table, ProfileTable) or any(cost is not table for cost in costs):
        return None
    supported = supports_profile(table.raw, {load.kind for load in loads})
    if not supported or any(load.expected.rate <= 0 for load in loads):
        return None
    models = [upstream_model(load) for load in loads]
    return UpstreamEstimator(table.raw, models, cluster.num_devices)


def search_units(
    scorer: Scorer,
    options: PlannerOptions,
    report: Callable[[float, float], None] = lambda progress, value: None,
) -> list[CandidateUnit]:
    """Searches the units with the highest score; see `plan_placement`."""
    starts: list[Sequence[CandidateUnit]] = []
    floor = 0.0
    groups = scorer.cluster.groups
    upstream = scorer.upstream
    if options.as_upstream:
        if upstream is None or len(groups) > 1:
            raise PlanError(
                "--upstream-compatible needs MuxServe's profile of LLaMA models, rates above 0, "
                "and nodes of one kind"
            )
        return _place_as_upstream(scorer, upstream)
    exact = solve(scorer)
    if exact is not None:
        starts.append(exact)
    if (
        upstream is not None
        and (exact is None or len(scorer.loads) > _EXACT_ONLY)
        and len(groups) == 1
        and groups[0].devices in NODE_SPLITS
        and count_combinations(groups[0].nodes, groups[0].devices) <= _MAX_UPSTREAM_COMBINATIONS
    ):
        try:
            start = _place_as_upstream(scorer, upstream)
        except PlanError:
            start = []  # MuxServe's search found no placement
        if start and all(scorer.score(*unit) for unit in start):
            starts.append(start)
            floor = Placement(scorer, start).upstream_value()
    steps = min(MAX_STEPS, max(MIN_STEPS, STEPS_PER_MODEL * len(scorer.loads)))
    if floor:
        steps = STEPS_WITH_UPSTREAM_FLOOR
    steps = max(1, round(options.effort * steps))
    search = Search(scorer, seed=options.seed, floor=floor, report=report)
    placement = search.run(starts, steps)
    if placement is None:
        raise PlanError(fleet_does_not_fit(scorer))
    return placement.units


def _place_as_upstream(scorer: Scorer, upstream: UpstreamEstimator) -> list[CandidateUnit]:
    group = scorer.cluster.groups[0]
    placement = search_as_upstream(upstream, group.nodes, group.devices)
    if placement is None:
        raise PlanError(f"MuxServe's search finds no placement of the fleet on {scorer.cluster}")
    index = {load.name: model for model, load in enumerate(scorer.loads)}
    return [
        CandidateUnit(
            0, size, tuple(sorted((index[name], 1.0) for name, _ in placed)), as_upstream=True
        )
        for size, placed in placement.meshes
        if placed
    ]
