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


def test_a_key_does_not_fit_twice() -> None:
    assert not SHARES.fits(("a", "decode"), [("a", "decode")])


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_outside_its_range_raises(share: float) -> None:
    with pytest.raises(ValueError, match="the decode share must be"):
        ComputeShares({("a", "decode"): share})


def test_idle_shares_are_lent_to_active_keys() -> None:
    a: StepKey
    b: StepKey
    c: StepKey
    a, b, c = ("a", "decode"), ("b", "decode"), ("c", "decode")
    shares = ComputeShares({a: 0.5, b: 0.3, c: 0.2})
    assert shares.allocated(a) == 0.5
    shares.lend(a, [], [a, b])  # c is idle
    assert shares.allocated(a) == pytest.approx(0.5 / 0.8)
    shares.lend(b, [a], [a, b])
    assert shares.allocated(b) == pytest.approx(0.3 / 0.8)
    # The owner gets its share back, although the borrowers still run.
    shares.lend(c, [a, b], [a, b, c])
    assert shares.allocated(c) == 0.2
    shares.lend(a, [b, c], [a, b, c])
    assert shares.allocated(a) == 0.5
    assert shares[a] == 0.5  # `fits` ignores lent shares
