"""When requests arrive: renewal processes along a rate that may change with time.

Gaps are drawn at a mean of one, Poisson's (exponential) or gamma distributed with any coefficient
of variation, and counted along the integral of the rate: where the rate is twice as high, the same
gaps take half the time. That gives Poisson and gamma arrivals at a constant rate, and bursts and
drifting popularity with rates that change in steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from muxjax.errors import WorkloadError

RateSteps: TypeAlias = Iterable[tuple[float, float]]
"""Pairs of a time (seconds, rising, the first 0) and the rate from then on."""

_GAPS = 256
"""Gaps drawn at a time."""


def power_law_rates(
    count: int, alpha: float, *, total: float | None = None, highest: float | None = None
) -> list[float]:
    """Rates that fall as the power `alpha` of a model's rank, as MuxServe's experiments have them.

    With `alpha` 0.9 a fifth of the models get half of the requests, with 2.1 nine tenths (Duan et
    al., ICML 2024, section 4.1).

    Args:
      count: models.
      alpha: 0 makes all rates equal.
      total: requests per second of all models together; or
      highest: of the most popular one.

    Raises:
      WorkloadError: a negative or non-finite argument, or not exactly one of the last two.
    """
    if count < 1:
        raise WorkloadError(f"rates for {count} models: there must be one at least")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise WorkloadError(f"alpha must not be negative, not {alpha}")
    if (total is None) == (highest is None):
        raise WorkloadError("give either the total rate or the highest")
    weights = [rank**-alpha for rank in range(1, count + 1)]
    if total is not None:
        scale = checked_rate(total, "the total rate") / sum(weights)
    else:
        assert highest is not None
        scale = checked_rate(highest, "the highest rate")
    return [scale * weight for weight in weights]


def checked_rate(rate: float, what: str) -> float:
    """The rate, if it is one.

    Raises:
      WorkloadError: it is negative or not finite.
    """
    if not (math.isfinite(rate) and rate >= 0):
        raise WorkloadError(f"{what} must be 0 or more requests a second, not {rate}")
    return rate


def renewal(rng: np.random.Generator, rate: RateSteps, cv: float = 1.0) -> Iterator[float]:
    """Arrival times, without end unless the rate stays 0.

    Args:
      rng: where the gaps come from.
      rate: requests per second, in steps.
      cv: coefficient of variation of the gaps at a constant rate: 1 is Poisson's, 0 a clock's,
        more is burstier.

    Raises:
      WorkloadError: a negative `cv` or rate.
    """
    if not (math.isfinite(cv) and cv >= 0):
        raise WorkloadError(f"cv must not be negative, not {cv}")
    steps = iter(rate)
    now, current = next(steps)
    checked_rate(current, "the rate")
    following = next(steps, None)
    for gap in _gaps(rng, cv):
        left = gap
        while True:
            end = math.inf if following is None else following[0]
            room = current * (end - now) if current else 0.0
            if left <= room:
                now += left / current
                break
            if following is None:
                return  # the rate stays 0
            left -= room
            now, current = following
            checked_rate(current, "the rate")
            following = next(steps, None)
        yield now


def _gaps(rng: np.random.Generator, cv: float) -> Iterator[float]:
    while True:
        if cv == 0:
            yield from itertools.repeat(1.0, _GAPS)
        elif cv == 1:
            yield from rng.standard_exponential(_GAPS).tolist()
        else:
            shape = cv**-2
            yield from (rng.standard_gamma(shape, _GAPS) / shape).tolist()


def on_off(
    rng: np.random.Generator, rate: float, on_seconds: float, off_seconds: float
) -> Iterator[tuple[float, float]]:
    """Bursts: phases of exponential length with requests and without, `rate` a second on average.

    Args:
      rng: where the lengths of the phases come from.
      rate: mean requests per second over all.
      on_seconds: mean length of a phase with requests.
      off_seconds: mean length of one without.

    Raises:
      WorkloadError: a phase of no length.
    """
    for what, seconds in (("on", on_seconds), ("off", off_seconds)):
        if not (math.isfinite(seconds) and seconds > 0):
            raise WorkloadError(f"the {what} phase must last more than 0 s, not {seconds}")
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
    """Popularity that drifts: at each change point the rates are dealt to the models anew.

    Returns:
      The rate steps of each model.

    Raises:
      WorkloadError: change points that do not rise from above 0.
    """
    if any(b <= a for a, b in itertools.pairwise([0.0, *change_points])):
        raise WorkloadError(f"change points must rise from above 0 s: {list(change_points)}")
    steps = [[(0.0, rate)] for rate in rates]
    for point in change_points:
        for index, source in enumerate(rng.permutation(len(rates)).tolist()):
            steps[index].append((point, rates[source]))
    return steps
