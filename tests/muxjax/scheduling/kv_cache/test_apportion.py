from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxjax.scheduling.kv_cache.apportion import apportion


def test_the_largest_remainder_gets_the_rest() -> None:
    assert apportion(10, [1.0, 1.0, 1.0], [0, 0, 0]) == [4, 3, 3]
    assert apportion(10, [5.4, 4.6], [0, 0]) == [5, 5]


def test_minima_lower_the_other_parts() -> None:
    assert apportion(10, [98.0, 1.0, 1.0], [0, 3, 2]) == [5, 3, 2]


def test_zero_weights_count_as_equal_and_no_weights_get_nothing() -> None:
    assert apportion(4, [0.0, 0.0], [0, 0]) == [2, 2]
    assert apportion(4, [], []) == []


@given(
    total=st.integers(0, 1000),
    parts=st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 30)), min_size=1, max_size=8),
)
def test_apportion_sums_up_and_keeps_minima(total, parts) -> None:
    weights, minima = [w for w, _ in parts], [m for _, m in parts]
    if sum(minima) > total:
        with pytest.raises(ValueError, match="exceed"):
            apportion(total, weights, minima)
        return
    shares = apportion(total, weights, minima)
    assert sum(shares) == total
    assert all(share >= least for share, least in zip(shares, minima, strict=True))
    if not any(minima) and any(weights):
        for share, weight in zip(shares, weights, strict=True):
            assert share == pytest.approx(total * weight / sum(weights), abs=1 + 1e-6)
