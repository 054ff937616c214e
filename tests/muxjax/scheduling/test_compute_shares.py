from __future__ import annotations

import pytest

from muxjax.scheduling.compute_shares import ComputeShares

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
