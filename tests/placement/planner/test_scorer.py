"""Scores of candidate units, with costs that can be computed by hand."""

from __future__ import annotations

import pytest

from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.scorer import Scorer, scale_to_full_compute
from muxjax.scheduling.expected_load import ExpectedLoad
from muxjax.scheduling.specs import LatencySlo
from tests.placement.fleets import SHAPES

KIND = next(iter(SHAPES))


def scorer(*loads: ModelLoad, objective: str = "throughput", cluster: str = "1x4:a100-80gb"):
    parsed = parse_cluster(cluster)
    costs = [Roofline(SHAPES, group.device) for group in parsed.groups]
    return Scorer(loads, parsed, costs, "time_sliced", objective)


def test_the_value_of_a_unit_that_serves_its_load_is_the_rate() -> None:
    scores = scorer(ModelLoad("a", KIND, ExpectedLoad(1.0)))
    score = scores.score(0, 1, ((0, 1.0),))
    assert score is not None
    assert score.point.served == (1.0,)
    # The rate, and a slack bonus of at most 0.01 % of the rate.
    assert 1.0 < score.value <= 1.0001


def test_the_value_of_half_of_a_model_is_half() -> None:
    scores = scorer(ModelLoad("a", KIND, ExpectedLoad(1.0)))
    half = scores.score(0, 1, ((0, 0.5),))
    assert half is not None
    assert half.value == pytest.approx(0.5, abs=1e-3)


def test_scores_are_cached() -> None:
    scores = scorer(ModelLoad("a", KIND, ExpectedLoad(1.0)))
    assert scores.score(0, 1, ((0, 1.0),)) is scores.score(0, 1, ((0, 1.0),))


def test_a_unit_that_does_not_fit_has_no_score() -> None:
    loads = [ModelLoad(str(number), KIND, ExpectedLoad(1.0)) for number in range(60)]
    assert scorer(*loads).score(0, 1, tuple((number, 1.0) for number in range(60))) is None


def test_the_slo_objective_counts_requests_within_their_targets() -> None:
    slow = ModelLoad("a", KIND, ExpectedLoad(1.0), slo=LatencySlo(ttft=1e-9))
    fast = ModelLoad("a", KIND, ExpectedLoad(1.0), slo=LatencySlo(ttft=60.0))
    values = [
        score.value
        for load in (slow, fast)
        if (score := scorer(load, objective="slo").score(0, 1, ((0, 1.0),))) is not None
    ]
    assert values[0] < 0.02
    assert values[1] > 1.0


def test_tp_sizes_divide_the_mesh_and_fit_it() -> None:
    sizes = scorer(ModelLoad("a", KIND, ExpectedLoad(1.0))).tp_sizes(0, 2, 0)
    assert sizes[0] == 2
    assert set(sizes) <= {1, 2}


def test_unused_compute_is_distributed_in_tenths() -> None:
    assert sum(scale_to_full_compute((0.2, 0.3))) == pytest.approx(1.0)
    assert scale_to_full_compute((0.6, 0.6)) == (0.6, 0.6)
