"""From loads, a cluster and costs to a plan: checks, search, quotas, places on nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from muxjax._version import __version__
from muxjax.errors import PlanError
from muxjax.placement.costs.cluster import Cluster
from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.planner.bound import upper_bound
from muxjax.placement.planner.estimator import (
    LARGEST_BATCH,
    POOL_SHARE,
    BatchCurve,
    busy_seconds,
    decode_seconds,
    latencies,
    pool_bytes,
    prefill_seconds,
    quiet_point,
)
from muxjax.placement.planner.exact import solve
from muxjax.placement.planner.load import ModelLoad, check_loads
from muxjax.placement.planner.plan import (
    Execution,
    PlacementPlan,
    PlannedDevice,
    PlannedModel,
    PlannedNodes,
    PlannedUnit,
)
from muxjax.placement.planner.plan_hash import config_hash
from muxjax.placement.planner.scorer import Objective, Scorer, slowdown
from muxjax.placement.planner.search import Placement, Search, Unit
from muxjax.placement.planner.upstream_estimator import UpstreamEstimator, member, understands
from muxjax.placement.planner.upstream_search import NODE_SPLITS, combinations
from muxjax.placement.planner.upstream_search import search as upstream_search

STEPS_A_MODEL = 25
FEWEST_STEPS, MOST_STEPS = 400, 2000
"""Steps of improvement: 25 for each model, about where more find little more. Small fleets need
some even so, and for large ones half a second for each hundred models has to do."""
STEPS_UNDER_FLOOR = 150
"""With MuxServe's estimator beside ours each step costs more, and one begins from its placement."""
_COMBINATIONS = 5000
"""Of node splits, up to which MuxServe's own search is run to begin from: a third of a second."""
_SETTLED = 5
"""Models up to which the exact solution stands, whatever MuxServe's estimator says of it."""
_FLOORS = 0.25
"""Part of the pool that is guaranteed, all models together, as the engine has it."""


@dataclass(frozen=True)
class PlannerOptions:
    """How to plan.

    Attributes:
      execution: how units share their devices.
      objective: what to maximise.
      effort: of the search: 2 makes twice the steps.
      seed: of the search.
      as_upstream: place as MuxServe's own search does.
    """

    execution: Execution = "time_sliced"
    objective: Objective = "throughput"
    effort: float = 1.0
    seed: int = 0
    as_upstream: bool = False


def plan_placement(
    loads: Sequence[ModelLoad],
    cluster: Cluster,
    costs: Sequence[PlanningCosts],
    options: PlannerOptions | None = None,
    *,
    profile: str | None = None,
    began: float | None = None,
    report: Callable[[float, float], None] = lambda done, value: None,
) -> PlacementPlan:
    """Plans a fleet.

    Args:
      loads: the models and what is expected of them.
      cluster: what there is.
      costs: a cost model for each group of nodes of the cluster.
      options: how.
      profile: path of the profile that the costs are from, for the plan's file.
      began: `time.perf_counter()` when the work began; now by default.
      report: told how far the search is, 0 to 1, and the best value so far.

    Raises:
      PlanError: a model that fits nowhere, or models that do not fit together; or, as upstream, a
        fleet or a cluster that its search cannot do.
    """
    began = time.perf_counter() if began is None else began
    options = options or PlannerOptions()
    check_loads(loads)
    for load in loads:
        known = [load.kind in cost.models for cost in costs]
        if not all(known):
            raise PlanError(f"{load.name}: there are no costs for {load.kind}")
    upstream = _upstream(loads, cluster, costs)
    scorer = Scorer(loads, cluster, costs, options.execution, options.objective, upstream)
    _check_fit(scorer)
    units = _place(scorer, options, report)
    return _assemble(scorer, units, options, profile, began)


def _upstream(
    loads: Sequence[ModelLoad], cluster: Cluster, costs: Sequence[PlanningCosts]
) -> UpstreamEstimator | None:
    """MuxServe's estimator, where the costs are from its profile and it knows all models."""
    table = costs[0]
    if not isinstance(table, ProfileTable) or any(cost is not table for cost in costs):
        return None
    known = understands(table.raw, {load.kind for load in loads})
    if not known or any(load.rate <= 0 for load in loads):
        return None
    members = [member(load) for load in loads]
    return UpstreamEstimator(table.raw, members, cluster.num_devices)


def _check_fit(scorer: Scorer) -> None:
    """Raises PlanError for a model that fits nowhere, with what would make it fit."""
    for model, load in enumerate(scorer.loads):
        found, best = False, ""
        most = 0.0
        for group, nodes in enumerate(scorer.cluster.groups):
            for size in nodes.mesh_sizes():
                if scorer.unit(group, size, ((model, 1.0),)) is not None:
                    found = True
                    break
                for tp in scorer.degrees(group, size, model):
                    costs = scorer.costs[group]
                    weights = costs.weight_bytes(load.kind, tp=tp)
                    request = load.tokens * costs.kv_bytes_per_token(load.kind, tp=tp)
                    part = nodes.device.memory / (weights + request / POOL_SHARE)
                    if part > most:
                        most = part
                        best = (
                            f"on {tp} x {nodes.device.name} it needs {weights / 1e9:.1f} GB of "
                            f"weights and {request / POOL_SHARE / 1e9:.1f} GB for one request of "
                            f"{load.tokens:.0f} tokens on each device, which has "
                            f"{nodes.device.memory / 1e9:.1f} GB"
                        )
        if found:
            continue
        who = load.name if load.kind == load.name else f"{load.name} ({load.kind})"
        if not best:
            known = ", ".join(map(str, scorer.costs[0].tp_degrees(load.kind)))
            raise PlanError(
                f"{who} fits nowhere on {scorer.cluster}: it can be split over "
                f"{known} devices, and no node has so many; use nodes with more devices"
            )
        raise PlanError(
            f"{who} fits nowhere on {scorer.cluster}: {best}; "
            f"{1 / most:.1f} times the memory would do: use larger devices, nodes with more of "
            "them to split it over, fewer bits a weight, or shorter requests"
        )


def _place(
    scorer: Scorer, options: PlannerOptions, report: Callable[[float, float], None]
) -> list[Unit]:
    starts: list[Sequence[Unit]] = []
    floor = 0.0
    groups = scorer.cluster.groups
    upstream = scorer.upstream
    if options.as_upstream:
        if upstream is None or len(groups) > 1:
            raise PlanError(
                "--upstream-compatible needs MuxServe's profile of LLaMA models, rates above 0, "
                "and nodes of one kind"
            )
        return _as_upstream(scorer, upstream)
    solved = solve(scorer)
    if solved is not None:
        starts.append(solved)
    if (
        upstream is not None
        and (solved is None or len(scorer.loads) > _SETTLED)
        and len(groups) == 1
        and groups[0].devices in NODE_SPLITS
        and combinations(groups[0].nodes, groups[0].devices) <= _COMBINATIONS
    ):
        try:
            begin = _as_upstream(scorer, upstream)
        except PlanError:
            begin = []  # where it finds nothing, there is nothing to begin from
        if begin and all(scorer.unit(*unit) for unit in begin):
            starts.append(begin)
            floor = Placement(scorer, begin).upstream()
    steps = min(MOST_STEPS, max(FEWEST_STEPS, STEPS_A_MODEL * len(scorer.loads)))
    if floor:
        steps = STEPS_UNDER_FLOOR
    steps = max(1, round(options.effort * steps))
    search = Search(scorer, seed=options.seed, floor=floor, report=report)
    found = search.run(starts, steps)
    if found is None:
        raise PlanError(_too_full(scorer))
    return found.units


def _as_upstream(scorer: Scorer, upstream: UpstreamEstimator) -> list[Unit]:
    group = scorer.cluster.groups[0]
    found = upstream_search(upstream, group.nodes, group.devices)
    if found is None:
        raise PlanError(f"MuxServe's search finds no placement of the fleet on {scorer.cluster}")
    index = {load.name: model for model, load in enumerate(scorer.loads)}
    return [
        (0, size, tuple(sorted((index[name], 1.0) for name, _ in placed)), True)
        for size, placed in found.meshes
        if placed
    ]


def _too_full(scorer: Scorer) -> str:
    needed = 0.0
    for load in scorer.loads:
        costs = scorer.costs[0]
        needed += min(
            tp
            * (
                costs.weight_bytes(load.kind, tp=tp)
                + load.tokens * costs.kv_bytes_per_token(load.kind, tp=tp) / POOL_SHARE
            )
            for tp in costs.tp_degrees(load.kind)
        )
    there = sum(g.nodes * g.devices * g.device.memory for g in scorer.cluster.groups)
    largest = max(scorer.loads, key=lambda load: scorer.costs[0].weight_bytes(load.kind))
    return (
        f"the fleet does not fit on {scorer.cluster}: its {len(scorer.loads)} models need at least "
        f"{needed / 1e9:.0f} GB for weights and one request each, and the devices have "
        f"{there / 1e9:.0f} GB; add devices, or leave out models ({largest.name} is the largest)"
    )


def _assemble(
    scorer: Scorer,
    units: Sequence[Unit],
    options: PlannerOptions,
    profile: str | None,
    began: float,
) -> PlacementPlan:
    cluster, loads = scorer.cluster, scorer.loads
    planned = [
        _planned_unit(scorer, unit, f"unit-{number}", node, first)
        for number, (unit, node, first) in enumerate(_on_nodes(cluster, units))
    ]
    throughput, weighted, attained = 0.0, 0.0, 0.0
    by_name = {load.name: load for load in loads}
    for unit in planned:
        for model in unit.models:
            load = by_name[model.name]
            throughput += model.throughput
            weighted += model.throughput * load.rate
            if _attained(model, load):
                attained += model.rate
    rate = scorer.total_rate
    placement = Placement(scorer, units)
    bound = max(upper_bound(scorer), placement.value)
    shapes = {load.kind: scorer.costs[0].shape(load.kind) for load in loads}
    settings = {
        "loads": [asdict(load) for load in loads],
        "cluster": [asdict(group) for group in cluster.groups],
        "shapes": {kind: asdict(shape) for kind, shape in shapes.items()},
        "profile": profile,
        "options": asdict(options),
    }
    return PlacementPlan(
        muxjax=__version__,
        config_hash=config_hash(settings),
        seed=options.seed,
        execution=options.execution,
        objective=options.objective,
        cluster=tuple(
            PlannedNodes(nodes=g.nodes, devices=g.devices, device=g.device.name)
            for g in cluster.groups
        ),
        devices=tuple(
            PlannedDevice(**asdict(device))
            for device in {g.device.name: g.device for g in cluster.groups}.values()
        ),
        shapes=shapes,
        profile=profile,
        units=tuple(planned),
        throughput=throughput,
        weighted_throughput=weighted / rate if rate else 0.0,
        rate=rate,
        slo_attainment=min(1.0, attained / rate) if rate else 1.0,
        score=placement.value,
        bound=bound,
        gap=max(0.0, 1 - placement.value / bound) if bound else 0.0,
        upstream_score=placement.upstream() / rate if scorer.upstream is not None else None,
        seconds=time.perf_counter() - began,
    )


def _attained(model: PlannedModel, load: ModelLoad) -> bool:
    if model.ttft is None or model.tpot is None:
        return False
    in_time = load.slo.ttft is None or model.ttft <= load.slo.ttft
    return in_time and (load.slo.tpot is None or model.tpot <= load.slo.tpot)


def _on_nodes(cluster: Cluster, units: Sequence[Unit]) -> list[tuple[Unit, int, int]]:
    """Each unit with its node and its first device there; the largest units first."""
    free: list[list[int]] = []
    offsets = []
    for group in cluster.groups:
        offsets.append(sum(len(nodes) for nodes in free))
        free.append([group.devices] * group.nodes)
    placed = []
    for unit in sorted(units, key=lambda u: (-u[1], u[0], u[2])):
        kind, size = unit[0], unit[1]
        # Sizes are powers of two and come in descending order, so meshes stay aligned and the
        # first node with room will do (see `search.Room`).
        node = next(n for n, left in enumerate(free[kind]) if left >= size)
        first = cluster.groups[kind].devices - free[kind][node]
        free[kind][node] -= size
        placed.append((unit, offsets[kind] + node, first))
    return placed


def _planned_unit(scorer: Scorer, unit: Unit, name: str, node: int, first: int) -> PlannedUnit:
    group, size, items, _ = unit
    scored = scorer.unit(*unit)
    assert scored is not None
    curves = scorer.curves(group, size, items, scored.degrees, scored.shares)
    slow = slowdown(scored.shares, scorer.execution)
    point = scored.point
    if scorer.execution == "time_sliced":
        point = quiet_point(curves, point)
    waits = latencies(curves, point, scorer.execution, slow)
    memory = scorer.cluster.groups[group].device.memory
    pool = pool_bytes(curves, memory)
    floors, quotas = _quotas(scorer, items, curves, pool)
    models = []
    for index, (item, curve) in enumerate(zip(items, curves, strict=True)):
        load = scorer.loads[item[0]]
        fraction, batch = point.fractions[index], point.batches[index]
        prefill, decode = _busy_parts(curve, batch, fraction, scorer.execution, slow)
        limit = load.max_batch or LARGEST_BATCH
        holds = int(quotas[index] * pool / curve.sequence_bytes)
        wait = waits[index]
        models.append(
            PlannedModel(
                name=load.name,
                kind=load.kind,
                rate=load.rate * item[1],
                prompt_tokens=load.prompt_tokens,
                output_tokens=load.output_tokens,
                tp=curve.tp,
                replicas=curve.replicas,
                decode_share=scored.shares[index],
                prefill_time=prefill,
                decode_time=decode,
                kv_floor=floors[index],
                kv_quota=quotas[index],
                longest=load.longest,
                max_batch=max(1, min(limit, holds)) * curve.replicas,
                batch=min(batch, limit) * curve.replicas,
                throughput=load.rate * item[1] * fraction,
                ttft=None if wait is None else wait.ttft,
                tpot=None if wait is None else wait.tpot,
            )
        )
    weights = sum(curve.weight_bytes for curve in curves)
    return PlannedUnit(
        name=name,
        node=node,
        device=scorer.cluster.groups[group].device.name,
        devices=tuple(range(first, first + size)),
        weight_bytes=weights,
        reserved_bytes=memory - weights - pool,
        kv_bytes=pool,
        throughput=sum(model.throughput for model in models),
        use=scored.point.use,
        models=tuple(models),
    )


def _busy_parts(
    curve: BatchCurve, batch: float, fraction: float, execution: Execution, slow: float
) -> tuple[float, float]:
    """The parts of the time in which a model's prefills and its decode steps run."""
    served = curve.rate * fraction
    decode = decode_seconds(curve, batch)
    if execution == "time_sliced":
        # As MuxServe's search has it, a curve may be that of a share; in turn all have the whole.
        busy = busy_seconds(curve, batch)
        decode = min(decode, busy)
        prefill = busy - decode
    else:
        prefill = prefill_seconds(curve, batch)
        decode *= slow
    return min(1.0, served * prefill), min(1.0, served * decode)


def _quotas(
    scorer: Scorer, items: Sequence[tuple[int, float]], curves: Sequence[BatchCurve], pool: float
) -> tuple[list[float], list[float]]:
    """KV floors and initial quotas, as parts of the pool.

    Quotas are in proportion to `rate x tokens x bytes a token` (MuxServe, section 3.3), and at
    least the floor. A floor that is not given is an equal part of a quarter of the pool, or what
    one request takes if that is less.
    """
    floors = []
    for (model, _), curve in zip(items, curves, strict=True):
        given = scorer.loads[model].kv_floor
        computed = min(curve.sequence_bytes / pool, _FLOORS / len(items))
        floors.append(computed if given is None else given)
    total = sum(floors)
    if total > 1.0:
        floors = [floor / total for floor in floors]
    needs = [curve.rate * curve.sequence_bytes for curve in curves]
    if not any(needs):
        needs = [1.0] * len(items)
    fixed: set[int] = set()
    while True:
        rest = 1.0 - sum(floors[i] for i in fixed)
        need = sum(n for i, n in enumerate(needs) if i not in fixed)
        quotas = [
            floors[i] if i in fixed else rest * n / need if need else 0.0
            for i, n in enumerate(needs)
        ]
        under = {i for i in range(len(items)) if i not in fixed and quotas[i] < floors[i]}
        if not under:
            return floors, [min(1.0, quota) for quota in quotas]
        fixed |= under
