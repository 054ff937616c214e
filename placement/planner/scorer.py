"""What every possible unit of a fleet is worth: estimated once, remembered.

A unit is a kind of node, a number of devices, and items: models, whole or in part (a replica takes
a part of its model's rate). Its value is its contribution to the objective:

- `throughput`: requests a second that are served;
- `weighted`: the same, each model's weighted by its rate over the whole (MuxServe's measure);
- `slo`: requests a second of models that are served in full within their latency targets.

To this comes a little for what is left unused (`SLACK_WORTH` at most of the unit's whole load), so
that among plans that serve the same the one with more room is chosen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from muxjax.placement.costs.cluster import Cluster
from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.planner.estimator import (
    BatchCurve,
    OperatingPoint,
    build_batch_curve,
    latencies,
    quiet_point,
    settle,
    with_share,
)
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.plan import Execution
from muxjax.placement.planner.upstream_estimator import UpstreamEstimator

Objective = Literal["throughput", "weighted", "slo"]
Item: TypeAlias = tuple[int, float]
"""A model's index in the fleet, and the part of its rate."""
Items: TypeAlias = tuple[Item, ...]

SLACK_WORTH = 1e-4
PARTIAL_WORTH = 1e-2
"""What a request served late is worth for `slo`, so that the search has a slope."""
_FEW_DEGREES = 4
"""Combinations of degrees that are all tried; if there are more, one model after the other."""
_EASY = 0.5
"""A unit that serves everything with so much of its pool needs no better degrees."""


@dataclass(frozen=True, slots=True)
class UnitScore:
    """What a unit is worth, and how it is run.

    Attributes:
      value: of the objective, with what slack is worth.
      degrees: of tensor parallelism, of each item.
      shares: of the compute for decoding, of each item.
      point: where it settles.
    """

    value: float
    degrees: tuple[int, ...]
    shares: tuple[float, ...]
    point: OperatingPoint


class Scorer:
    """Values of units.

    Args:
      loads: the fleet.
      cluster: what there is.
      costs: a cost model for each group of nodes.
      execution: how units share their devices.
      objective: what counts.
      upstream: MuxServe's estimator, if its scores are wanted.
      thorough: try all combinations of degrees of tensor parallelism in every unit.
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
        self.cluster = cluster
        self.costs = costs
        self.execution = execution
        self.objective = objective
        self.upstream = upstream
        self._thorough = thorough
        total = sum([load.rate for load in loads])
        self.total_rate = total
        self.weights = [
            load.rate / total if objective == "weighted" and total else 1.0 for load in loads
        ]
        self.units: dict[tuple[int, int, Items, bool], UnitScore | None] = {}
        self._curves: dict[tuple[int, int, int, float, Item], BatchCurve] = {}
        self._shares: dict[tuple[int, int, int, Item], float] = {}
        self._degrees: dict[tuple[int, int, int], tuple[int, ...]] = {}

    def unit(
        self, group: int, size: int, items: Items, as_upstream: bool = False
    ) -> UnitScore | None:
        """The worth of a unit, or None where it cannot be.

        Args:
          group: index of the kind of node.
          size: devices.
          items: sorted, no model twice.
          as_upstream: with the degrees and shares that MuxServe's own search would choose.
        """
        key = (group, size, items, as_upstream)
        if key in self.units:
            return self.units[key]
        score = self._score_as_upstream if as_upstream else self._score
        found = self.units[key] = score(group, size, items)
        return found

    def upstream_value(
        self, group: int, size: int, items: Items, as_upstream: bool = False
    ) -> float:
        """What MuxServe's estimator gives a unit: throughput weighted by rates, times the rates."""
        found = self.unit(group, size, items, as_upstream)
        if self.upstream is None or found is None:
            return 0.0
        names = [self.upstream.part(self.loads[model].name, part) for model, part in items]
        percents = [round(100 * share) for share in found.shares]
        rate = sum([self.loads[model].rate * part for model, part in items])
        return self.upstream.unit(size, tuple(zip(names, percents, strict=True)))[0] * rate

    def degrees(self, group: int, size: int, model: int) -> tuple[int, ...]:
        """Degrees of tensor parallelism of a model on a mesh, the largest first."""
        key = (group, size, model)
        if key not in self._degrees:
            known = self.costs[group].tp_degrees(self.loads[model].kind)
            found = [tp for tp in known if tp <= size and size % tp == 0]
            if self.upstream is not None and size not in known:
                found = []  # MuxServe's estimator has no score for it
            self._degrees[key] = tuple(sorted(found, reverse=True))
        return self._degrees[key]

    def curve(self, group: int, size: int, tp: int, share: float, item: Item) -> BatchCurve:
        """The curve of an item on a mesh."""
        key = (group, size, tp, share, item)
        found = self._curves.get(key)
        if found is None:
            model, part = item
            load, costs = self.loads[model], self.costs[group]
            if part != 1.0:
                base = self.curve(group, size, tp, share, (model, 1.0))
                found = replace(base, rate=base.rate * part)
            elif share != 1.0:
                found = with_share(self.curve(group, size, tp, 1.0, item), load, costs, share)
            else:
                found = build_batch_curve(load, costs, size=size, tp=tp)
            self._curves[key] = found
        return found

    def share(self, group: int, size: int, tp: int, item: Item) -> float:
        """Algorithm 2: the smallest share of the compute with which an item alone on a mesh is
        served in full, or else the largest. 1 where time is sliced.
        """
        if self.execution == "time_sliced":
            return 1.0
        key = (group, size, tp, item)
        found = self._shares.get(key)
        if found is not None:
            return found
        memory = self.cluster.groups[group].device.memory

        def serves(share: float) -> bool:
            point = settle([self.curve(group, size, tp, share, item)], memory, self.execution)
            return point is not None and point.fractions[0] >= 1.0

        # By bisection: more compute does not serve less.
        shares = self.costs[group].shares(self.loads[item[0]].kind, tp)
        low, high = -1, len(shares) - 1
        if serves(shares[high]):
            while high - low > 1:
                middle = (low + high) // 2
                if serves(shares[middle]):
                    high = middle
                else:
                    low = middle
        found = self._shares[key] = shares[high]
        return found

    def curves(
        self, group: int, size: int, items: Items, degrees: Sequence[int], shares: Sequence[float]
    ) -> list[BatchCurve]:
        """The curves of a unit's items."""
        return [
            self.curve(group, size, tp, share, item)
            for tp, share, item in zip(degrees, shares, items, strict=True)
        ]

    def _score(self, group: int, size: int, items: Items) -> UnitScore | None:
        options = [self.degrees(group, size, model) for model, _ in items]
        if not all(options):
            return None
        best = self._with_degrees(group, size, items, [o[0] for o in options])
        if best is None:
            return None  # the largest degrees take the least memory
        if best.point.use < _EASY and not self._thorough:
            return best
        combinations = math.prod([len(o) for o in options])
        if combinations <= _FEW_DEGREES or self._thorough:
            for degrees in itertools.product(*options):
                found = self._with_degrees(group, size, items, degrees)
                if found is not None and found.value > best.value:
                    best = found
        else:
            for index, choices in enumerate(options):
                for tp in choices[1:]:  # down as long as it pays
                    degrees = (*best.degrees[:index], tp, *best.degrees[index + 1 :])
                    found = self._with_degrees(group, size, items, degrees)
                    if found is None or found.value <= best.value:
                        break
                    best = found
        return best

    def _score_as_upstream(self, group: int, size: int, items: Items) -> UnitScore | None:
        """One copy of each model over the whole mesh, with upstream's shares."""
        assert self.upstream is not None
        shares = []
        for model, part in items:
            name = self.upstream.part(self.loads[model].name, part)
            candidate = self.upstream.candidate(name, size)
            if candidate is None:
                return None
            shares.append(candidate.percent / 100)
        return self._with_shares(group, size, items, (size,) * len(items), tuple(shares))

    def _with_degrees(
        self, group: int, size: int, items: Items, degrees: Sequence[int]
    ) -> UnitScore | None:
        """The unit with given degrees. The shares of the compute are the smallest that each item
        needs; where something is refused and compute is left, all of it is given away.
        """
        shares = tuple(
            [self.share(group, size, tp, item) for tp, item in zip(degrees, items, strict=True)]
        )
        best = self._with_shares(group, size, items, degrees, shares)
        if best is not None and self.execution == "concurrent" and best.point.use >= 1.0:
            filled = filled_shares(shares)
            if filled != shares:
                found = self._with_shares(group, size, items, degrees, filled)
                if found is not None and found.value > best.value:
                    return found
        return best

    def _with_shares(
        self,
        group: int,
        size: int,
        items: Items,
        degrees: Sequence[int],
        shares: tuple[float, ...],
    ) -> UnitScore | None:
        curves = self.curves(group, size, items, degrees, shares)
        slow = slowdown(shares, self.execution)
        memory = self.cluster.groups[group].device.memory
        point = settle(curves, memory, self.execution, slow)
        if point is None:
            return None
        value = load = 0.0
        good = self._good(curves, point, items, slow) if self.objective == "slo" else None
        for index, (model, part) in enumerate(items):
            worth = self.loads[model].rate * part * self.weights[model]
            served = worth * point.fractions[index]
            load += worth
            if good is None or good[index]:
                value += served
            else:
                value += served * PARTIAL_WORTH
        value += SLACK_WORTH * load * (1.0 - point.use)
        return UnitScore(value, tuple(degrees), shares, point)

    def _good(
        self, curves: Sequence[BatchCurve], point: OperatingPoint, items: Items, slow: float
    ) -> list[bool]:
        """Whether each item is served in full within its targets."""
        if self.execution == "time_sliced":
            point = quiet_point(curves, point)
        found = []
        for (model, _), latency in zip(
            items, latencies(curves, point, self.execution, slow), strict=True
        ):
            slo = self.loads[model].slo
            met = latency is not None
            if latency is not None and slo.ttft is not None:
                met = met and latency.ttft <= slo.ttft
            if latency is not None and slo.tpot is not None:
                met = met and latency.tpot <= slo.tpot
            found.append(met)
        return found


def slowdown(shares: Sequence[float], execution: Execution) -> float:
    """By how much decodes are slowed whose shares of the compute add up to more than there is."""
    return max(1.0, sum(shares)) if execution == "concurrent" else 1.0


def filled_shares(least: Sequence[float]) -> tuple[float, ...]:
    """Shares that use the whole compute, in tenths: what is left is given in proportion."""
    total = sum(least)
    if total >= 1.0 - 1e-9:
        return tuple(least)
    tenths = [10 * share / total for share in least]
    shares = [max(int(t + 1e-9), round(10 * share)) for t, share in zip(tenths, least, strict=True)]
    order = sorted(range(len(shares)), key=lambda i: shares[i] - tenths[i])
    for i in itertools.islice(itertools.cycle(order), max(0, 10 - sum(shares))):
        shares[i] += 1
    return tuple([share / 10 for share in shares])
