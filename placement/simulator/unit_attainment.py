"""Simulated SLO attainment of one candidate unit at a time, for a placement search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from muxjax.errors import MuxError, PlanError
from muxjax.placement.planner.plan import PlannedTarget
from muxjax.placement.planner.plan_builder import build_unit_plan
from muxjax.placement.planner.scorer import CandidateUnit, Scorer
from muxjax.placement.simulator.metrics import SimulationMetrics
from muxjax.placement.simulator.plan_costs import model_criterion
from muxjax.placement.simulator.planned_workload import model_lengths
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_units import SystemConfig, build_simulated_unit
from muxjax.placement.simulator.simulator import Simulation
from muxjax.placement.workload.synthetic import SyntheticWorkload, Traffic

UNIT_REQUESTS = 600
"""Expected requests in the simulation of a unit."""
MIN_SECONDS, MAX_SECONDS = 30.0, 600.0
"""Limits of the length of a simulation."""
WARM_UP = 1 / 3
"""Fraction of the workload whose requests are not counted: queues of an overloaded unit grow."""
_BLOCKS = 2**12
"""Maximum number of blocks in a simulated pool: few, so that a pool is set up fast."""


class LossExceeded(MuxError):
    """A simulated unit lost more requests than permitted, so the simulation was stopped."""


@dataclass(frozen=True, slots=True)
class UnitAttainment:
    """Requests per second of a unit that meet their target, and that miss it."""

    attained: float
    lost: float


class UnitSimulator:
    """Simulates candidate units under their part of the expected load, and caches the results.

    Args:
      scorer: configures the units.
      targets: latency target of each model, by name.
      system: policy and execution.
      seed: of the workload.

    Attributes:
      requests: number of requests simulated so far, as a measure of the work.
    """

    def __init__(
        self,
        scorer: Scorer,
        targets: Mapping[str, PlannedTarget],
        system: SystemConfig,
        seed: int,
    ) -> None:
        self._scorer = scorer
        self._targets = targets
        self._system = SystemConfig(system.policy, system.execution, system.steps, _BLOCKS)
        self._seed = seed
        self._results: dict[CandidateUnit, UnitAttainment] = {}
        self.requests = 0

    def attainment(
        self, unit: CandidateUnit, max_lost: float = float("inf")
    ) -> UnitAttainment | None:
        """Simulates a feasible unit.

        Args:
          unit: the unit.
          max_lost: stop as soon as more requests per second than this are lost.

        Returns:
          The attainment, or None if more are lost or the unit cannot be simulated.
        """
        result = self._results.get(unit)
        if result is None:
            try:
                result = self._simulate(unit, max_lost)
            except LossExceeded:
                return None
            except PlanError:  # for example a pool below one request of full length
                result = UnitAttainment(0.0, float("inf"))
            self._results[unit] = result
        return None if result.lost > max_lost else result

    def loss(self, units: Sequence[CandidateUnit]) -> float:
        """Requests per second that a placement loses; infinite if it cannot be simulated."""
        results = [self.attainment(unit) for unit in units]
        return sum([float("inf") if result is None else result.lost for result in results])

    def _simulate(self, unit: CandidateUnit, max_lost: float) -> UnitAttainment:
        planned = build_unit_plan(self._scorer, unit, "unit", 0, 0)
        rate = sum(model.rate for model in planned.models)
        if rate <= 0:
            return UnitAttainment(0.0, 0.0)
        seconds = min(MAX_SECONDS, max(MIN_SECONDS, UNIT_REQUESTS / rate))
        costs = self._scorer.costs[unit.group]
        device = self._scorer.cluster.groups[unit.group].device
        shapes = {model.kind: costs.shape(model.kind) for model in planned.models}
        criteria = {
            model.name: model_criterion(
                None, self._targets.get(model.name), model.kind, costs, device.memory
            )
            for model in planned.models
        }
        simulated = build_simulated_unit(
            planned, self._system, costs, shapes, bandwidth=device.bandwidth, criteria=criteria
        )
        metrics = SimulationMetrics(criteria, costs)
        warm_up = WARM_UP * seconds
        lost = 0
        limit = max_lost * (seconds - warm_up)

        def count(record: RequestRecord) -> None:
            nonlocal lost
            self.requests += 1
            if record.arrival >= warm_up:
                lost += not metrics.add(record)
                if lost > limit:
                    raise LossExceeded

        workload = SyntheticWorkload(
            [Traffic(m.name, m.rate, model_lengths(m, shapes[m.kind])) for m in planned.models],
            seconds,
            seed=self._seed,
        )
        Simulation([simulated]).run(workload, count)
        attained = sum(
            [
                model.rate * min(model.throughput / model.rate, metrics.attainment(model.name))
                for model in planned.models
                if model.rate
            ]
        )
        return UnitAttainment(attained, rate - attained)
