from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxjax.scheduling.fair_share import EVEN_PART, MAX_CREDIT, FairShare, StepKey

A: StepKey = ("a", "decode")
B: StepKey = ("b", "decode")


def fair_share(**demand: float) -> FairShare:
    created = FairShare(["a", "b"])
    zero = dict.fromkeys(created.shares, 0.0)
    created.set_demand({**zero, A: demand.get("a", 0.0), B: demand.get("b", 0.0)})
    return created


def run(
    time: FairShare, active: list[StepKey], steps: int, seconds: float = 0.01
) -> dict[StepKey, int]:
    """Steps of each key when the key furthest behind runs next."""
    counts = dict.fromkeys(active, 0)
    for _ in range(steps):
        time.set_active(active)
        key = min(active, key=time.virtual_time)
        time.charge(key, seconds)
        counts[key] += 1
    return counts


def test_shares_follow_demand_with_an_even_part() -> None:
    time = fair_share(a=3.0, b=1.0)
    assert time.shares[A] == pytest.approx(EVEN_PART / 4 + (1 - EVEN_PART) * 0.75)
    assert time.shares["b", "prefill"] == pytest.approx(EVEN_PART / 4)
    assert sum(time.shares.values()) == pytest.approx(1)


def test_without_demand_shares_are_even() -> None:
    assert set(fair_share().shares.values()) == {0.25}


def test_use_follows_shares() -> None:
    time = fair_share(a=3.0, b=1.0)
    counts = run(time, [A, B], 1000)
    assert counts[A] / counts[B] == pytest.approx(time.shares[A] / time.shares[B], rel=0.02)


def test_idle_keys_earn_no_credit() -> None:
    time = fair_share(a=1.0, b=1.0)
    run(time, [A], 500)
    counts = run(time, [A, B], 100)
    assert counts[A] == pytest.approx(50, abs=2)
    assert time.used[A] == pytest.approx(5.5, abs=0.02)


def test_debt_is_kept_until_the_others_have_caught_up() -> None:
    time = fair_share(a=1.0, b=1.0)
    time.set_active([A, B])
    time.charge(A, 1.0)
    time.set_active([B])
    assert run(time, [A, B], 50) == {A: 0, B: 50}
    time.set_active([A, B])
    assert time.credit(A) == pytest.approx(-0.25)
    assert time.credit(B) == pytest.approx(0.25)


def test_debt_ends_when_all_are_idle() -> None:
    time = fair_share(a=1.0, b=1.0)
    time.set_active([A, B])
    time.charge(A, 1.0)
    time.set_active([A, B])
    time.set_active([])
    counts = run(time, [A, B], 100)
    assert counts[A] == pytest.approx(50, abs=1)


def test_credit_is_bounded() -> None:
    time = fair_share(a=1.0, b=1.0)
    for _ in range(1000):
        time.set_active([A, B])
        time.charge(A, 0.1)
    time.set_active([A, B])
    assert time.credit(B) <= 2 * MAX_CREDIT


def test_an_estimate_can_be_corrected() -> None:
    time = fair_share(a=1.0, b=1.0)
    time.set_active([A, B])
    time.charge(A, 0.5)
    time.charge(A, -0.4)
    assert time.used[A] == pytest.approx(0.1)
    assert time.virtual_time(A) == pytest.approx(0.1 / time.shares[A])


@given(
    st.lists(
        st.tuples(
            st.sets(st.sampled_from([A, B, ("a", "prefill"), ("b", "prefill")])),
            st.sampled_from([A, B, ("a", "prefill")]),
            st.floats(-0.5, 5.0),
        ),
        max_size=40,
    )
)
def test_cached_sums_equal_recomputed_sums(
    moves: list[tuple[set[StepKey], StepKey, float]],
) -> None:
    kept, fresh = fair_share(a=3.0, b=1.0), fair_share(a=3.0, b=1.0)
    for active, key, seconds in moves:
        keys = sorted(active)
        for time in (kept, fresh):
            time.set_active(keys)
            time.set_active(keys)
            time.charge(key, seconds)
        fresh._active_list = []  # forget the sums
        for key in kept.shares:
            assert kept.credit(key) == pytest.approx(fresh.credit(key), abs=1e-6)
            assert kept.virtual_time(key) == pytest.approx(fresh.virtual_time(key), abs=1e-6)
