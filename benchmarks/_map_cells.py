"""One (alpha, load) of the policy map: every policy on its own best placement, at every SLO scale.

A policy's placement is the one that is best for it on the requests that count, so that policies are
compared and not their luck; with `CellJob.ahead` the one that is best on other requests of the same
rates and lengths (`TRAINING_SEED`), as one must choose who does not know what will come. Runs that
do not depend on the scale are made once for all scales, and parts of placements that are alike once
for all placements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from _map_fleet import CLUSTERS, CellJob, Units, cost_model, fleet, placements, workload
from _map_summary import WITHIN

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
"""Added to the seed for the requests on which placements are chosen ahead."""
AS_GOOD = 0.001
"""Placements that attain so much less than the best of them count as equal."""
BLOCKS = 2**13
"""Of a pool, at most: more take longer to set up than seconds of requests take to simulate."""
SHORT = WITHIN / 2
"""How far `slo` may fall short where it is placed: half of what the bars allow."""
ENOUGH = 0.99
"""What `slo` must attain to be tried on no other placements."""
ALIKE: Mapping[Execution, Mapping[str, PolicyName]] = {
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
"""Policies that make the same steps for a model that is alone on its mesh: one run is enough."""


@dataclass
class _Model:
    offered: int = 0
    finished: int = 0
    last_end: float = 0.0
    met: dict[float, int] = field(default_factory=dict)


Outcome = Mapping[str, _Model]


def cells(job: CellJob) -> list[dict[str, Any]]:
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
            "chosen_ahead": job.ahead,
            "slo_attainment": {},
            "throughput": {},
            "placement": {},
        }
        for policy in job.policies:
            name, chosen = runner.choose(policy, scale)
            outcome = runner.score(chosen, policy, scale)
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
    """Requests a second, as `placement/simulator/metrics.py` has them."""
    rates = {n: m.finished / m.last_end if m.last_end else 0.0 for n, m in outcome.items()}
    offered = sum(model.offered for model in outcome.values())
    weighted = sum(rates[name] * model.offered for name, model in outcome.items())
    return {"total": sum(rates.values()), "rate_weighted": weighted / max(1, offered)}


Named = tuple[str, list[Units]]
"""A placement and its name."""


def _least(shorts: Sequence[float], places: Sequence[Named]) -> list[Named]:
    """Those that fall hardly short, or the ones that do least."""
    allowed = max(SHORT, min(shorts))
    return [place for place, by in zip(places, shorts, strict=True) if by <= allowed]


class _Runner:
    """Runs parts of placements, each once for everything that it depends on."""

    def __init__(self, job: CellJob) -> None:
        self._job = job
        cluster = parse_cluster(CLUSTERS[job.hardware])
        self._device = cluster.groups[0].device
        self._costs = cost_model(job, cluster)
        loads = fleet(job.alpha, job.load)
        self._placements, plan = placements(job, loads, cluster, self._costs)
        self._shapes = plan.shapes
        costs = {self._device.name: self._costs}
        self._targets = {
            scale: plan_criteria(plan, costs, AttainmentCriterion.from_targets(scale=scale))
            for scale in job.scales
        }
        self._training = workload(loads, job.seconds, job.seed + TRAINING_SEED)
        self._counting = workload(loads, job.seconds, job.seed)
        self._known: dict[object, Outcome] = {}

    def choose(self, policy: PolicyName, scale: float) -> Named:
        """The placement that is best for the policy: which attains most, and of those that attain
        as much serves most.

        `slo` takes the one that is best for `adbs`, unless others are ahead of it there.
        """
        if policy == "slo":
            return self._choose_for_slo(scale)
        found = self._candidates(policy, scale)
        best = self._best(list(found.values()), policy, scale)
        return next(name for name, chosen in found.items() if chosen is best), best

    def _candidates(self, policy: PolicyName, scale: float) -> dict[str, list[Units]]:
        """The placements that a policy may take, each part in the form that is best for it.

        Raises:
          PlanError: there is none. One with a pool that is too small for a request of full length
            counts as none.
        """
        found = {}
        refused = PlanError("no placements")
        for name, parts in self._placements.items():
            if policy == "spatial" and name != "spatial":
                continue
            try:
                best = [self._best([[units] for units in part], policy, scale)[0] for part in parts]
                self._try(best, policy, scale)
            except PlanError as error:
                refused = error
            else:
                found[name] = best
        if not found:
            raise refused
        return found

    def _choose_for_slo(self, scale: float) -> Named:
        """Of all placements that any policy may take, one where `slo` falls short of nobody: it
        attains as much as the best of the others on theirs, and serves as much as `adbs`; of those
        the best. If there is none, where the larger shortfall of the two is the least, as long as
        the bars allow that; else of those where it attains as much the one where it serves most; if
        there is none of these either, where it attains most.

        On the one that is best for `adbs` nothing more is tried if it falls short of nobody there
        and there is hardly more to win.
        """
        others = ["adbs", *(p for p in self._job.policies if p not in ("slo", "adbs"))]
        theirs = {policy: self.choose(policy, scale) for policy in others}
        most = max(
            attainment(self._try(chosen, policy, scale), scale)
            for policy, (_, chosen) in theirs.items()
        )
        wanted = throughput(self._try(theirs["adbs"][1], "adbs", scale))

        def short(chosen: list[Units]) -> tuple[float, float]:
            outcome = self._try(chosen, "slo", scale)
            served = throughput(outcome)
            less = [1 - served[measure] / wanted[measure] for measure in wanted]
            return most - attainment(outcome, scale), max(less)

        base = theirs["adbs"]
        there = attainment(self._try(base[1], "slo", scale), scale)
        if max(short(base[1])) <= 0 and there >= ENOUGH:
            return base
        near = [*theirs.values(), *self._candidates("slo", scale).items()]
        larger = [max(short(chosen)) for _, chosen in near]
        if min(larger) <= WITHIN:
            near = _least(larger, near)
        else:
            near = _least([short(chosen)[0] for _, chosen in near], near)
            near = _least([short(chosen)[1] for _, chosen in near], near)
        best = self._best([chosen for _, chosen in near], "slo", scale)
        return next(one for one in near if one[1] is best)

    def _try(self, chosen: Iterable[Units], policy: PolicyName, scale: float) -> Outcome:
        """What the policy attains of the requests that placements are chosen on."""
        return self._run(chosen, policy, scale, counting=not self._job.ahead)

    def score(self, chosen: Iterable[Units], policy: PolicyName, scale: float) -> Outcome:
        """What the policy attains of the requests that count."""
        return self._run(chosen, policy, scale, counting=True)

    def _best(
        self, choices: Sequence[list[Units]], policy: PolicyName, scale: float
    ) -> list[Units]:
        if len(choices) == 1:
            return choices[0]
        outcomes = [self._try(one, policy, scale) for one in choices]
        shares = [attainment(outcome, scale) for outcome in outcomes]
        served = [throughput(outcome)["total"] for outcome in outcomes]
        near = [n for n, share in enumerate(shares) if share >= max(shares) - AS_GOOD]
        return choices[max(near, key=lambda n: (served[n], shares[n]))]

    def _run(
        self, chosen: Iterable[Units], policy: PolicyName, scale: float, *, counting: bool
    ) -> Outcome:
        outcome: dict[str, _Model] = {}
        for units in chosen:
            outcome.update(self._run_part(units, policy, scale, counting))
        return outcome

    def _run_part(self, units: Units, policy: PolicyName, scale: float, counting: bool) -> Outcome:
        if len(units) == 1 and len(units[0].models) == 1:
            policy = ALIKE[self._job.execution].get(policy, policy)
        key = (
            counting,
            policy,
            scale if policy == "slo" else None,
            tuple((unit.size, unit.kv_bytes, unit.models) for unit in units),
        )
        if key not in self._known:
            requests = self._counting if counting else self._training
            self._known[key] = self._simulate(units, policy, scale, requests)
        return self._known[key]

    def _simulate(
        self, units: Units, policy: PolicyName, scale: float, requests: Sequence[TraceRequest]
    ) -> Outcome:
        system = SystemConfig(policy, self._job.execution, blocks=BLOCKS)
        names = {model.name for unit in units for model in unit.models}
        found = {name: _Model(met=dict.fromkeys(self._job.scales, 0)) for name in names}
        targets = self._targets[scale]

        def take(record: RequestRecord) -> None:
            model = found[record.model]
            model.offered += 1
            if record.latency is None or record.end is None:
                return
            model.finished += 1
            model.last_end = max(model.last_end, record.end)
            alone = targets[record.model].isolated_latency(record, self._costs)
            for limit in model.met:
                model.met[limit] += record.latency <= limit * alone

        made = [
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
        Simulation(made).run([r for r in requests if r.model in names], take)
        return found
