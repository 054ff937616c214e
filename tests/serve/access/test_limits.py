"""Rate limits are exact, checked with a manual clock."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxjax.serve.access.keys import Key
from muxjax.serve.access.limits import WINDOW, KeyLimits, Reservation, SlidingWindow
from muxjax.serve.errors import ApiError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key_limits(clock: Clock, **fields: int) -> KeyLimits:
    return KeyLimits(Key.model_validate({"name": "a", "sha256": "0" * 64, **fields}), clock)


def refused(call: object, *arguments: int) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value


def test_requests_per_minute_are_limited() -> None:
    clock = Clock()
    limits = key_limits(clock, requests_per_minute=5)
    for _ in range(5):
        limits.enter()
        limits.leave()
        clock.now += 1
    error = refused(limits.enter)
    assert (error.status, error.headers) == (429, {"retry-after": "55"})
    clock.now = 1000.0 + WINDOW - 1e-3
    assert refused(limits.enter).headers == {"retry-after": "1"}
    clock.now = 1000.0 + WINDOW
    limits.enter()
    assert refused(limits.enter).status == 429


def test_concurrent_calls_are_limited() -> None:
    limits = key_limits(Clock(), concurrency=2)
    limits.enter()
    limits.enter()
    assert refused(limits.enter).status == 429
    limits.leave()
    limits.enter()
    assert limits.running == 2


def test_tokens_are_reserved_and_refunded() -> None:
    clock = Clock()
    limits = key_limits(clock, tokens_per_minute=100)
    first = limits.reserve(60)
    limits.reserve(40)
    assert refused(limits.reserve, 1).headers == {"retry-after": "60"}
    limits.refund(first, 10)
    limits.reserve(10)
    assert refused(limits.reserve, 1).status == 429
    too_long = refused(limits.reserve, 101)
    assert (too_long.status, too_long.param) == (400, "max_tokens")
    clock.now += WINDOW
    limits.refund(first, 50)  # has expired, so nothing is refunded
    limits.reserve(100)
    assert refused(limits.reserve, 1).status == 429


def test_without_limits_nothing_is_reserved() -> None:
    limits = key_limits(Clock())
    for _ in range(1000):
        limits.enter()
    assert limits.reserve(10**9) is None
    limits.refund(None, 5)


@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 12), st.integers(0, 12)), max_size=60),
)
def test_no_interval_of_a_minute_exceeds_the_limit(
    limit: int, steps: list[tuple[float, int, int]]
) -> None:
    clock = Clock()
    window = SlidingWindow(limit, clock)
    reservations: list[Reservation] = []
    for wait, units, refund in steps:
        clock.now += wait
        result = window.reserve(units)
        if isinstance(result, Reservation):
            reservations.append(result)
            window.refund(result, min(refund, units))
        elif math.isinf(result):
            assert units > limit
        else:
            # The units are available after the returned time, apart from rounding.
            clock.now += result + 1e-6
            reservation = window.reserve(units)
            assert isinstance(reservation, Reservation)
            reservations.append(reservation)
    for start in {reservation.time for reservation in reservations}:
        units = sum(item.units for item in reservations if 0 <= item.time - start < WINDOW)
        assert units <= limit
