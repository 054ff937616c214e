"""Memoized scores of candidate units: the contribution of each to the planner's objective.

A candidate unit is a kind of node, a number of devices, and items. An item is a model in full or in
part; a replica serves a part of its model's rate. The objectives:

- `throughput`: requests per second that are served;
- `weighted`: the same, each model weighted by its fraction of the total rate (MuxServe's measure);
- `slo`: requests per second of models that are served in full within their latency targets.

A bonus for unused capacity, at most `SLACK_VALUE` of the unit's load, decides between plans that
serve the same load.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from muxjax.placement.costs.cluster import Cluster
from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.planner.batch_curve import (
    BatchCurve,
    build_batch_curve,
    with_compute_share,
)
from muxjax.placement.planner.estimator import OperatingPoint, find_operating_point
from muxjax.placement.planner.latency import expected_latencies, min_latency_point
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.plan import Execution
from muxjax.placement.planner.upstream_estimator import UpstreamEstimator

Objective = Literal["throughput", "weighted", "slo"]
type Item = tuple[int, float]
"""A model's index in the fleet, and the fraction of its rate."""
type Items = tuple[Item, ...]

SLACK_VALUE = 1e-4
"""Slack bonus of a completely unused unit, as a fraction of its load."""
LATE_VALUE = 1e-2
"""Value of a request served late under `slo`; above 0, to give the search a gradient."""
_MAX_TP_COMBINATIONS = 4
"""Maximum combinations of `tp` sizes for an exhaustive test; above it, models vary in turn."""
_LOW_UTILIZATION = 0.5
"""Units below this utilization are scored with their largest `tp` sizes only."""


class CandidateUnit(NamedTuple):
    """A unit that a placement may contain.

    Attributes:
      group: index of the kind of node in the cluster.
      size: devices of the mesh.
      items: models on it, sorted, without duplicates.
      as_upstream: use the `tp` sizes and compute shares of MuxServe's own search.
    """

    group: int
    size: int
    items: Items
    as_upstream: bool = False


@dataclass(frozen=True, slots=True)
class UnitScore:
    """The value of a candidate unit, and the best configuration.

    Attributes:
      value: contribution to the objective, slack bonus included.
      tp_sizes: `tp` size of each item.
      shares: fraction of the compute for decoding, of each item.
      point: the steady state.
    """

    value: float
    tp_sizes: tuple[int, ...]
    shares: tuple[float, ...]
    point: OperatingPoint


class Scorer:
    """Scores candidate units and caches the results.

    Args:
      loads: the fleet.
      cluster: the devices.
      costs: one cost model for each group of nodes.
      execution: how units share their devices.
      objective: the maximized quantity.
      upstream: MuxServe's estimator, if its scores are needed.
      thorough: try all combinations of `tp` sizes in every unit.
    """

    def __init__(
        self,
        loads: Sequence[ModelLoad],
        cluster: Cluster,
        costs: Sequence[PlanningCosts],
        execution: Execution,
        objective: Objective = "throughput",
        upstream: UpstreamEstimator | None = None,
        thorough: bool = False,
    ) -> None:
        self.loads = loads
        self.rates = [load.expected.rate for load in loads]
        self.cluster = cluster
        self.costs = costs
        self.execution = execution
        self.objective = objective
        self.upstream = upstream
        self._thorough = thorough
        total = sum(self.rates)
        self.total_rate = total
        self.weights = [
            rate / total if objective == "weighted" and total else 1.0 for rate in self.rates
        ]
        self._scores: dict[tuple[int, int, Items, bool], UnitScore | None] = {}
        self._curves: dict[tuple[int, int, int, float, Item], BatchCurve] = {}
        self._min_shares: dict[tuple[int, int, int, Item], float] = {}
        self._tp_sizes: dict[tuple[int, int, int], tuple[int, ...]] = {}

    def score(
        self, group: int, size: int, items: Items, as_upstream: bool = False
    ) -> UnitScore | None:
        """The score of a candidate unit, or None if it is infeasible. See `CandidateUnit`."""
        key = (group, size, items, as_upstream)
        if key in self._scores:
            return self._scores[key]
        compute = self._score_as_upstream if as_upstream else self._score
        score = self._scores[key] = compute(group, size, items)
        return score

    def feasible_score(self, unit: CandidateUnit) -> UnitScore:
        """The score of a feasible unit."""
        score = self._scores.get(unit) or self.score(*unit)
        assert score is not None
        return score

    def refused_value(self, unit: CandidateUnit) -> float:
        """The part of a feasible unit's load that it refuses, in units of the objective."""
        served = self.feasible_score(unit).point.served
        return sum(
            [
                self.rates[model] * part * self.weights[model] * (1 - fraction)
                for (model, part), fraction in zip(unit.items, served, strict=True)
            ]
        )

    def upstream_value(
        self, group: int, size: int, items: Items, as_upstream: bool = False
    ) -> float:
        """The score by MuxServe's estimator (throughput weighted by rates) times the unit's rate.

        0 for an infeasible unit, or without MuxServe's estimator.
        """
        score = self.score(group, size, items, as_upstream)
        if self.upstream is None or score is None:
            return 0.0
        names = [self.upstream.add_replica(self.loads[model].name, part) for model, part in items]
        percents = [round(100 * share) for share in score.shares]
        rate = sum([self.rates[model] * part for model, part in items])
        return self.upstream.score_unit(size, tuple(zip(names, percents, strict=True)))[0] * rate

    def tp_sizes(self, group: int, size: int, model: int) -> tuple[int, ...]:
        """Possible `tp` sizes of a model on a mesh, descending."""
        key = (group, size, model)
        if key not in self._tp_sizes:
            known = self.costs[group].tp_sizes(self.loads[model].kind)
            possible = [tp for tp in known if tp <= size and size % tp == 0]
            if self.upstream is not None and size not in known:
                possible = []  # MuxServe's estimator has no score for this mesh
            self._tp_sizes[key] = tuple(sorted(possible, reverse=True))
        return self._tp_sizes[key]

    def curve(self, group: int, size: int, tp: int, share: float, item: Item) -> BatchCurve:
        """The batch curve of an item on a mesh."""
        key = (group, size, tp, share, item)
        curve = self._curves.get(key)
        if curve is None:
            model, part = item
            load, costs = self.loads[model], self.costs[group]
            if part != 1.0:
                base = self.curve(group, size, tp, share, (model, 1.0))
                curve = replace(base, rate=base.rate * part)
            elif share != 1.0:
                full = self.curve(group, size, tp, 1.0, item)
                curve = with_compute_share(full, load, costs, share)
            else:
                curve = build_batch_curve(load, costs, size=size, tp=tp)
            self._curves[key] = curve
        return curve

    def min_share(self, group: int, size: int, tp: int, item: Item) -> float:
        """The smallest compute share that serves an isolated item in full, or else the largest.

        Always 1 in time-sliced execution. Source: MuxServe, Algorithm 2.
        """
        if self.execution == "time_sliced":
            return 1.0
        key = (group, size, tp, item)
        cached = self._min_shares.get(key)
        if cached is not None:
            return cached
        memory = self.cluster.groups[group].device.memory

        def is_served(share: float) -> bool:
            curves = [self.curve(group, size, tp, share, item)]
            point = find_operating_point(curves, memory, self.execution)
            return point is not None and point.served[0] >= 1.0

        # Bisection is valid because throughput does not fall with more compute.
        shares = self.costs[group].shares(self.loads[item[0]].kind, tp)
        low, high = -1, len(shares) - 1
        if is_served(shares[high]):
            while high - low > 1:
                middle = (low + high) // 2
                if is_served(shares[middle]):
                    high = middle
                else:
                    low = middle
        share = self._min_shares[key] = shares[high]
        return share

    def curves(
        self, group: int, size: int, items: Items, tp_sizes: Sequence[int], shares: Sequence[float]
    ) -> list[BatchCurve]:
        """The batch curves of a unit's items."""
        return [
            self.curve(group, size, tp, share, item)
            for tp, share, item in zip(tp_sizes, shares, items, strict=True)
        ]

    def _score(self, group: int, size: int, items: Items) -> UnitScore | None:
        options = [self.tp_sizes(group, size, model) for model, _ in items]
        if not all(options):
            return None
        best = self._score_with_tp(group, size, items, [o[0] for o in options])
        if best is None:
            return None  # The largest `tp` sizes need the least memory.
        if best.point.utilization < _LOW_UTILIZATION and not self._thorough:
            return best
        combinations = math.prod([len(o) for o in options])
        if combinations <= _MAX_TP_COMBINATIONS or self._thorough:
            for tp_sizes in itertools.product(*options):
                score = self._score_with_tp(group, size, items, tp_sizes)
                if score is not None and score.value > best.value:
                    best = score
        else:
            for index, choices in enumerate(options):
                for tp in choices[1:]:  # Descend while the value grows.
                    tp_sizes = (*best.tp_sizes[:index], tp, *best.tp_sizes[index + 1 :])
                    score = self._score_with_tp(group, size, items, tp_sizes)
                    if score is None or score.value <= best.value:
                        break
                    best = score
        return best

    def _score_as_upstream(self, group: int, size: int, items: Items) -> UnitScore | None:
        """One replica of each model over the whole mesh, with MuxServe's compute shares."""
        assert self.upstream is not None
        shares = []
        for model, part in items:
            name = self.upstream.add_replica(self.loads[model].name, part)
            candidate = self.upstream.candidate(name, size)
            if candidate is None:
                return None
            shares.append(candidate.percent / 100)
        return self._score_with_shares(group, size, items, (size,) * len(items), tuple(shares))

    def _score_with_tp(
        self, group: int, size: int, items: Items, tp_sizes: Sequence[int]
    ) -> UnitScore | None:
        """The score with given `tp` sizes and the minimum compute shares.

        If load is refused while compute is free, shares of all the compute are also tried.
        """
        shares = tuple(
            [
                self.min_share(group, size, tp, item)
                for tp, item in zip(tp_sizes, items, strict=True)
            ]
        )
        best = self._score_with_shares(group, size, items, tp_sizes, shares)
        if best is not None and self.execution == "concurrent" and best.point.utilization >= 1.0:
            filled = scale_to_full_compute(shares)
            if filled != shares:
                score = self._score_with_shares(group, size, items, tp_sizes, filled)
                if score is not None and score.value > best.value:
                    return score
        return best

    def _score_with_shares(
        self,
        group: int,
        size: int,
        items: Items,
        tp_sizes: Sequence[int],
        shares: tuple[float, ...],
    ) -> UnitScore | None:
        curves = self.curves(group, size, items, tp_sizes, shares)
        slowdown = decode_slowdown(shares, self.execution)
        memory = self.cluster.groups[group].device.memory
        point = find_operating_point(curves, memory, self.execution, slowdown)
        if point is None:
            return None
        value = offered = 0.0
        in_time = (
            self._within_slo(curves, point, items, slowdown) if self.objective == "slo" else None
        )
        for index, (model, part) in enumerate(items):
            full_value = self.rates[model] * part * self.weights[model]
            served = full_value * point.served[index]
            offered += full_value
            if in_time is None or in_time[index]:
                value += served
            else:
                value += served * LATE_VALUE
        value += SLACK_VALUE * offered * (1.0 - point.utilization)
        return UnitScore(value, tuple(tp_sizes), shares, point)

    def _within_slo(
        self, curves: Sequence[BatchCurve], point: OperatingPoint, items: Items, slowdown: float
    ) -> list[bool]:
        """Whether each item is served in full within its latency targets."""
        if self.execution == "time_sliced":
            point = min_latency_point(curves, point)
        latencies = expected_latencies(curves, point, self.execution, slowdown)
        return [
            latency is not None and self.loads[model].slo.met_by(latency.ttft, latency.tpot)
            for (model, _), latency in zip(items, latencies, strict=True)
        ]


def decode_slowdown(shares: Sequence[float], execution: Execution) -> float:
    """Slowdown factor of concurrent decode steps: the sum of their shares if it is above 1."""
    return max(1.0, sum(shares)) if execution == "concurrent" else 1.0


def scale_to_full_compute(shares: Sequence[float]) -> tuple[float, ...]:
    """Raises shares to a sum of 1, in tenths and in proportion; returns larger sums unchanged."""
    total = sum(shares)
    if total >= 1.0 - 1e-9:
        return tuple(shares)
    exact = [10 * share / total for share in shares]
    tenths = [max(int(t + 1e-9), round(10 * share)) for t, share in zip(exact, shares, strict=True)]
    order = sorted(range(len(tenths)), key=lambda i: tenths[i] - exact[i])
    for i in itertools.islice(itertools.cycle(order), max(0, 10 - sum(tenths))):
        tenths[i] += 1
    return tuple([tenth / 10 for tenth in tenths])
