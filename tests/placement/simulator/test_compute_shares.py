from __future__ import annotations

import pytest

from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.scheduling.fair_share import StepKey

SHARES = ComputeShares(
    {("a", "prefill"): 1.0, ("a", "decode"): 0.3, ("b", "prefill"): 0.9, ("b", "decode"): 0.5}
)


def test_programs_fit_until_the_overlap_is_used_up() -> None:
    assert SHARES.fits(("a", "prefill"), [])
    assert not SHARES.fits(("a", "decode"), [("a", "prefill")])
    assert SHARES.fits(("a", "decode"), [("b", "prefill")])
    assert not SHARES.fits(("b", "decode"), [("b", "prefill")])
    assert SHARES.fits(("b", "decode"), [("a", "decode")])
    assert SHARES["b", "decode"] == 0.5


def test_a_program_runs_once_at_a_time() -> None:
    assert not SHARES.fits(("a", "decode"), [("a", "decode")])


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_is_a_part_of_the_chip(share: float) -> None:
    with pytest.raises(ValueError, match="the decode share must be"):
        ComputeShares({("a", "decode"): share})


def test_what_the_idle_leave_is_lent_to_those_that_work() -> None:
    a: StepKey
    b: StepKey
    c: StepKey
    a, b, c = ("a", "decode"), ("b", "decode"), ("c", "decode")
    shares = ComputeShares({a: 0.5, b: 0.3, c: 0.2})
    assert shares.taken(a) == 0.5
    shares.lend(a, [], [a, b])  # c is idle
    assert shares.taken(a) == pytest.approx(0.5 / 0.8)
    shares.lend(b, [a], [a, b])
    assert shares.taken(b) == pytest.approx(0.3 / 0.8)
    # The owner takes its own beside those that have borrowed, and lends nothing of theirs.
    shares.lend(c, [a, b], [a, b, c])
    assert shares.taken(c) == 0.2
    shares.lend(a, [b, c], [a, b, c])
    assert shares.taken(a) == 0.5
    assert shares[a] == 0.5  # whether a program fits goes by what is its own
