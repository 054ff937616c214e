from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxjax.scheduling.fair_share import EVEN_PART, MAX_CREDIT, FairShare, StepKey

A: StepKey = ("a", "decode")
B: StepKey = ("b", "decode")


def quotas(**needs: float) -> FairShare:
    made = FairShare(["a", "b"])
    everyone = dict.fromkeys(made.shares, 0.0)
    made.set_needs({**everyone, A: needs.get("a", 0.0), B: needs.get("b", 0.0)})
    return made


def run(
    time: FairShare, active: list[StepKey], steps: int, seconds: float = 0.01
) -> dict[StepKey, int]:
    """How often each gets a turn when the one furthest behind is next."""
    turns = dict.fromkeys(active, 0)
    for _ in range(steps):
        time.begin(active)
        turn = min(active, key=time.virtual)
        time.charge(turn, seconds)
        turns[turn] += 1
    return turns


def test_shares_follow_needs_with_an_even_part() -> None:
    time = quotas(a=3.0, b=1.0)
    assert time.shares[A] == pytest.approx(EVEN_PART / 4 + (1 - EVEN_PART) * 0.75)
    assert time.shares["b", "prefill"] == pytest.approx(EVEN_PART / 4)
    assert sum(time.shares.values()) == pytest.approx(1)


def test_without_needs_shares_are_even() -> None:
    assert set(quotas().shares.values()) == {0.25}


def test_use_follows_shares() -> None:
    time = quotas(a=3.0, b=1.0)
    turns = run(time, [A, B], 1000)
    assert turns[A] / turns[B] == pytest.approx(time.shares[A] / time.shares[B], rel=0.02)


def test_the_time_of_the_idle_goes_to_others_and_is_not_owed() -> None:
    time = quotas(a=1.0, b=1.0)
    run(time, [A], 500)
    turns = run(time, [A, B], 100)
    assert turns[A] == pytest.approx(50, abs=2)
    assert time.used[A] == pytest.approx(5.5, abs=0.02)


def test_debt_is_kept_until_the_others_have_caught_up() -> None:
    time = quotas(a=1.0, b=1.0)
    time.begin([A, B])
    time.charge(A, 1.0)
    time.begin([B])
    assert run(time, [A, B], 50) == {A: 0, B: 50}
    time.begin([A, B])
    assert time.credit(A) == pytest.approx(-0.25)
    assert time.credit(B) == pytest.approx(0.25)


def test_debt_ends_when_all_are_idle() -> None:
    time = quotas(a=1.0, b=1.0)
    time.begin([A, B])
    time.charge(A, 1.0)
    time.begin([A, B])
    time.begin([])
    turns = run(time, [A, B], 100)
    assert turns[A] == pytest.approx(50, abs=1)


def test_credit_of_one_who_is_held_back_is_bounded() -> None:
    time = quotas(a=1.0, b=1.0)
    for _ in range(1000):
        time.begin([A, B])
        time.charge(A, 0.1)
    time.begin([A, B])
    assert time.credit(B) <= 2 * MAX_CREDIT


def test_an_estimate_can_be_corrected() -> None:
    time = quotas(a=1.0, b=1.0)
    time.begin([A, B])
    time.charge(A, 0.5)
    time.charge(A, -0.4)
    assert time.used[A] == pytest.approx(0.1)
    assert time.virtual(A) == pytest.approx(0.1 / time.shares[A])


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
def test_sums_that_go_on_are_those_worked_out_anew(
    moves: list[tuple[set[StepKey], StepKey, float]],
) -> None:
    kept, anew = quotas(a=3.0, b=1.0), quotas(a=3.0, b=1.0)
    for active, turn, seconds in moves:
        line = sorted(active)
        for time in (kept, anew):
            time.begin(line)
            time.begin(line)
            time.charge(turn, seconds)
        anew._last = []  # as if others had had work
        for one in kept.shares:
            assert kept.credit(one) == pytest.approx(anew.credit(one), abs=1e-6)
            assert kept.virtual(one) == pytest.approx(anew.virtual(one), abs=1e-6)
