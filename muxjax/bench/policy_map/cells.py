"""Simulates the cells of one (alpha, load): every policy on its best placement, at every SLO scale.

Each policy uses the placement that is best for it on the scored requests, so that the comparison
does not depend on a lucky placement. With `CellJob.ahead` the placement is chosen on other requests
of the same rates and lengths (`TRAINING_SEED`), as in production, where future requests are
unknown. Runs that do not depend on the scale are simulated once for all scales, and identical parts
of placements once for all placements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from muxjax.bench.policy_map.scenario import (
    CLUSTERS,
    CellJob,
    Units,
    cost_model,
    fleet,
    placements,
    workload,
)
from muxjax.bench.policy_map.summary import TOLERANCE
from muxjax.errors import PlanError
from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.planner.plan import Execution
from muxjax.placement.simulator.metrics import AttainmentCriterion
from muxjax.placement.simulator.plan_costs import plan_criteria
from muxjax.placement.simulator.records import RequestRecord
from muxjax.placement.simulator.simulated_units import (
    PolicyName,
    SystemConfig,
    build_simulated_unit,
)
from muxjax.placement.simulator.simulator import Simulation
from muxjax.placement.workload.trace import TraceRequest

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
TRAINING_SEED = 1_000_003
"""Added to the seed of the requests that placements are chosen on with `CellJob.ahead`."""
EQUAL_ATTAINMENT = 0.001
"""Maximum difference in attainment of placements that count as equally good."""
BLOCKS = 2**13
"""Maximum number of blocks in a simulated pool; larger pools take long to set up."""
MAX_SHORTFALL = TOLERANCE / 2
"""Accepted shortfall of `slo` on a placement: half of what the criteria allow."""
SUFFICIENT_ATTAINMENT = 0.99
"""Attainment of `slo` at which no other placements are tried."""
EQUIVALENT: Mapping[Execution, Mapping[str, PolicyName]] = {
    "time_sliced": {
        "spatial": "adbs",
        "round_robin": "fcfs",
        "static": "fcfs",
        "temporal": "fcfs",
        "mutex": "fcfs",
    },
    "concurrent": {
        "spatial": "adbs",
        "round_robin": "adbs",
        "fcfs": "adbs",
        "mutex": "temporal",
    },
}
"""Policies that schedule a model on its own mesh identically, so that one run is enough."""


@dataclass
class ModelOutcome:
    """Counts of one model's requests in a simulation."""

    offered: int = 0
    finished: int = 0
    last_end: float = 0.0
    met: dict[float, int] = field(default_factory=dict)


Outcome = Mapping[str, ModelOutcome]


def simulate_cells(job: CellJob) -> list[dict[str, Any]]:
    """The cells of a job, one for each SLO scale."""
    chooser = PlacementChooser(job)
    cells = []
    for scale in job.scales:
        cell: dict[str, Any] = {
            "alpha": job.alpha,
            "load": job.load,
            "slo_scale": scale,
            "execution": job.execution,
            "hardware": job.hardware,
            "seed": job.seed,
            "seconds": job.seconds,
            "chosen_ahead": job.ahead,
            "slo_attainment": {},
            "throughput": {},
            "placement": {},
        }
        for policy in job.policies:
            name, chosen = chooser.choose(policy, scale)
            outcome = chooser.score(chosen, policy, scale)
            cell["slo_attainment"][policy] = attainment(outcome, scale)
            cell["throughput"][policy] = throughput(outcome)
            cell["placement"][policy] = name
        cells.append(cell)
    return cells


def attainment(outcome: Outcome, scale: float) -> float:
    """Fraction of the requests that met their target."""
    offered = sum(model.offered for model in outcome.values())
    return sum(model.met[scale] for model in outcome.values()) / max(1, offered)


def throughput(outcome: Outcome) -> dict[str, float]:
    """Requests per second, as in `placement/simulator/metrics.py`."""
    rates = {n: m.finished / m.last_end if m.last_end else 0.0 for n, m in outcome.items()}
    offered = sum(model.offered for model in outcome.values())
    weighted = sum(rates[name] * model.offered for name, model in outcome.items())
    return {"total": sum(rates.values()), "rate_weighted": weighted / max(1, offered)}


NamedPlacement = tuple[str, list[Units]]
"""A placement and its name."""


def _least_short(
    shortfalls: Sequence[float], placements: Sequence[NamedPlacement]
) -> list[NamedPlacement]:
    """The placements with an accepted shortfall, or the ones with the smallest shortfall."""
    allowed = max(MAX_SHORTFALL, min(shortfalls))
    return [
        placement
        for placement, shortfall in zip(placements, shortfalls, strict=True)
        if shortfall <= allowed
    ]


class PlacementChooser:
    """Chooses placements by simulation; each distinct part is simulated once."""

    def __init__(self, job: CellJob) -> None:
        self._job = job
        cluster = parse_cluster(CLUSTERS[job.hardware])
        self._device = cluster.groups[0].device
        self._costs = cost_model(job, cluster)
        loads = fleet(job.alpha, job.load)
        self.placements, plan = placements(job, loads, cluster, self._costs)
        self._shapes = plan.shapes
        costs = {self._device.name: self._costs}
        self._targets = {
            scale: plan_criteria(plan, costs, AttainmentCriterion.from_targets(scale=scale))
            for scale in job.scales
        }
        self._training = workload(loads, job.seconds, job.seed + TRAINING_SEED)
        self._scored = workload(loads, job.seconds, job.seed)
        self._outcomes: dict[object, Outcome] = {}

    def choose(self, policy: PolicyName, scale: float) -> NamedPlacement:
        """The placement with the highest attainment for a policy; throughput breaks ties.

        For `slo`, see `_choose_for_slo`.
        """
        if policy == "slo":
            return self._choose_for_slo(scale)
        candidates = self.candidates(policy, scale)
        best = self._best(list(candidates.values()), policy, scale)
        return next(name for name, chosen in candidates.items() if chosen is best), best

    def candidates(self, policy: PolicyName, scale: float) -> dict[str, list[Units]]:
        """The placements that a policy may use, each part in its best form for the policy.

        Raises:
          PlanError: no placement is usable; placements whose pool cannot hold the longest
            request are skipped.
        """
        usable = {}
        last_error = PlanError("no placements")
        for name, parts in self.placements.items():
            if policy == "spatial" and name != "spatial":
                continue
            try:
                best = [self._best([[units] for units in part], policy, scale)[0] for part in parts]
                self._outcome_for_choice(best, policy, scale)
            except PlanError as error:
                last_error = error
            else:
                usable[name] = best
        if not usable:
            raise last_error
        return usable

    def _choose_for_slo(self, scale: float) -> NamedPlacement:
        """The placement for `slo`.

        The shortfall in attainment is relative to the best other policy on its chosen placement,
        and the shortfall in throughput is relative to `adbs`. The first rule that applies:

        1. If the placement of `adbs` has no shortfall and sufficient attainment, use it.
        2. If the larger shortfall of some placement is within the criteria, use the best of the
           placements whose larger shortfall is accepted or smallest.
        3. Keep the placements whose shortfall in attainment is accepted or smallest, then those
           whose shortfall in throughput is accepted or smallest. Use the best of them.
        """
        others = ["adbs", *(p for p in self._job.policies if p not in ("slo", "adbs"))]
        baselines = {policy: self.choose(policy, scale) for policy in others}
        best_attainment = max(
            attainment(self._outcome_for_choice(chosen, policy, scale), scale)
            for policy, (_, chosen) in baselines.items()
        )
        required = throughput(self._outcome_for_choice(baselines["adbs"][1], "adbs", scale))

        def shortfall(chosen: list[Units]) -> tuple[float, float]:
            outcome = self._outcome_for_choice(chosen, "slo", scale)
            served = throughput(outcome)
            losses = [1 - served[measure] / required[measure] for measure in required]
            return best_attainment - attainment(outcome, scale), max(losses)

        base = baselines["adbs"]
        base_attainment = attainment(self._outcome_for_choice(base[1], "slo", scale), scale)
        if max(shortfall(base[1])) <= 0 and base_attainment >= SUFFICIENT_ATTAINMENT:
            return base
        remaining = [*baselines.values(), *self.candidates("slo", scale).items()]
        larger_shortfalls = [max(shortfall(chosen)) for _, chosen in remaining]
        if min(larger_shortfalls) <= TOLERANCE:
            remaining = _least_short(larger_shortfalls, remaining)
        else:
            remaining = _least_short([shortfall(chosen)[0] for _, chosen in remaining], remaining)
            remaining = _least_short([shortfall(chosen)[1] for _, chosen in remaining], remaining)
        best = self._best([chosen for _, chosen in remaining], "slo", scale)
        return next(named for named in remaining if named[1] is best)

    def _outcome_for_choice(
        self, chosen: Iterable[Units], policy: PolicyName, scale: float
    ) -> Outcome:
        """The outcome on the requests that placements are chosen on."""
        return self.run(chosen, policy, scale, scored=not self._job.ahead)

    def score(self, chosen: Iterable[Units], policy: PolicyName, scale: float) -> Outcome:
        """The outcome on the scored requests."""
        return self.run(chosen, policy, scale, scored=True)

    def _best(
        self, choices: Sequence[list[Units]], policy: PolicyName, scale: float
    ) -> list[Units]:
        if len(choices) == 1:
            return choices[0]
        outcomes = [self._outcome_for_choice(units, policy, scale) for units in choices]
        shares = [attainment(outcome, scale) for outcome in outcomes]
        served = [throughput(outcome)["total"] for outcome in outcomes]
        equal = [n for n, share in enumerate(shares) if share >= max(shares) - EQUAL_ATTAINMENT]
        return choices[max(equal, key=lambda n: (served[n], shares[n]))]

    def run(
        self, chosen: Iterable[Units], policy: PolicyName, scale: float, *, scored: bool
    ) -> Outcome:
        """The outcome of a placement, on the scored or the training requests."""
        outcome: dict[str, ModelOutcome] = {}
        for units in chosen:
            outcome.update(self._run_part(units, policy, scale, scored))
        return outcome

    def _run_part(self, units: Units, policy: PolicyName, scale: float, scored: bool) -> Outcome:
        if len(units) == 1 and len(units[0].models) == 1:
            policy = EQUIVALENT[self._job.execution].get(policy, policy)
        key = (
            scored,
            policy,
            scale if policy == "slo" else None,
            tuple((unit.size, unit.kv_bytes, unit.models) for unit in units),
        )
        if key not in self._outcomes:
            requests = self._scored if scored else self._training
            self._outcomes[key] = self.simulate(units, policy, scale, requests)
        return self._outcomes[key]

    def simulate(
        self, units: Units, policy: PolicyName, scale: float, requests: Sequence[TraceRequest]
    ) -> Outcome:
        """Simulates a policy on the units of one part."""
        system = SystemConfig(policy, self._job.execution, blocks=BLOCKS)
        names = {model.name for unit in units for model in unit.models}
        outcomes = {name: ModelOutcome(met=dict.fromkeys(self._job.scales, 0)) for name in names}
        targets = self._targets[scale]

        def count(record: RequestRecord) -> None:
            model = outcomes[record.model]
            model.offered += 1
            if record.latency is None or record.end is None:
                return
            model.finished += 1
            model.last_end = max(model.last_end, record.end)
            isolated = targets[record.model].isolated_latency(record, self._costs)
            for limit in model.met:
                model.met[limit] += record.latency <= limit * isolated

        simulated = [
            build_simulated_unit(
                unit,
                system,
                self._costs,
                self._shapes,
                bandwidth=self._device.bandwidth,
                criteria=targets,
            )
            for unit in units
        ]
        Simulation(simulated).run([r for r in requests if r.model in names], count)
        return outcomes
