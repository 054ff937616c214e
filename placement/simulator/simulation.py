"""Simulating a plan: one run, and runs of several policies over several rates.

What comes out is plain data, the same for the same plan, workload and seed on every machine; how
long it took is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from muxjax._version import __version__
from muxjax.errors import PlanError, WorkloadError
from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.costs.model_shape import ModelShape
from muxjax.placement.planner.plan import PlacementPlan, PlannedUnit
from muxjax.placement.planner.plan_hash import config_hash
from muxjax.placement.planner.spatial import spatial_units
from muxjax.placement.simulator.metrics import AttainmentTarget, SimulationMetrics
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_units import System, build_simulated_unit
from muxjax.placement.simulator.simulator import Simulation
from muxjax.placement.workload.synthetic import at_rate
from muxjax.placement.workload.trace import TraceRequest, Workload
from muxjax.scheduling.timeline import Timeline

WANTED_ATTAINMENT = 0.99
REFINEMENTS = 4
"""Runs that narrow down the highest rate at 99 % between two rates of a sweep."""

Progress = Callable[[float], None]
"""Called now and then with the simulated seconds of the latest arrival."""
OnRecord = Callable[[RequestRecord, bool], None]
"""Called with each record and whether the request met its target."""

_PROGRESS_EVERY = 64


@dataclass(frozen=True)
class Setup:
    """What stays the same in all runs.

    Attributes:
      plan: units and cluster.
      costs: how long steps take, for each kind of device.
      targets: of each model.
      max_waiting: requests of a model that may wait on a unit; more are rejected. None: any number.
      seed: of the workload, for the record.
      describes: what the workload is, for the record and the hash.
    """

    plan: PlacementPlan
    costs: Mapping[str, PlanningCosts]
    targets: Mapping[str, AttainmentTarget]
    max_waiting: int | None = None
    seed: int = 0
    describes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> Mapping[str, ModelShape]:
        """Of each kind of model."""
        return self.plan.shapes

    def config_hash(self, system: System) -> str:
        """Of all that a run depends on, but for its rate."""
        config = {
            "plan": self.plan.to_json() | {"seconds": None},
            "targets": {name: asdict(target) for name, target in self.targets.items()},
            "max_waiting": self.max_waiting,
            "seed": self.seed,
            "workload": dict(self.describes),
            "system": asdict(system),
            "version": __version__,
        }
        return config_hash(config)


def run(
    setup: Setup,
    system: System,
    workload: Workload,
    *,
    on_record: OnRecord | None = None,
    progress: Progress | None = None,
    timeline: Timeline | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Simulates one workload under one system.

    Args:
      setup: what stays the same.
      system: how units are run.
      workload: the requests.
      on_record: told what became of each.
      progress: told how far it has come.
      timeline: records every step, units under the title and their names.
      title: of the run, for the timeline.

    Returns:
      The metrics (see `metrics.py`), each unit's steps and how busy its mesh was, and `seed`,
      `config_hash` and `version`.

    Raises:
      PlanError: the plan cannot be run, a pool too small say.
      WorkloadError: the workload asks for what the plan does not have, or is out of order.
    """
    units = [
        build_simulated_unit(
            unit,
            system,
            setup.costs[unit.device],
            setup.shapes,
            bandwidth=_bandwidth(setup.plan, unit),
            targets=setup.targets,
        )
        for unit in _units(setup, system)
        if unit.models
    ]
    if not units:
        raise PlanError("the plan has no unit with a model on it: nothing to simulate")
    if timeline is not None:
        for unit in units:
            unit.observer = timeline.observer(" ".join(part for part in (title, unit.name) if part))
    metrics = SimulationMetrics(setup.targets, next(iter(setup.costs.values())))

    def take(record: RequestRecord) -> None:
        met = metrics.add(record)
        if on_record is not None:
            on_record(record, met)

    simulation = Simulation(units, max_waiting=setup.max_waiting)
    seconds = simulation.run(_watched(workload, progress), take)
    return {
        "policy": system.policy,
        "execution": system.runs,
        "seed": setup.seed,
        "config_hash": setup.config_hash(system),
        "version": __version__,
        **metrics.summary(),
        "units": [
            {
                "name": unit.name,
                "models": list(unit.unit.models),
                "prefill_steps": unit.steps["prefill"],
                "decode_steps": unit.steps["decode"],
                "busy": min(1.0, unit.executor.busy_seconds / seconds) if seconds else 0.0,
            }
            for unit in units
        ],
    }


def sweep(
    setup: Setup,
    systems: Sequence[System],
    workload: Workload,
    scales: Sequence[float],
    *,
    one: Callable[[System, float, Workload], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Runs each system at each rate, and finds the highest rate at which 99 % meet their targets.

    Args:
      setup: what stays the same.
      systems: policies to compare.
      workload: at scale 1; see `workload.at_rate` for others.
      scales: of the rate, rising.
      one: makes one run: `run` with what the caller wants around it.

    Returns:
      For each system its `runs`, in order of rate, and `max_rate_at_99`: the highest simulated rate
      (requests/s of all models) at which the attainment is 99 %, narrowed down by
      `REFINEMENTS` bisections where the sweep passes it; None if no rate of the sweep reaches it.
    """
    found = []
    for system in systems:
        runs: list[dict[str, Any]] = []

        def at(scale: float, system: System = system, runs: list[dict[str, Any]] = runs) -> bool:
            result = one(system, scale, at_rate(workload, scale))
            runs.append({"rate_scale": scale, **result})
            return float(result["slo_attainment"]) >= WANTED_ATTAINMENT

        met = [at(scale) for scale in scales]
        misses = [scale for scale, ok in zip(scales, met, strict=True) if not ok]
        passes = [
            scale
            for scale, ok in zip(scales, met, strict=True)
            if ok and (not misses or scale < misses[0])
        ]
        best = max(passes, default=None)
        if best is not None and misses:
            low, high = best, misses[0]
            for _ in range(REFINEMENTS):
                middle = math.sqrt(low * high)
                if at(middle):
                    low = middle
                else:
                    high = middle
            best = low
        runs.sort(key=lambda result: result["rate_scale"])
        rates = {result["rate_scale"]: result["offered_rate"] for result in runs}
        found.append(
            {
                "policy": system.policy,
                "execution": system.runs,
                "seed": setup.seed,
                "config_hash": setup.config_hash(system),
                "version": __version__,
                "max_rate_at_99": None if best is None else rates[best],
                "runs": runs,
            }
        )
    return found


def checked_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """The scales in order, each once.

    Raises:
      WorkloadError: none, or one that is not above 0.
    """
    if not scales:
        raise WorkloadError("there must be one rate scale at least")
    for scale in scales:
        if not (math.isfinite(scale) and scale > 0):
            raise WorkloadError(f"a rate scale must be above 0, not {scale}")
    return tuple(sorted(set(scales)))


def _units(setup: Setup, system: System) -> Sequence[PlannedUnit]:
    if system.policy == "spatial":
        return spatial_units(setup.plan, next(iter(setup.costs.values())), setup.shapes)
    return setup.plan.units


def _bandwidth(plan: PlacementPlan, unit: PlannedUnit) -> float | None:
    for device in plan.devices:
        if device.name == unit.device:
            return device.bandwidth
    return None


def _watched(workload: Workload, progress: Progress | None) -> Iterator[TraceRequest]:
    """A workload that tells how far it has come."""
    for index, request in enumerate(workload):
        if progress is not None and index % _PROGRESS_EVERY == 0:
            progress(request.arrival)
        yield request
