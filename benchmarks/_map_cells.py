"""One (alpha, load) of the policy map: every policy on every placement, at every SLO scale."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from muxjax.errors import PlanError
from muxjax.placement.arrivals import power_law_rates
from muxjax.placement.cluster import Cluster, parse_cluster
from muxjax.placement.cost_model import PlanningCosts
from muxjax.placement.lengths import LogNormal
from muxjax.placement.load import ModelLoad, Slo
from muxjax.placement.metrics import Target
from muxjax.placement.model_shape import LLAMA_SHAPES
from muxjax.placement.plan import Execution, PlannedUnit
from muxjax.placement.plan_costs import plan_targets
from muxjax.placement.planner import Options, make_plan
from muxjax.placement.profile_table import ProfileTable
from muxjax.placement.records import RequestRecord
from muxjax.placement.roofline import Roofline
from muxjax.placement.simulated_units import PolicyName, System, make_unit
from muxjax.placement.simulator import Simulation
from muxjax.placement.spatial import spatial_units
from muxjax.placement.trace import TraceRequest
from muxjax.placement.workload import Synthetic, Traffic

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
POLICIES: tuple[PolicyName, ...] = (
    "slo",
    "adbs",
    "fcfs",
    "round_robin",
    "static",
    "temporal",
    "spatial",
    "mutex",
)
PLANNED_SCALE = 4.0
"""Of the targets that one of the placements is planned for."""
ALIKE: Mapping[Execution, Mapping[str, str]] = {
    "time_sliced": {
        "spatial": "adbs",
        **dict.fromkeys(("round_robin", "static", "temporal", "mutex"), "fcfs"),
    },
    "concurrent": {
        **dict.fromkeys(("spatial", "round_robin", "fcfs"), "adbs"),
        "mutex": "temporal",
    },
}
"""Policies that make the same steps for a model that is alone on its mesh: one run is enough."""

Units = Sequence[PlannedUnit]


@dataclass(frozen=True)
class Job:
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


@dataclass
class _Model:
    offered: int = 0
    finished: int = 0
    last_end: float = 0.0
    met: dict[float, int] = field(default_factory=dict)


Outcome = Mapping[str, _Model]


def cells(job: Job) -> list[dict[str, Any]]:
    """The cells of the map that the job covers, one for each scale."""
    runner = _Runner(job)
    found = []
    for scale in job.scales:
        cell: dict[str, Any] = {
            "alpha": job.alpha,
            "load": job.load,
            "slo_scale": scale,
            "execution": job.execution,
            "hardware": job.hardware,
            "seed": job.seed,
            "seconds": job.seconds,
            "slo_attainment": {},
            "throughput": {},
            "placement": {},
        }
        for policy in job.policies:
            name, outcome = runner.best(policy, scale)
            cell["slo_attainment"][policy] = attainment(outcome, scale)
            cell["throughput"][policy] = throughput(outcome)
            cell["placement"][policy] = name
        found.append(cell)
    return found


def attainment(outcome: Outcome, scale: float) -> float:
    """Part of the requests that met the target."""
    offered = sum(model.offered for model in outcome.values())
    return sum(model.met[scale] for model in outcome.values()) / max(1, offered)


def throughput(outcome: Outcome) -> dict[str, float]:
    """Requests a second, as `placement/metrics.py` has them."""
    rates = {n: m.finished / m.last_end if m.last_end else 0.0 for n, m in outcome.items()}
    offered = sum(model.offered for model in outcome.values())
    weighted = sum(rates[name] * model.offered for name, model in outcome.items())
    return {"total": sum(rates.values()), "rate_weighted": weighted / max(1, offered)}


def fleet(alpha: float, load: float) -> list[ModelLoad]:
    """The 19 models with their rates."""
    rates = power_law_rates(len(KINDS), alpha, highest=MAX_RATE * load)
    return [
        ModelLoad(f"llm-{index}", kind, rate, PROMPT_TOKENS, OUTPUT_TOKENS)
        for index, (kind, rate) in enumerate(zip(KINDS, rates, strict=True))
    ]


def default_profile() -> Path:
    """MuxServe's profile among the shared data."""
    shared = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MUXJAX_SHARED_DATA") or shared)
    return folder / "muxserve_a100_profile.json"


class _Runner:
    """Runs units, each once for everything that it depends on."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._cluster = parse_cluster(CLUSTERS[job.hardware])
        self._costs = _costs(job, self._cluster)
        self._shapes = {kind: self._costs.shape(kind) for kind in set(KINDS)}
        self._loads = fleet(job.alpha, job.load)
        self._placements, plan = _placements(job, self._loads, self._cluster, self._costs)
        costs = {group.device.name: self._costs for group in self._cluster.groups}
        self._targets = {
            scale: plan_targets(plan, costs, Target(scale=scale)) for scale in job.scales
        }
        self._requests = _workload(job, self._loads)
        self._known: dict[object, dict[str, _Model]] = {}

    def best(self, policy: PolicyName, scale: float) -> tuple[str, Outcome]:
        """The placement on which the policy attains most, and if two do, serves most."""
        found: list[tuple[float, float, str, Outcome]] = []
        for name, units in self._placements.items():
            if policy == "spatial" and not name.startswith("spatial"):
                continue
            outcome = self._run(units, policy, scale)
            share = round(attainment(outcome, scale), 3)
            found.append((share, throughput(outcome)["total"], name, outcome))
        _, _, name, outcome = max(found, key=lambda one: one[:3])
        return name, outcome

    def _run(self, units: Units, policy: PolicyName, scale: float) -> Outcome:
        outcome: dict[str, _Model] = {}
        for part in _connected(units):
            outcome.update(self._run_part(part, policy, scale))
        return outcome

    def _run_part(self, units: Units, policy: PolicyName, scale: float) -> dict[str, _Model]:
        execution = self._job.execution
        if len(units) == 1 and len(units[0].models) == 1:
            policy = ALIKE[execution].get(policy, policy)  # type: ignore[assignment]  # a policy
        key = (
            policy,
            scale if policy == "slo" else None,
            tuple((unit.size, unit.kv_bytes, unit.models) for unit in units),
        )
        if key not in self._known:
            self._known[key] = self._simulate(units, policy, scale)
        return self._known[key]

    def _simulate(self, units: Units, policy: PolicyName, scale: float) -> dict[str, _Model]:
        system = System(policy, self._job.execution)
        device = self._cluster.groups[0].device
        names = {model.name for unit in units for model in unit.models}
        found = {name: _Model(met=dict.fromkeys(self._job.scales, 0)) for name in names}
        targets = self._targets

        def take(record: RequestRecord) -> None:
            model = found[record.model]
            model.offered += 1
            if record.latency is None or record.end is None:
                return
            model.finished += 1
            model.last_end = max(model.last_end, record.end)
            alone = targets[scale][record.model].alone(record, self._costs)
            for limit in model.met:
                model.met[limit] += record.latency <= limit * alone

        made = [
            make_unit(
                unit,
                system,
                self._costs,
                self._shapes,
                bandwidth=device.bandwidth,
                targets=targets[scale],
            )
            for unit in units
        ]
        Simulation(made).run([r for r in self._requests if r.model in names], take)
        return found


def _costs(job: Job, cluster: Cluster) -> PlanningCosts:
    if job.hardware == "a100":
        return ProfileTable(job.profile)
    shapes = {kind: LLAMA_SHAPES[kind] for kind in set(KINDS)}
    return Roofline(shapes, cluster.groups[0].device)


def _workload(job: Job, loads: Sequence[ModelLoad]) -> list[TraceRequest]:
    part = PROMPT_TOKENS / (PROMPT_TOKENS + OUTPUT_TOKENS)
    lengths = LogNormal(
        PROMPT_TOKENS,
        OUTPUT_TOKENS,
        max_prompt=int(part * LONGEST),
        max_output=int((1 - part) * LONGEST),
    )
    traffic = [Traffic(load.name, load.rate, lengths) for load in loads]
    return list(Synthetic(traffic, seconds=job.seconds, seed=job.seed))


def _placements(
    job: Job, loads: Sequence[ModelLoad], cluster: Cluster, costs: PlanningCosts
) -> tuple[dict[str, Units], Any]:
    """Placements by name, any of which a policy may take; `spatial` only those of that name."""
    found: dict[str, Units] = {}

    def add(name: str, units: Units) -> None:
        units = [unit for unit in units if unit.models]
        found[name] = units

    plan = make_plan(loads, cluster, [costs], Options(job.execution))
    add("throughput", plan.units)
    targeted = [
        replace(load, slo=Slo(tpot=PLANNED_SCALE * _alone(load, costs, cluster))) for load in loads
    ]
    objective = Options(job.execution, objective="slo")
    add("slo", make_plan(targeted, cluster, [costs], objective).units)
    if job.hardware == "a100" and job.execution == "concurrent":
        try:
            muxserve = Options(job.execution, as_upstream=True)
            add("muxserve", make_plan(loads, cluster, [costs], muxserve).units)
        except PlanError:
            pass  # its search finds none for some loads
    spatial = spatial_units(plan, costs, plan.shapes)
    add("spatial", spatial)
    add("spatial copies", [_with_copies(unit, costs) for unit in spatial])
    return found, plan


def _alone(load: ModelLoad, costs: PlanningCosts, cluster: Cluster) -> float:
    """Seconds a token of a request that is alone on the fewest devices."""
    memory = cluster.groups[0].device.memory
    tp = min(
        tp
        for tp in costs.tp_degrees(load.kind)
        if costs.weight_bytes(load.kind, tp=tp) < 0.9 * memory
    )
    return costs.decode_seconds(load.kind, 1, load.context, tp=tp)


def _with_copies(unit: PlannedUnit, costs: PlanningCosts) -> PlannedUnit:
    """The unit with copies of its model side by side, where half of a device holds one."""
    (model,) = unit.models
    room = unit.weight_bytes + unit.kv_bytes
    for tp in costs.tp_degrees(model.kind):
        weights = costs.weight_bytes(model.kind, tp=tp)
        if unit.size % tp or weights > room / 2:
            continue
        copies = unit.size // tp
        pool = room - weights
        tokens = model.prompt_tokens + model.output_tokens
        batch = int(pool / (tokens * costs.kv_bytes_per_token(model.kind, tp=tp)))
        alone = model.model_copy(update={"tp": tp, "copies": copies, "max_batch": batch * copies})
        return unit.model_copy(
            update={"models": (alone,), "weight_bytes": weights, "kv_bytes": pool}
        )
    return unit


def _connected(units: Units) -> Iterator[Units]:
    """Units that share no model with others, alone; others together, as the router joins them."""
    left = list(units)
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
