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


def limits(clock: Clock, **more: int) -> KeyLimits:
    return KeyLimits(Key.model_validate({"name": "a", "sha256": "0" * 64, **more}), clock)


def refused(call: object, *arguments: int) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value


def test_requests_per_minute() -> None:
    clock = Clock()
    held = limits(clock, requests_per_minute=5)
    for _ in range(5):
        held.enter()
        held.leave()
        clock.now += 1
    error = refused(held.enter)
    assert (error.status, error.headers) == (429, {"retry-after": "55"})
    clock.now = 1000.0 + WINDOW - 1e-3
    assert refused(held.enter).headers == {"retry-after": "1"}
    clock.now = 1000.0 + WINDOW
    held.enter()
    assert refused(held.enter).status == 429


def test_concurrent_calls() -> None:
    held = limits(Clock(), concurrency=2)
    held.enter()
    held.enter()
    assert refused(held.enter).status == 429
    held.leave()
    held.enter()
    assert held.running == 2


def test_tokens_are_reserved_and_given_back() -> None:
    clock = Clock()
    held = limits(clock, tokens_per_minute=100)
    first = held.reserve(60)
    held.reserve(40)
    assert refused(held.reserve, 1).headers == {"retry-after": "60"}
    held.give_back(first, 10)
    held.reserve(10)
    assert refused(held.reserve, 1).status == 429
    too_long = refused(held.reserve, 101)
    assert (too_long.status, too_long.param) == (400, "max_tokens")
    clock.now += WINDOW
    held.give_back(first, 50)  # has expired, so nothing is given back
    held.reserve(100)
    assert refused(held.reserve, 1).status == 429


def test_without_limits_nothing_is_reserved() -> None:
    held = limits(Clock())
    for _ in range(1000):
        held.enter()
    assert held.reserve(10**9) is None
    held.give_back(None, 5)


@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 12), st.integers(0, 12)), max_size=60),
)
def test_no_minute_holds_more_than_the_limit(
    limit: int, steps: list[tuple[float, int, int]]
) -> None:
    clock = Clock()
    window = SlidingWindow(limit, clock)
    taken: list[Reservation] = []
    for wait, units, back in steps:
        clock.now += wait
        found = window.reserve(units)
        if isinstance(found, Reservation):
            taken.append(found)
            window.give_back(found, min(back, units))
        elif math.isinf(found):
            assert units > limit
        else:
            # After that time the units are available, apart from rounding.
            clock.now += found + 1e-6
            again = window.reserve(units)
            assert isinstance(again, Reservation)
            taken.append(again)
    for start in {one.time for one in taken}:
        within = sum(one.units for one in taken if 0 <= one.time - start < WINDOW)
        assert within <= limit
