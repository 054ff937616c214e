"""The scenario of the policy map: models, hardware, requests, and candidate placements."""

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
"""MuxServe's mix, most popular model first (its benchmark/end_to_end/bench_end_to_end_muxserve.py
assigns rates in this order)."""
MAX_RATE = 40.0
"""Requests per second of the most popular model at load 1."""
PROMPT_TOKENS, OUTPUT_TOKENS = 161.0, 338.0
LONGEST = 2048
PLANNED_SCALES = (2.0, 6.0)
"""SLO scales that placements are planned for, in addition to throughput."""
MIN_TOKENS = 2 * LONGEST
"""Minimum number of tokens that the pool of a replica must hold."""

Units = Sequence[PlannedUnit]
Parts = Sequence[Sequence[Units]]
"""A placement: parts that share no model, each with its alternative forms."""


@dataclass(frozen=True)
class CellJob:
    """The work of one process: the cells of one alpha and load.

    Attributes:
      alpha: exponent of the power law of popularity.
      load: rate of the most popular model, as a fraction of `MAX_RATE`.
      scales: allowed latencies, as multiples of the isolated latency.
      execution, hardware: the map that the cells belong to.
      seconds: length of the workload.
      seed: seed of the workload.
      policies: policies to compare.
      profile: step times of the A100.
      ahead: choose placements on training requests instead of the scored ones.
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
    """MuxServe's profile in `MUXJAX_SHARED_DATA`, by default a folder beside the repository."""
    folder = os.environ.get("MUXJAX_SHARED_DATA") or Path("..", "shared", "data")
    return Path(folder, "muxserve_a100_profile.json")


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
    """Step times: MuxServe's profile for A100s, a roofline model for other hardware."""
    if job.hardware == "a100":
        return ProfileTable(job.profile)
    shapes = {kind: LLAMA_SHAPES[kind] for kind in set(KINDS)}
    return Roofline(shapes, cluster.groups[0].device)


def workload(loads: Sequence[ModelLoad], seconds: float, seed: int) -> list[TraceRequest]:
    """A workload with Poisson arrivals and log-normal lengths."""
    prompt_share = PROMPT_TOKENS / (PROMPT_TOKENS + OUTPUT_TOKENS)
    lengths = LogNormal(
        PROMPT_TOKENS,
        OUTPUT_TOKENS,
        max_prompt=int(prompt_share * LONGEST),
        max_output=int((1 - prompt_share) * LONGEST),
    )
    traffic = [Traffic(load.name, load.expected.rate, lengths) for load in loads]
    return list(SyntheticWorkload(traffic, seconds=seconds, seed=seed))


def placements(
    job: CellJob, loads: Sequence[ModelLoad], cluster: Cluster, costs: PlanningCosts
) -> tuple[dict[str, Parts], PlacementPlan]:
    """Candidate placements by name. The policy `spatial` may use only the placement `spatial`.

    The only model of a mesh uses all of its devices, with one or more replicas.

    Returns:
      The placements, and one plan that contains all models.
    """
    plan = plan_placement(loads, cluster, [costs], PlannerOptions(job.execution))
    candidates = {"throughput": plan.units}
    for scale in PLANNED_SCALES:
        slos = [LatencySlo(tpot=scale * _isolated_tpot(load, costs, cluster)) for load in loads]
        targeted = [replace(load, slo=slo) for load, slo in zip(loads, slos, strict=True)]
        objective = PlannerOptions(job.execution, objective="slo")
        candidates[f"slo {scale:g}"] = plan_placement(targeted, cluster, [costs], objective).units
    if job.hardware == "a100" and job.execution == "concurrent":
        try:
            muxserve = PlannerOptions(job.execution, as_upstream=True)
            unaware = [replace(load, longest=None) for load in loads]
            candidates["muxserve"] = plan_placement(unaware, cluster, [costs], muxserve).units
        except PlanError:
            pass  # MuxServe's search fails for some loads.
    candidates["spatial"] = spatial_units(plan, costs, plan.shapes)
    forms: dict[str, Parts] = {
        name: [_forms(part, costs) for part in _parts(units)] for name, units in candidates.items()
    }
    return forms, plan


def _isolated_tpot(load: ModelLoad, costs: PlanningCosts, cluster: Cluster) -> float:
    """Isolated seconds per token on the fewest devices that the weights fit on."""
    memory = cluster.groups[0].device.memory
    tp = min(
        tp
        for tp in costs.tp_sizes(load.kind)
        if costs.weight_bytes(load.kind, tp=tp) < POOL_SHARE * memory
    )
    return costs.decode_seconds(load.kind, 1, load.expected.decode_context, tp=tp)


def _parts(units: Units) -> Iterator[Units]:
    """Groups of units: units that share a model are in one group, as the router joins them."""
    remaining = [unit for unit in units if unit.models]
    while remaining:
        part = [remaining.pop(0)]
        names = {model.name for model in part[0].models}
        grown = True
        while grown:
            grown = False
            for unit in list(remaining):
                if names & {model.name for model in unit.models}:
                    names |= {model.name for model in unit.models}
                    part.append(unit)
                    remaining.remove(unit)
                    grown = True
        yield part


def _forms(part: Units, costs: PlanningCosts) -> list[Units]:
    """The alternative forms of a part: one for each number of replicas of a single model."""
    if len(part) > 1 or len(part[0].models) > 1:
        return [part]
    (unit,) = part
    (model,) = unit.models
    memory = unit.weight_bytes + unit.kv_bytes + unit.reserved_bytes
    forms: list[Units] = []
    for tp in costs.tp_sizes(model.kind):
        weights = costs.weight_bytes(model.kind, tp=tp)
        pool = POOL_SHARE * (memory - weights)
        token = costs.kv_bytes_per_token(model.kind, tp=tp)
        if unit.size % tp or pool < MIN_TOKENS * token:
            continue
        replicas = unit.size // tp
        replicated = PlannedModel(
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
        forms.append([unit.model_copy(update={"models": (replicated,), "kv_bytes": pool, **sizes})])
    return forms or [part]
