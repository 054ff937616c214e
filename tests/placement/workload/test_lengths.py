from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from muxjax.errors import WorkloadError
from muxjax.placement.workload.lengths import Lengths, LogNormal, Sampled, Uniform


def drawn(lengths: Lengths, count: int = 40_000, seed: int = 0) -> np.ndarray:
    return np.array(list(islice(lengths.draw(np.random.default_rng(seed)), count)))


def test_the_defaults_are_sharegpts_means() -> None:
    assert drawn(LogNormal()).mean(axis=0) == pytest.approx([161, 338], rel=0.03)


@pytest.mark.parametrize("limit", [400, 800, 10_000])
def test_the_mean_is_kept_under_a_limit(limit: int) -> None:
    found = drawn(LogNormal(200.0, 300.0, max_prompt=limit, max_output=limit))
    assert found.max() <= limit
    assert found.min() >= 1
    assert found.mean(axis=0) == pytest.approx([200, 300], rel=0.03)


def test_no_spread_makes_all_alike() -> None:
    found = drawn(LogNormal(50.0, 60.0, 0.0, 0.0), 100)
    assert (found == [50, 60]).all()


def test_uniform_lengths_are_within_half_of_the_mean() -> None:
    found = drawn(Uniform(100.0, 40.0))
    assert found.min(axis=0).tolist() == [50, 20]
    assert found.max(axis=0).tolist() == [150, 60]
    assert found.mean(axis=0) == pytest.approx([100, 40], rel=0.02)


def test_samples_come_from_the_data() -> None:
    pairs = [(1, 2), (3, 4), (5, 6)]
    assert {tuple(pair) for pair in drawn(Sampled(pairs), 500).tolist()} == set(pairs)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prompt_tokens": 0.5}, "mean prompt must have at least 1 token"),
        ({"output_tokens": float("nan")}, "mean output must have at least 1 token"),
        ({"output_sigma": -1.0}, "sigma of output lengths"),
        ({"prompt_tokens": 900.0, "max_prompt": 1000}, "too close to the limit of 1000"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, float], says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        LogNormal(**settings)  # type: ignore[arg-type]
