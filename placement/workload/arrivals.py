"""Arrival times of requests: renewal processes with a rate that may change over time.

Gaps with a mean of 1 are drawn from an exponential distribution (Poisson arrivals), or from a gamma
distribution with any coefficient of variation. Each gap is a distance along the integral of the
rate: at twice the rate, a gap takes half the time. Rates that change in steps produce bursts and
drifting popularity.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from muxjax.errors import WorkloadError

type RateSteps = Iterable[tuple[float, float]]
"""Pairs of a start time (seconds, ascending, the first 0) and the rate from that time."""

_GAPS_PER_DRAW = 256


def power_law_rates(
    count: int, alpha: float, *, total: float | None = None, highest: float | None = None
) -> list[float]:
    """Rates proportional to `rank ** -alpha`, as in MuxServe's experiments, descending.

    With `alpha` 0.9, 20 % of the models receive 50 % of the requests; with 2.1, 90 % (Duan et al.,
    ICML 2024, section 4.1).

    Args:
      count: number of models.
      alpha: 0 or more; 0 makes all rates equal.
      total: requests per second of all models together. Exactly one of `total` and `highest` must
        be given.
      highest: requests per second of the most popular model.

    Raises:
      WorkloadError: a negative or non-finite argument, or both or none of `total` and `highest`.
    """
    if count < 1:
        raise WorkloadError(f"the number of models must be at least 1, not {count}")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise WorkloadError(f"alpha must be 0 or more, not {alpha}")
    if (total is None) == (highest is None):
        raise WorkloadError("specify either the total rate or the highest rate")
    weights = [rank**-alpha for rank in range(1, count + 1)]
    if total is not None:
        scale = validate_rate(total, "the total rate") / sum(weights)
    else:
        assert highest is not None
        scale = validate_rate(highest, "the highest rate")
    return [scale * weight for weight in weights]


def validate_rate(rate: float, subject: str) -> float:
    """Validates a rate and returns it unchanged.

    Args:
      rate: requests per second.
      subject: start of the error message, for example "the total rate".

    Raises:
      WorkloadError: a negative or non-finite rate.
    """
    if not (math.isfinite(rate) and rate >= 0):
        raise WorkloadError(f"{subject} must be 0 or more requests per second, not {rate}")
    return rate


def renewal_arrivals(rng: np.random.Generator, rate: RateSteps, cv: float = 1.0) -> Iterator[float]:
    """Generates arrival times in seconds, without end unless the last rate is 0.

    Args:
      rng: source of the gaps.
      rate: requests per second, in steps.
      cv: coefficient of variation of the gaps at a constant rate: 1 is Poisson, 0 is periodic,
        higher is burstier.

    Raises:
      WorkloadError: a negative `cv` or rate.
    """
    if not (math.isfinite(cv) and cv >= 0):
        raise WorkloadError(f"cv must be 0 or more, not {cv}")
    steps = iter(rate)
    now, current = next(steps)
    validate_rate(current, "the rate")
    following = next(steps, None)
    for gap in _gaps(rng, cv):
        remaining = gap
        while True:
            end = math.inf if following is None else following[0]
            step_length = current * (end - now) if current else 0.0
            if remaining <= step_length:
                now += remaining / current
                break
            if following is None:
                return  # the rate stays 0
            remaining -= step_length
            now, current = following
            validate_rate(current, "the rate")
            following = next(steps, None)
        yield now


def _gaps(rng: np.random.Generator, cv: float) -> Iterator[float]:
    while True:
        if cv == 0:
            yield from itertools.repeat(1.0, _GAPS_PER_DRAW)
        elif cv == 1:
            yield from rng.standard_exponential(_GAPS_PER_DRAW).tolist()
        else:
            shape = cv**-2
            yield from (rng.standard_gamma(shape, _GAPS_PER_DRAW) / shape).tolist()


def on_off_rate(
    rng: np.random.Generator, rate: float, on_seconds: float, off_seconds: float
) -> Iterator[tuple[float, float]]:
    """Generates the rate steps of bursts: on and off phases with exponentially distributed lengths.

    Args:
      rng: source of the phase lengths.
      rate: mean requests per second over all phases.
      on_seconds: mean length of a phase with requests.
      off_seconds: mean length of a phase without requests.

    Raises:
      WorkloadError: a phase length that is not above 0.
    """
    for phase, seconds in (("on", on_seconds), ("off", off_seconds)):
        if not (math.isfinite(seconds) and seconds > 0):
            raise WorkloadError(f"the {phase} phase must last more than 0 s, not {seconds}")
    busy = on_seconds / (on_seconds + off_seconds)
    if rate == 0:
        yield 0.0, 0.0
        return
    on = bool(rng.random() < busy)
    now = 0.0
    while True:
        yield now, rate / busy if on else 0.0
        now += float(rng.exponential(on_seconds if on else off_seconds))
        on = not on


def drifting_rates(
    rates: Sequence[float], change_points: Sequence[float], rng: np.random.Generator
) -> list[list[tuple[float, float]]]:
    """Permutes the rates among the models at each change point (drifting popularity).

    Args:
      rates: requests per second of each model at the start.
      change_points: seconds, ascending, above 0.
      rng: source of the permutations.

    Returns:
      The rate steps of each model.

    Raises:
      WorkloadError: change points that do not ascend, or are not above 0.
    """
    if any(b <= a for a, b in itertools.pairwise([0.0, *change_points])):
        raise WorkloadError(f"change points must ascend from above 0 s: {list(change_points)}")
    steps = [[(0.0, rate)] for rate in rates]
    for point in change_points:
        for index, source in enumerate(rng.permutation(len(rates)).tolist()):
            steps[index].append((point, rates[source]))
    return steps
