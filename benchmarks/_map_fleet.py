"""What the policy map is about: models, hardware, requests, and placements to choose from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from muxjax.errors import PlanError
from muxjax.placement.costs.cluster import Cluster
from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.costs.model_shape import LLAMA_SHAPES
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.batch_curve import POOL_SHARE
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.plan import Execution, PlacementPlan, PlannedModel, PlannedUnit
from muxjax.placement.planner.planner import PlannerOptions, plan_placement
from muxjax.placement.planner.spatial import spatial_units
from muxjax.placement.simulator.simulated_units import PolicyName
from muxjax.placement.workload.arrivals import power_law_rates
from muxjax.placement.workload.lengths import LogNormal
from muxjax.placement.workload.synthetic import SyntheticWorkload, Traffic
from muxjax.placement.workload.trace import TraceRequest
from muxjax.scheduling.expected_load import ExpectedLoad
from muxjax.scheduling.specs import LatencySlo

Hardware = Literal["a100", "h200", "v6e"]
CLUSTERS: Mapping[Hardware, str] = {
    "a100": "4x8:a100-80gb",
    "h200": "4x8:h200",
    "v6e": "4x8:v6e",
}
KINDS = ("llama-7b",) * 12 + ("llama-13b",) * 4 + ("llama-30b",) * 2 + ("llama-65b",)
"""MuxServe's mix, the most popular model first (benchmark/end_to_end/bench_end_to_end_muxserve.py,
where the rates are dealt in this order)."""
MAX_RATE = 40.0
PROMPT_TOKENS, OUTPUT_TOKENS = 161.0, 338.0
LONGEST = 2048
PLANNED_SCALES = (2.0, 6.0)
"""Of the targets that placements are planned for, beside those for throughput."""
LEAST_TOKENS = 2 * LONGEST
"""The pool of a copy must hold so many."""

Units = Sequence[PlannedUnit]
Parts = Sequence[Sequence[Units]]
"""A placement: parts whose models share nothing with other parts', and for each of them the forms
that it may have."""


@dataclass(frozen=True)
class CellJob:
    """What one process works on.

    Attributes:
      alpha: of the power law.
      load: part of the highest rate, 40 requests/s, that the most popular model gets.
      scales: latency allowed, in multiples of the request's time alone.
      execution, hardware: which map.
      seconds: of arrivals.
      seed: of the workload.
      policies: to compare.
      profile: step times of the A100.
      ahead: choose placements on other requests than those that count.
    """

    alpha: float
    load: float
    scales: tuple[float, ...]
    execution: Execution
    hardware: Hardware
    seconds: float
    seed: int
    policies: tuple[PolicyName, ...]
    profile: Path
    ahead: bool = False


def default_profile() -> Path:
    """MuxServe's profile among the shared data."""
    shared = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MUXJAX_SHARED_DATA") or shared)
    return folder / "muxserve_a100_profile.json"


def fleet(alpha: float, load: float) -> list[ModelLoad]:
    """The 19 models with their rates."""
    rates = power_law_rates(len(KINDS), alpha, highest=MAX_RATE * load)
    return [
        ModelLoad(
            f"llm-{index}",
            kind,
            ExpectedLoad(rate, PROMPT_TOKENS, OUTPUT_TOKENS),
            longest=LONGEST,
        )
        for index, (kind, rate) in enumerate(zip(KINDS, rates, strict=True))
    ]


def cost_model(job: CellJob, cluster: Cluster) -> PlanningCosts:
    """How long steps take: MuxServe's profile for its A100s, else a roofline."""
    if job.hardware == "a100":
        return ProfileTable(job.profile)
    shapes = {kind: LLAMA_SHAPES[kind] for kind in set(KINDS)}
    return Roofline(shapes, cluster.groups[0].device)


def workload(loads: Sequence[ModelLoad], seconds: float, seed: int) -> list[TraceRequest]:
    """Poisson arrivals, log-normal lengths."""
    part = PROMPT_TOKENS / (PROMPT_TOKENS + OUTPUT_TOKENS)
    lengths = LogNormal(
        PROMPT_TOKENS,
        OUTPUT_TOKENS,
        max_prompt=int(part * LONGEST),
        max_output=int((1 - part) * LONGEST),
    )
    traffic = [Traffic(load.name, load.expected.rate, lengths) for load in loads]
    return list(SyntheticWorkload(traffic, seconds=seconds, seed=seed))


def placements(
    job: CellJob, loads: Sequence[ModelLoad], cluster: Cluster, costs: PlanningCosts
) -> tuple[dict[str, Parts], PlacementPlan]:
    """Placements by name, any of which a policy may take; `spatial` only the one of that name.

    Where a model is alone on a mesh it has all of it, as one or as several copies.

    Returns:
      The placements, and one plan with all models.
    """
    plan = plan_placement(loads, cluster, [costs], PlannerOptions(job.execution))
    found = {"throughput": plan.units}
    for scale in PLANNED_SCALES:
        slos = [LatencySlo(tpot=scale * _alone(load, costs, cluster)) for load in loads]
        targeted = [replace(load, slo=slo) for load, slo in zip(loads, slos, strict=True)]
        objective = PlannerOptions(job.execution, objective="slo")
        found[f"slo {scale:g}"] = plan_placement(targeted, cluster, [costs], objective).units
    if job.hardware == "a100" and job.execution == "concurrent":
        try:
            muxserve = PlannerOptions(job.execution, as_upstream=True)
            unaware = [replace(load, longest=None) for load in loads]
            found["muxserve"] = plan_placement(unaware, cluster, [costs], muxserve).units
        except PlanError:
            pass  # its search finds none for some loads
    found["spatial"] = spatial_units(plan, costs, plan.shapes)
    return {name: [_forms(part, costs) for part in _parts(u)] for name, u in found.items()}, plan


def _alone(load: ModelLoad, costs: PlanningCosts, cluster: Cluster) -> float:
    """Seconds a token of a request that is alone on the fewest devices."""
    memory = cluster.groups[0].device.memory
    tp = min(
        tp
        for tp in costs.tp_sizes(load.kind)
        if costs.weight_bytes(load.kind, tp=tp) < POOL_SHARE * memory
    )
    return costs.decode_seconds(load.kind, 1, load.expected.decode_context, tp=tp)


def _parts(units: Units) -> Iterator[Units]:
    """Units that share no model with others, alone; others together, as the router joins them."""
    left = [unit for unit in units if unit.models]
    while left:
        part = [left.pop(0)]
        names = {model.name for model in part[0].models}
        grown = True
        while grown:
            grown = False
            for unit in list(left):
                if names & {model.name for model in unit.models}:
                    names |= {model.name for model in unit.models}
                    part.append(unit)
                    left.remove(unit)
                    grown = True
        yield part


def _forms(part: Units, costs: PlanningCosts) -> list[Units]:
    """What a part may be made into: a model that is alone, into fewer or more copies."""
    if len(part) > 1 or len(part[0].models) > 1:
        return [part]
    (unit,) = part
    (model,) = unit.models
    memory = unit.weight_bytes + unit.kv_bytes + unit.reserved_bytes
    found: list[Units] = []
    for tp in costs.tp_sizes(model.kind):
        weights = costs.weight_bytes(model.kind, tp=tp)
        pool = POOL_SHARE * (memory - weights)
        token = costs.kv_bytes_per_token(model.kind, tp=tp)
        if unit.size % tp or pool < LEAST_TOKENS * token:
            continue
        replicas = unit.size // tp
        alone = PlannedModel(
            name=model.name,
            kind=model.kind,
            rate=model.rate,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=OUTPUT_TOKENS,
            tp=tp,
            replicas=replicas,
            max_batch=replicas * int(pool / ((PROMPT_TOKENS + OUTPUT_TOKENS) * token)),
        )
        sizes = {"weight_bytes": weights, "reserved_bytes": memory - weights - pool}
        found.append([unit.model_copy(update={"models": (alone,), "kv_bytes": pool, **sizes})])
    return found or [part]
