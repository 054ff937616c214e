"""Builds the plan file's contents from the units that a search chose."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from muxjax._version import __version__
from muxjax.placement.costs.cluster import Cluster
from muxjax.placement.planner.batch_curve import (
    LARGEST_BATCH,
    BatchCurve,
    decode_seconds,
    mesh_seconds,
    pool_bytes,
    prefill_seconds,
)
from muxjax.placement.planner.bound import upper_bound
from muxjax.placement.planner.latency import expected_latencies, min_latency_point
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.placements import Placement
from muxjax.placement.planner.plan import (
    Execution,
    PlacementPlan,
    PlannedDevice,
    PlannedModel,
    PlannedNodes,
    PlannedUnit,
)
from muxjax.placement.planner.plan_hash import config_hash
from muxjax.placement.planner.scorer import (
    CandidateUnit,
    Item,
    Objective,
    Scorer,
    decode_slowdown,
)

_FLOORS = 0.25
"""Sum of the computed KV floors of all models, as a fraction of the pool, as in the engine."""


@dataclass(frozen=True)
class PlannerOptions:
    """Options of the planner.

    Attributes:
      execution: how units share their devices.
      objective: the quantity to maximize; see `scorer.Objective`.
      effort: multiplies the number of search steps.
      seed: of the search.
      as_upstream: place models as MuxServe's own search does.
    """

    execution: Execution = "time_sliced"
    objective: Objective = "throughput"
    effort: float = 1.0
    seed: int = 0
    as_upstream: bool = False


def build_plan(
    scorer: Scorer,
    units: Sequence[CandidateUnit],
    options: PlannerOptions,
    profile: str | None,
    started: float,
) -> PlacementPlan:
    """Builds the plan of a placement: assigns units to nodes and computes quotas and totals.

    Args:
      scorer: scores of the units.
      units: the placement.
      options: recorded in the plan.
      profile: path of the profile behind the costs.
      started: `time.perf_counter()` at the start of planning.
    """
    cluster, loads = scorer.cluster, scorer.loads
    planned = [
        build_unit_plan(scorer, unit, f"unit-{number}", node, first)
        for number, (unit, node, first) in enumerate(_assign_to_nodes(cluster, units))
    ]
    throughput, weighted, attained = 0.0, 0.0, 0.0
    by_name = {load.name: load for load in loads}
    for unit in planned:
        for model in unit.models:
            load = by_name[model.name]
            throughput += model.throughput
            weighted += model.throughput * load.expected.rate
            if _within_slo(model, load):
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
        upstream_score=placement.upstream_value() / rate if scorer.upstream is not None else None,
        seconds=time.perf_counter() - started,
    )


def _within_slo(model: PlannedModel, load: ModelLoad) -> bool:
    if model.ttft is None or model.tpot is None:
        return False
    return load.slo.met_by(model.ttft, model.tpot)


def _assign_to_nodes(
    cluster: Cluster, units: Sequence[CandidateUnit]
) -> list[tuple[CandidateUnit, int, int]]:
    """Assigns each unit a node and its first device there, the largest units first."""
    free: list[list[int]] = []
    offsets = []
    for group in cluster.groups:
        offsets.append(sum(len(nodes) for nodes in free))
        free.append([group.devices] * group.nodes)
    placed = []
    for unit in sorted(units, key=lambda u: (-u.size, u.group, u.items)):
        index, size = unit.group, unit.size
        # Sizes are powers of two in descending order, so meshes stay aligned and first fit is
        # optimal (see `placements.MeshBudget`).
        node = next(n for n, left in enumerate(free[index]) if left >= size)
        first = cluster.groups[index].devices - free[index][node]
        free[index][node] -= size
        placed.append((unit, offsets[index] + node, first))
    return placed


def build_unit_plan(
    scorer: Scorer, unit: CandidateUnit, name: str, node: int, first: int
) -> PlannedUnit:
    """Builds the plan of one feasible unit, on the devices of a node from the index `first` on."""
    group, size, items, _ = unit
    score = scorer.feasible_score(unit)
    curves = scorer.curves(group, size, items, score.tp_sizes, score.shares)
    slowdown = decode_slowdown(score.shares, scorer.execution)
    point = score.point
    if scorer.execution == "time_sliced":
        point = min_latency_point(curves, point)
    latencies = expected_latencies(curves, point, scorer.execution, slowdown)
    memory = scorer.cluster.groups[group].device.memory
    pool = pool_bytes(curves, memory)
    floors, quotas = _kv_floors_and_quotas(scorer, items, curves, pool)
    models = []
    for index, ((model, part), curve) in enumerate(zip(items, curves, strict=True)):
        load = scorer.loads[model]
        expected = load.expected
        served, batch = point.served[index], point.batches[index]
        prefill, decode = _time_fractions(curve, batch, served, scorer.execution, slowdown)
        limit = load.max_batch or LARGEST_BATCH
        capacity = int(quotas[index] * pool / curve.sequence_bytes)
        latency = latencies[index]
        models.append(
            PlannedModel(
                name=load.name,
                kind=load.kind,
                rate=expected.rate * part,
                prompt_tokens=expected.prompt_tokens,
                output_tokens=expected.output_tokens,
                tp=curve.tp,
                replicas=curve.replicas,
                decode_share=score.shares[index],
                prefill_time=prefill,
                decode_time=decode,
                kv_floor=floors[index],
                kv_quota=quotas[index],
                longest=load.longest,
                max_batch=max(1, min(limit, capacity)) * curve.replicas,
                batch=min(batch, limit) * curve.replicas,
                throughput=expected.rate * part * served,
                ttft=None if latency is None else latency.ttft,
                tpot=None if latency is None else latency.tpot,
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
        use=score.point.utilization,
        models=tuple(models),
    )


def _time_fractions(
    curve: BatchCurve, batch: float, served: float, execution: Execution, slowdown: float
) -> tuple[float, float]:
    """Fractions of the time that a model's prefills and decode steps take."""
    rate = curve.rate * served
    decode = decode_seconds(curve, batch)
    if execution == "time_sliced":
        # Candidate units of MuxServe's search have decode curves for a compute share, but
        # time-sliced steps use all of the compute.
        total = mesh_seconds(curve, batch)
        decode = min(decode, total)
        prefill = total - decode
    else:
        prefill = prefill_seconds(curve, batch)
        decode *= slowdown
    return min(1.0, rate * prefill), min(1.0, rate * decode)


def _kv_floors_and_quotas(
    scorer: Scorer, items: Sequence[Item], curves: Sequence[BatchCurve], pool: float
) -> tuple[list[float], list[float]]:
    """KV floors and initial quotas, as fractions of the pool.

    Quotas are proportional to `rate x tokens x bytes per token` (MuxServe, section 3.3), and at
    least the floor. A computed floor is an equal part of a quarter of the pool, or the size of one
    request if that is smaller.
    """
    floors = []
    for (model, _), curve in zip(items, curves, strict=True):
        given = scorer.loads[model].kv_floor
        computed = min(curve.sequence_bytes / pool, _FLOORS / len(items))
        floors.append(computed if given is None else given)
    total = sum(floors)
    if total > 1.0:
        floors = [floor / total for floor in floors]
    demands = [curve.rate * curve.sequence_bytes for curve in curves]
    if not any(demands):
        demands = [1.0] * len(items)
    at_floor: set[int] = set()
    while True:
        rest = 1.0 - sum(floors[i] for i in at_floor)
        demand = sum(d for i, d in enumerate(demands) if i not in at_floor)
        quotas = [
            floors[i] if i in at_floor else rest * d / demand if demand else 0.0
            for i, d in enumerate(demands)
        ]
        below = {i for i in range(len(items)) if i not in at_floor and quotas[i] < floors[i]}
        if not below:
            return floors, [min(1.0, quota) for quota in quotas]
        at_floor |= below
