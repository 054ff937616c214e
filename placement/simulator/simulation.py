"""Simulations of a plan: single runs, and sweeps of several policies over several rates.

Results are plain data without wall-clock times. A plan, workload and seed determine them, on every
machine.
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
from muxjax.placement.simulator.metrics import AttainmentCriterion, SimulationMetrics
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_units import SystemConfig, build_simulated_unit
from muxjax.placement.simulator.simulator import Simulation
from muxjax.placement.workload.synthetic import scale_rate
from muxjax.placement.workload.trace import TraceRequest, Workload
from muxjax.scheduling.timeline import Timeline

TARGET_ATTAINMENT = 0.99
REFINEMENTS = 4
"""Bisections between two rates of a sweep to find the highest rate with the target attainment."""

Progress = Callable[[float], None]
"""Called regularly with the simulated seconds of the latest arrival."""
OnRecord = Callable[[RequestRecord, bool], None]
"""Called with each record and whether the request met its criterion."""

_PROGRESS_INTERVAL = 64
"""Requests between two calls of `Progress`."""


@dataclass(frozen=True)
class SimulationSetup:
    """The common inputs of all runs of a simulation.

    Attributes:
      plan: units and cluster.
      costs: cost model for each kind of device.
      criteria: attainment criterion of each model.
      max_waiting: maximum number of waiting requests of a model on a unit; further requests are
        rejected. None: no limit.
      seed: of the workload, recorded in the results.
      workload: description of the workload, recorded in the results and hashed.
    """

    plan: PlacementPlan
    costs: Mapping[str, PlanningCosts]
    criteria: Mapping[str, AttainmentCriterion]
    max_waiting: int | None = None
    seed: int = 0
    workload: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> Mapping[str, ModelShape]:
        """Shape of each kind of model."""
        return self.plan.shapes

    def config_hash(self, system: SystemConfig) -> str:
        """A hash of all inputs of a run except its rate."""
        config = {
            "plan": self.plan.to_json() | {"seconds": None},
            "targets": {name: c.to_json() for name, c in self.criteria.items()},
            "max_waiting": self.max_waiting,
            "seed": self.seed,
            "workload": dict(self.workload),
            "system": asdict(system),
            "version": __version__,
        }
        return config_hash(config)


def run_simulation(
    setup: SimulationSetup,
    system: SystemConfig,
    workload: Workload,
    *,
    on_record: OnRecord | None = None,
    progress: Progress | None = None,
    timeline: Timeline | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Simulates one workload with one system configuration.

    Args:
      setup: plan, costs and criteria.
      system: policy and execution.
      workload: the requests.
      on_record: called with the outcome of each request.
      progress: called with the simulated time.
      timeline: records every step; the title and the unit name its rows.
      title: title of the run in the timeline.

    Returns:
      The metrics (see `metrics.py`), the steps and utilization of each unit, and `seed`,
      `config_hash` and `version`.

    Raises:
      PlanError: the plan cannot be simulated, for example because a pool is too small.
      WorkloadError: the workload is out of order, or has a model that is not in the plan.
    """
    units = [
        build_simulated_unit(
            unit,
            system,
            setup.costs[unit.device],
            setup.shapes,
            bandwidth=_bandwidth(setup.plan, unit),
            criteria=setup.criteria,
        )
        for unit in _planned_units(setup, system)
        if unit.models
    ]
    if not units:
        raise PlanError("nothing to simulate: the plan has no unit with a model")
    if timeline is not None:
        for unit in units:
            unit.observer = timeline.observer(" ".join(part for part in (title, unit.name) if part))
    metrics = SimulationMetrics(setup.criteria, next(iter(setup.costs.values())))

    def record_outcome(record: RequestRecord) -> None:
        met = metrics.add(record)
        if on_record is not None:
            on_record(record, met)

    simulation = Simulation(units, max_waiting=setup.max_waiting)
    seconds = simulation.run(_report_progress(workload, progress), record_outcome)
    return {
        "policy": system.policy,
        "execution": system.effective_execution,
        "seed": setup.seed,
        "config_hash": setup.config_hash(system),
        "version": __version__,
        **metrics.summary(),
        "units": [
            {
                "name": unit.name,
                "models": list(unit.scheduler.models),
                "prefill_steps": unit.steps["prefill"],
                "decode_steps": unit.steps["decode"],
                "busy": min(1.0, unit.executor.busy_seconds / seconds) if seconds else 0.0,
            }
            for unit in units
        ],
    }


def sweep_rates(
    setup: SimulationSetup,
    systems: Sequence[SystemConfig],
    workload: Workload,
    scales: Sequence[float],
    *,
    run: Callable[[SystemConfig, float, Workload], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Runs each system at each rate, and finds the highest rate with 99 % SLO attainment.

    Args:
      setup: plan, costs and criteria.
      systems: configurations to compare.
      workload: the workload at scale 1; `synthetic.scale_rate` scales it.
      scales: multiples of the rate, ascending.
      run: runs one simulation of a system at a scale, usually with `run_simulation`.

    Returns:
      For each system its `runs` in order of rate, and `max_rate_at_99`: the highest simulated rate
      (requests/s of all models) with at least 99 % attainment, or None. If a higher rate of the
      sweep misses the target, `REFINEMENTS` bisections refine `max_rate_at_99`.
    """
    results = []
    for system in systems:
        runs: list[dict[str, Any]] = []

        def reaches_target(
            scale: float, system: SystemConfig = system, runs: list[dict[str, Any]] = runs
        ) -> bool:
            result = run(system, scale, scale_rate(workload, scale))
            runs.append({"rate_scale": scale, **result})
            return float(result["slo_attainment"]) >= TARGET_ATTAINMENT

        met = [reaches_target(scale) for scale in scales]
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
                if reaches_target(middle):
                    low = middle
                else:
                    high = middle
            best = low
        runs.sort(key=lambda result: result["rate_scale"])
        rates = {result["rate_scale"]: result["offered_rate"] for result in runs}
        results.append(
            {
                "policy": system.policy,
                "execution": system.effective_execution,
                "seed": setup.seed,
                "config_hash": setup.config_hash(system),
                "version": __version__,
                "max_rate_at_99": None if best is None else rates[best],
                "runs": runs,
            }
        )
    return results


def validate_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """Returns the distinct scales in ascending order.

    Raises:
      WorkloadError: no scale, or a scale that is not above 0.
    """
    if not scales:
        raise WorkloadError("at least one rate scale is needed")
    for scale in scales:
        if not (math.isfinite(scale) and scale > 0):
            raise WorkloadError(f"a rate scale must be above 0, not {scale}")
    return tuple(sorted(set(scales)))


def _planned_units(setup: SimulationSetup, system: SystemConfig) -> Sequence[PlannedUnit]:
    if system.policy == "spatial":
        return spatial_units(setup.plan, next(iter(setup.costs.values())), setup.shapes)
    return setup.plan.units


def _bandwidth(plan: PlacementPlan, unit: PlannedUnit) -> float | None:
    for device in plan.devices:
        if device.name == unit.device:
            return device.bandwidth
    return None


def _report_progress(workload: Workload, progress: Progress | None) -> Iterator[TraceRequest]:
    """Yields the requests and reports their arrival times."""
    for index, request in enumerate(workload):
        if progress is not None and index % _PROGRESS_INTERVAL == 0:
            progress(request.arrival)
        yield request
