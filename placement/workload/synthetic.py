"""Synthetic workloads of several models, generated from rates, distributions and a seed.

Each model has separate random streams for arrivals and lengths, so the requests of a model do not
depend on other models or their rates.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

import numpy as np

from muxjax.errors import WorkloadError
from muxjax.placement.workload.arrivals import (
    RateSteps,
    drifting_rates,
    on_off_rate,
    renewal_arrivals,
    validate_rate,
)
from muxjax.placement.workload.lengths import Lengths, LogNormal
from muxjax.placement.workload.trace import ScaledWorkload, TraceRequest, Workload, truncate


@dataclass(frozen=True)
class Traffic:
    """Request rate and length distribution of one model.

    Attributes:
      name: the model.
      rate: requests per second.
      lengths: distribution of prompt and output lengths.

    Raises:
      WorkloadError: a rate that is negative or not finite.
    """

    name: str
    rate: float
    lengths: Lengths = field(default_factory=LogNormal)

    def __post_init__(self) -> None:
        validate_rate(self.rate, f"{self.name}: the rate")


@dataclass(frozen=True)
class ArrivalProcess:
    """The distribution of a model's requests over time.

    Attributes:
      cv: coefficient of variation of the gaps: 1 is Poisson, higher is burstier, 0 is periodic.
      on_off: mean seconds of phases with and without requests; None: no phases.
      change_points: times in seconds at which the rates are permuted among the models.

    Raises:
      WorkloadError: both on/off phases and change points.
    """

    cv: float = 1.0
    on_off: tuple[float, float] | None = None
    change_points: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.on_off and self.change_points:
            raise WorkloadError("on/off phases and change points cannot be combined")


@dataclass(frozen=True)
class SyntheticWorkload:
    """Requests of several models until `seconds` or `count` is reached, whichever is first.

    Attributes:
      loads: traffic of each model.
      seconds: length of the workload; None: limited by `count`.
      count: number of requests; None: limited by `seconds`.
      arrivals: arrival process of every model.
      seed: seed of the requests; equal seeds generate equal requests.

    Raises:
      WorkloadError: neither `seconds` nor `count` is set, or no rate is above 0.
    """

    loads: Sequence[Traffic]
    seconds: float | None = None
    count: int | None = None
    arrivals: ArrivalProcess = field(default_factory=ArrivalProcess)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seconds is None and self.count is None:
            raise WorkloadError("a synthetic workload needs a duration or a number of requests")
        if not any(load.rate for load in self.loads):
            raise WorkloadError("all rates are 0: the workload would have no requests")

    def __iter__(self) -> Iterator[TraceRequest]:
        streams = [self._requests(index) for index in range(len(self.loads))]
        merged = heapq.merge(*streams, key=attrgetter("arrival"))
        yield from truncate(merged, self.count, self.seconds)

    def _requests(self, index: int) -> Iterator[TraceRequest]:
        load = self.loads[index]
        # With two streams, lengths do not depend on the number of drawn gaps.
        gaps, lengths = (np.random.default_rng([self.seed, index, kind]) for kind in (0, 1))
        times = renewal_arrivals(gaps, self._rate(index, gaps), self.arrivals.cv)
        for arrival, (prompt, output) in zip(times, load.lengths.draw(lengths), strict=False):
            if self.seconds is not None and arrival > self.seconds:
                return
            yield TraceRequest(arrival, load.name, prompt, output)

    def _rate(self, index: int, rng: np.random.Generator) -> RateSteps:
        rate = self.loads[index].rate
        if self.arrivals.on_off:
            return on_off_rate(rng, rate, *self.arrivals.on_off)
        if self.arrivals.change_points:
            rates = [load.rate for load in self.loads]
            permutations = np.random.default_rng([self.seed, len(rates), 2])
            return drifting_rates(rates, self.arrivals.change_points, permutations)[index]
        return [(0.0, rate)]


def scale_rate(workload: Workload, factor: float) -> Workload:
    """Multiplies the rate of a workload.

    A synthetic workload keeps its length and gets more requests. A trace keeps its requests and
    gets shorter gaps.

    Raises:
      WorkloadError: a factor that is not above 0.
    """
    if not isinstance(workload, SyntheticWorkload):
        return ScaledWorkload(workload, factor)
    if not (math.isfinite(factor) and factor > 0):
        raise WorkloadError(f"a rate scale must be above 0, not {factor}")
    loads = [replace(load, rate=factor * load.rate) for load in workload.loads]
    return replace(workload, loads=loads)


@dataclass(frozen=True)
class AssignedWorkload:
    """A trace whose requests are assigned to the models of a fleet.

    Requests for a model of the fleet keep it. Requests without a model, as in most production
    traces, are assigned one at random, in proportion to the weights.

    Attributes:
      workload: the trace.
      weights: relative request rate of each model of the fleet.
      renamed: fleet models by their names in the trace.
      seed: seed of the random assignment.

    Raises:
      WorkloadError: a target of `renamed` is not in the fleet. While iterating: a name is neither
        in the fleet nor in `renamed`.
    """

    workload: Workload
    weights: Mapping[str, float]
    renamed: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for source, target in self.renamed.items():
            if target not in self.weights:
                known = ", ".join(self.weights)
                raise WorkloadError(
                    f"{source} cannot be mapped to {target}: the fleet has no model {target}; it "
                    f"has {known}"
                )

    def __iter__(self) -> Iterator[TraceRequest]:
        rng = np.random.default_rng([self.seed, 3])
        names = list(self.weights)
        total = sum(self.weights.values())
        shares = [weight / total for weight in self.weights.values()] if total else None
        drawn: list[int] = []
        for request in self.workload:
            name = self.renamed.get(request.model, request.model)
            if not name:
                if not drawn:
                    drawn = rng.choice(len(names), size=256, p=shares).tolist()
                name = names[drawn.pop()]
            elif name not in self.weights:
                raise WorkloadError(
                    f"the trace has requests for {name}, which is not in the fleet; map it to one "
                    f"of {', '.join(names)} (--map {name}=MODEL)"
                )
            yield request if name == request.model else replace(request, model=name)
