"""Simulated SLO attainment of candidate units, for a placement search.

Units that share a model affect each other through the router, so they are simulated together. Other
units are independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from muxjax.errors import MuxError, PlanError
from muxjax.placement.planner.plan import PlannedModel, PlannedTarget
from muxjax.placement.planner.plan_builder import build_unit_plan
from muxjax.placement.planner.scorer import CandidateUnit, Scorer
from muxjax.placement.simulator.metrics import AttainmentCriterion
from muxjax.placement.simulator.plan_costs import model_criterion
from muxjax.placement.simulator.planned_workload import model_lengths
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_units import SystemConfig, build_simulated_unit
from muxjax.placement.simulator.simulator import Simulation
from muxjax.placement.workload.synthetic import SyntheticWorkload, Traffic

GROUP_REQUESTS = 600
"""Expected requests in the simulation of a group of units."""
MIN_SECONDS, MAX_SECONDS = 30.0, 600.0
"""Limits of the length of a simulation."""
LOAD = 1.1
"""Factor on the expected rates, so that a chosen placement has a margin for busier minutes."""
WARM_UP = 1 / 3
"""Fraction of the workload whose requests are not counted: queues of an overloaded unit grow."""
_BLOCKS = 2**12
"""Maximum number of blocks in a simulated pool: few, so that a pool is set up fast."""

type UnitGroup = tuple[CandidateUnit, ...]
"""Units that are connected by shared models, sorted."""


def group_units(units: Iterable[CandidateUnit]) -> list[UnitGroup]:
    """Groups units that share models, directly or through others."""
    groups: list[tuple[set[int], list[CandidateUnit]]] = []
    for unit in units:
        models = {model for model, _ in unit.items}
        joined = [group for group in groups if group[0] & models]
        groups = [group for group in groups if not group[0] & models]
        members = [unit, *[member for _, other in joined for member in other]]
        groups.append((models.union(*[names for names, _ in joined]), members))
    return [tuple(sorted(members)) for _, members in groups]


class LossExceeded(MuxError):
    """A simulated group lost more requests than permitted, so the simulation was stopped."""


@dataclass(frozen=True, slots=True)
class GroupLoss:
    """Requests per second that miss their target.

    Attributes:
      total: of the group; infinite if it cannot be simulated.
      by_unit: of each of its units, in order.
    """

    total: float
    by_unit: tuple[float, ...]


class GroupSimulator:
    """Simulates groups of candidate units under their expected load, and caches the results.

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
        self._results: dict[UnitGroup, GroupLoss] = {}
        self.requests = 0

    def placement_loss(self, units: Iterable[CandidateUnit]) -> float:
        """Requests per second that a placement of feasible units loses."""
        return sum([self.loss(group).total for group in group_units(units)])

    def loss(self, group: UnitGroup) -> GroupLoss:
        """Simulates a group of feasible units."""
        result = self.loss_within(group, float("inf"))
        assert result is not None
        return result

    def loss_within(self, group: UnitGroup, limit: float) -> GroupLoss | None:
        """Simulates a group until it has lost more than `limit` requests per second.

        Returns:
          The loss, or None if it is above the limit.
        """
        result = self._results.get(group)
        if result is None:
            try:
                result = self._simulate(group, limit)
            except LossExceeded:
                return None
            except PlanError:  # for example a pool below one request of full length
                result = GroupLoss(float("inf"), (float("inf"),) * len(group))
            self._results[group] = result
        return None if result.total > limit else result

    def _simulate(self, group: UnitGroup, limit: float) -> GroupLoss:
        planned = [
            build_unit_plan(self._scorer, unit, f"unit-{index}", 0, 0)
            for index, unit in enumerate(group)
        ]
        models = [model for unit in planned for model in unit.models]
        rate = sum([model.rate for model in models])
        if rate <= 0:
            return GroupLoss(0.0, (0.0,) * len(group))
        criteria: dict[str, AttainmentCriterion] = {}
        simulated = []
        for unit, plan in zip(group, planned, strict=True):
            costs = self._scorer.costs[unit.group]
            device = self._scorer.cluster.groups[unit.group].device
            for model in plan.models:
                target = self._targets.get(model.name)
                criteria.setdefault(
                    model.name, model_criterion(None, target, model.kind, costs, device.memory)
                )
            shapes = {model.kind: costs.shape(model.kind) for model in plan.models}
            simulated.append(
                build_simulated_unit(
                    plan,
                    self._system,
                    costs,
                    shapes,
                    bandwidth=device.bandwidth,
                    criteria=criteria,
                )
            )
        seconds = min(MAX_SECONDS, max(MIN_SECONDS, GROUP_REQUESTS / (LOAD * rate)))
        warm_up = WARM_UP * seconds
        counted = LOAD * (seconds - warm_up)  # a loss is relative to the expected rates
        missed = dict.fromkeys([plan.name for plan in planned], 0)
        isolated_costs = self._scorer.costs[0]

        def count(record: RequestRecord) -> None:
            self.requests += 1
            if record.arrival >= warm_up and not criteria[record.model].met(record, isolated_costs):
                missed[record.unit] += 1
                if sum(missed.values()) > limit * counted:
                    raise LossExceeded

        Simulation(simulated).run(self._workload(models, seconds), count)
        by_unit = []
        for plan in planned:
            refused = sum([model.rate - model.throughput for model in plan.models])
            by_unit.append(max(missed[plan.name] / counted, refused))
        return GroupLoss(sum(by_unit), tuple(by_unit))

    def _workload(self, models: Iterable[PlannedModel], seconds: float) -> SyntheticWorkload:
        """The expected requests of a group, each model with the sum of its rates."""
        traffic: dict[str, Traffic] = {}
        for model in models:
            rate = LOAD * model.rate
            if model.name in traffic:
                rate += traffic[model.name].rate
            shape = self._scorer.costs[0].shape(model.kind)
            traffic[model.name] = Traffic(model.name, rate, model_lengths(model, shape))
        return SyntheticWorkload(list(traffic.values()), seconds, seed=self._seed)
