from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from muxjax.errors import WorkloadError
from muxjax.placement.workload.lengths import Lengths, LogNormal, Sampled, Uniform


def draw_pairs(lengths: Lengths, count: int = 40_000, seed: int = 0) -> np.ndarray:
    return np.array(list(islice(lengths.draw(np.random.default_rng(seed)), count)))


def test_the_default_means_are_those_of_sharegpt() -> None:
    assert draw_pairs(LogNormal()).mean(axis=0) == pytest.approx([161, 338], rel=0.03)


@pytest.mark.parametrize("limit", [400, 800, 10_000])
def test_a_limit_does_not_change_the_mean(limit: int) -> None:
    pairs = draw_pairs(LogNormal(200.0, 300.0, max_prompt=limit, max_output=limit))
    assert pairs.max() <= limit
    assert pairs.min() >= 1
    assert pairs.mean(axis=0) == pytest.approx([200, 300], rel=0.03)


def test_a_sigma_of_zero_makes_all_lengths_equal() -> None:
    pairs = draw_pairs(LogNormal(50.0, 60.0, 0.0, 0.0), 100)
    assert (pairs == [50, 60]).all()


def test_uniform_lengths_range_from_half_to_one_and_a_half_means() -> None:
    pairs = draw_pairs(Uniform(100.0, 40.0))
    assert pairs.min(axis=0).tolist() == [50, 20]
    assert pairs.max(axis=0).tolist() == [150, 60]
    assert pairs.mean(axis=0) == pytest.approx([100, 40], rel=0.02)


def test_samples_are_pairs_of_the_data() -> None:
    pairs = [(1, 2), (3, 4), (5, 6)]
    assert {tuple(pair) for pair in draw_pairs(Sampled(pairs), 500).tolist()} == set(pairs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_tokens": 0.5}, "mean prompt must have at least 1 token"),
        ({"output_tokens": float("nan")}, "mean output must have at least 1 token"),
        ({"output_sigma": -1.0}, "sigma of output lengths"),
        ({"prompt_tokens": 900.0, "max_prompt": 1000}, "too close to the limit of 1000"),
    ],
)
def test_invalid_settings_raise(settings: dict[str, float], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        LogNormal(**settings)  # type: ignore[arg-type]
