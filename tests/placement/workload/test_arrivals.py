from __future__ import annotations

import itertools
import math
from itertools import islice

import numpy as np
import pytest

from muxjax.errors import WorkloadError
from muxjax.placement.workload.arrivals import (
    drifting_rates,
    on_off_rate,
    power_law_rates,
    renewal_arrivals,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def gaps(cv: float, rate: float = 2.0, count: int = 20_000) -> np.ndarray:
    return np.diff(list(islice(renewal_arrivals(rng(), [(0.0, rate)], cv), count)))


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 4.0])
def test_gaps_have_the_requested_mean_and_variation(cv: float) -> None:
    drawn = gaps(cv)
    assert drawn.mean() == pytest.approx(0.5, rel=0.1)
    assert drawn.std() / drawn.mean() == pytest.approx(cv, rel=0.1, abs=1e-9)


def test_arrivals_follow_a_changing_rate() -> None:
    times = list(renewal_arrivals(rng(), [(0.0, 10.0), (100.0, 0.0), (150.0, 40.0), (250.0, 0.0)]))
    counts = np.histogram(times, [0, 100, 150, 250])[0]
    assert counts[0] == pytest.approx(1000, rel=0.15)
    assert counts[1] == 0
    assert counts[2] == pytest.approx(4000, rel=0.1)


def test_a_rate_of_zero_has_no_arrivals() -> None:
    assert list(renewal_arrivals(rng(), [(0.0, 0.0)])) == []
    assert list(renewal_arrivals(rng(), on_off_rate(rng(), 0.0, 1.0, 1.0))) == []


def test_on_off_phases_keep_the_mean_rate() -> None:
    phases = list(islice(on_off_rate(rng(), 2.0, 5.0, 15.0), 2000))
    assert {rate for _, rate in phases} == {0.0, 8.0}
    end = phases[-1][0]
    busy = sum(b[0] - a[0] for a, b in itertools.pairwise(phases) if a[1])
    assert busy / end == pytest.approx(0.25, rel=0.1)


def test_change_points_permute_the_rates() -> None:
    steps = drifting_rates([8.0, 4.0, 2.0, 1.0], [10.0, 20.0], rng(1))
    assert [time for time, _ in steps[0]] == [0.0, 10.0, 20.0]
    for index in range(3):
        assert sorted(model[index][1] for model in steps) == [1.0, 2.0, 4.0, 8.0]
    assert len({tuple(model[index][1] for model in steps) for index in range(3)}) > 1


def test_power_law_rates_have_the_skew_of_the_paper() -> None:
    def top_fifth(alpha: float) -> float:
        rates = power_law_rates(20, alpha, total=1.0)
        return sum(rates[:4])

    # Duan et al., section 4.1: 20 % of the models get 50 % of the requests, or 90 %.
    assert top_fifth(0.9) == pytest.approx(0.5, abs=0.05)
    assert top_fifth(2.1) == pytest.approx(0.9, abs=0.05)
    assert power_law_rates(3, 1.0, highest=6.0) == pytest.approx([6.0, 3.0, 2.0])
    assert power_law_rates(3, 0.0, total=6.0) == pytest.approx([2.0, 2.0, 2.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: power_law_rates(2, -1.0, total=1.0), "alpha must be 0 or more"),
        (lambda: power_law_rates(2, 1.0), "specify either the total rate or the highest"),
        (lambda: power_law_rates(2, 1.0, total=math.nan), "the total rate must be"),
        (lambda: power_law_rates(0, 1.0, total=1.0), "at least"),
        (lambda: next(renewal_arrivals(rng(), [(0.0, -1.0)])), "rate must be 0 or more"),
        (lambda: next(renewal_arrivals(rng(), [(0.0, 1.0)], -1.0)), "cv must be 0 or more"),
        (lambda: next(on_off_rate(rng(), 1.0, 0.0, 1.0)), "on phase must last"),
        (lambda: drifting_rates([1.0], [5.0, 5.0], rng()), "must ascend"),
    ],
)
def test_invalid_arguments_raise(call: object, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        call()  # type: ignore[operator]
