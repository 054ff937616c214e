"""Synthetic workloads: rates, arrivals and lengths of several models, from a seed.

Each model has random streams of its own for arrivals and lengths, so that another model, or
another rate of it, changes nothing for the first.
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
    checked_rate,
    drifting_rates,
    on_off,
    renewal,
)
from muxjax.placement.workload.lengths import Lengths, LogNormal
from muxjax.placement.workload.trace import Faster, First, TraceRequest, Workload


@dataclass(frozen=True)
class Traffic:
    """What is asked of one model.

    Attributes:
      name: the model.
      rate: requests per second.
      lengths: of prompts and outputs.

    Raises:
      WorkloadError: a rate that is negative or not finite.
    """

    name: str
    rate: float
    lengths: Lengths = field(default_factory=LogNormal)

    def __post_init__(self) -> None:
        checked_rate(self.rate, f"{self.name}: the rate")


@dataclass(frozen=True)
class Arrivals:
    """How the requests of a model are spread over time.

    Attributes:
      cv: coefficient of variation of the gaps: 1 is Poisson's, more is burstier, 0 a clock's.
      on_off: mean seconds of phases with requests and without; None: no such phases.
      change_points: seconds at which the models' rates are dealt anew.

    Raises:
      WorkloadError: bursts and drift at once.
    """

    cv: float = 1.0
    on_off: tuple[float, float] | None = None
    change_points: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.on_off and self.change_points:
            raise WorkloadError("on/off phases and change points cannot be combined")


@dataclass(frozen=True)
class Synthetic:
    """Requests of several models, until `seconds` or `count` are reached.

    Attributes:
      loads: the models.
      seconds: length of the workload.
      count: requests in all. If both are given, whichever comes first.
      arrivals: how they are spread.
      seed: the same gives the same requests.

    Raises:
      WorkloadError: no end, no requests to wait for.
    """

    loads: Sequence[Traffic]
    seconds: float | None = None
    count: int | None = None
    arrivals: Arrivals = field(default_factory=Arrivals)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seconds is None and self.count is None:
            raise WorkloadError("a synthetic workload needs a duration or a number of requests")
        if not any(load.rate for load in self.loads):
            raise WorkloadError("all rates are 0: there is nothing to do")

    def __iter__(self) -> Iterator[TraceRequest]:
        streams = [self._requests(index) for index in range(len(self.loads))]
        merged = heapq.merge(*streams, key=attrgetter("arrival"))
        yield from First(_Once(merged), self.count, self.seconds)

    def _requests(self, index: int) -> Iterator[TraceRequest]:
        load = self.loads[index]
        # Two streams, so that lengths do not depend on how many gaps were drawn.
        gaps, lengths = (np.random.default_rng([self.seed, index, kind]) for kind in (0, 1))
        times = renewal(gaps, self._rate(index, gaps), self.arrivals.cv)
        for arrival, (prompt, output) in zip(times, load.lengths.draw(lengths), strict=False):
            if self.seconds is not None and arrival > self.seconds:
                return
            yield TraceRequest(arrival, load.name, prompt, output)

    def _rate(self, index: int, rng: np.random.Generator) -> RateSteps:
        rate = self.loads[index].rate
        if self.arrivals.on_off:
            return on_off(rng, rate, *self.arrivals.on_off)
        if self.arrivals.change_points:
            rates = [load.rate for load in self.loads]
            dealer = np.random.default_rng([self.seed, len(rates), 2])
            return drifting_rates(rates, self.arrivals.change_points, dealer)[index]
        return [(0.0, rate)]


def at_rate(workload: Workload, factor: float) -> Workload:
    """A workload at another rate: a synthetic one with its rates multiplied and as long as before,
    a trace with its requests closer together.

    Raises:
      WorkloadError: a factor that is not above 0.
    """
    if not isinstance(workload, Synthetic):
        return Faster(workload, factor)
    if not (math.isfinite(factor) and factor > 0):
        raise WorkloadError(f"a rate scale must be above 0, not {factor}")
    loads = [replace(load, rate=factor * load.rate) for load in workload.loads]
    return replace(workload, loads=loads)


@dataclass(frozen=True)
class _Once:
    """What `First` takes, around an iterator."""

    requests: Iterator[TraceRequest]

    def __iter__(self) -> Iterator[TraceRequest]:
        return self.requests


@dataclass(frozen=True)
class Assigned:
    """A trace whose requests are given to a fleet's models.

    A request that names a model of the fleet keeps it; one that names none gets one at random, in
    proportion to the weights. Production traces often come without models or with a few only.

    Attributes:
      workload: the trace.
      weights: of each model of the fleet, its rate say.
      renamed: models of the fleet for names that only the trace knows.
      seed: for the draws.

    Raises:
      WorkloadError: while iterating: a name that is neither in the fleet nor in `renamed`.
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
                    f"{source} cannot be mapped to {target}: the fleet has no such model, it has "
                    f"{known}"
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
                    f"the trace asks for {name}, which the fleet does not have; it has "
                    f"{', '.join(names)}: map it to one of them (--map {name}=MODEL)"
                )
            yield request if name == request.model else replace(request, model=name)
