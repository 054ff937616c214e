from __future__ import annotations

import json

import pytest
import yaml

from muxjax.errors import PlanError
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.upstream_estimator import UpstreamEstimator, upstream_model
from muxjax.placement.planner.upstream_search import (
    count_combinations,
    score_placement,
    search_as_upstream,
)
from muxjax.scheduling.expected_load import ExpectedLoad
from tests.placement.data import a100_profile, shared_data
from tests.placement.planner.harness import flat_profile


@pytest.mark.parametrize("case", ["condense500", "condense1200", "condense1600"])
def test_the_placement_equals_upstreams(case: str) -> None:
    folder = shared_data() / "chatlmsys"
    recorded = json.loads((folder / "recorded.json").read_text())[case]["upstream_optimizer"]
    models = yaml.safe_load((folder / f"{case}.yaml").read_text())["models"]
    members = [
        upstream_model(ModelLoad(m["name"], m["model"], ExpectedLoad(m["rate"]))) for m in models
    ]
    estimator = UpstreamEstimator(json.loads(a100_profile().read_text()), members, 32)
    placement = search_as_upstream(estimator, 4, 8)
    assert placement is not None
    assert round(placement.score, 4) == recorded["score"]
    assert score_placement(estimator, placement.meshes) == placement.score
    expected = sorted(
        (int(name.removeprefix("mesh").split("idx")[0]), sorted(placed))
        for name, placed in recorded["meshes"].items()
    )
    assert (
        sorted((size, sorted(n for n, _ in placed)) for size, placed in placement.meshes)
        == expected
    )


def test_too_many_combinations_raise() -> None:
    assert count_combinations(4, 8) == 715
    assert count_combinations(16, 8) > 2_000_000
    members = [upstream_model(ModelLoad("a", "llama-7b", ExpectedLoad(1.0)))]
    estimator = UpstreamEstimator(flat_profile(), members, 128)
    with pytest.raises(PlanError, match="without --upstream-compatible"):
        search_as_upstream(estimator, 16, 8)
    with pytest.raises(PlanError, match="does not support nodes of 3"):
        search_as_upstream(estimator, 1, 3)


def test_splits_with_more_meshes_than_models_are_skipped() -> None:
    members = [upstream_model(ModelLoad("a", "llama-7b", ExpectedLoad(1.0)))]
    estimator = UpstreamEstimator(flat_profile(), members, 2)
    assert search_as_upstream(estimator, 2, 1) is None
