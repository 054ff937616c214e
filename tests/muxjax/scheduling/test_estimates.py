from __future__ import annotations

import pytest

from muxjax.scheduling.estimates import StepEstimates


def test_guesses_until_measured() -> None:
    estimates = StepEstimates(["a"], prefill_seconds=0.001, decode_seconds=0.01)
    assert estimates.prefill("a", 100) == pytest.approx(0.1)
    assert estimates.decode("a", 4, 3) == pytest.approx(0.03)


def test_the_first_measurement_replaces_the_guess_and_later_ones_are_averaged() -> None:
    estimates = StepEstimates(["a", "b"])
    estimates.observe_prefill("a", 100, 2.0)
    assert estimates.prefill("a", 100) == pytest.approx(2.0)
    estimates.observe_prefill("a", 100, 3.0)
    assert estimates.prefill("a", 100) == pytest.approx(2.2)
    assert estimates.prefill("b", 100) == pytest.approx(0.05)


def test_unmeasured_size_uses_the_nearest_bucket() -> None:
    estimates = StepEstimates(["a"])
    estimates.observe_decode("a", 1, 10, 0.1)
    estimates.observe_decode("a", 16, 10, 0.4)
    assert estimates.decode("a", 2) == pytest.approx(0.01)
    assert estimates.decode("a", 9) == pytest.approx(0.04)
    assert estimates.decode("a", 100) == pytest.approx(0.04)
    # Prefill is kept per token, so that other sizes scale.
    estimates.observe_prefill("a", 64, 0.64)
    assert estimates.prefill("a", 8) == pytest.approx(0.08)


def test_estimates_of_zero_measurements_are_positive() -> None:
    estimates = StepEstimates(["a"])
    estimates.observe_prefill("a", 64, 0.0)
    estimates.observe_decode("a", 4, 8, 0.0)
    assert 0 < estimates.prefill("a", 64) < 1e-6
    assert 0 < estimates.decode("a", 4) < 1e-6


def test_of_two_equally_near_sizes_the_smaller_is_used() -> None:
    estimates = StepEstimates(["a"])
    estimates.observe_decode("a", 4, 1, 0.1)
    estimates.observe_decode("a", 64, 1, 0.4)
    assert estimates.decode("a", 16) == pytest.approx(0.1)
    assert estimates.decode("a", 17) == pytest.approx(0.4)
