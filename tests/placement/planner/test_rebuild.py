from __future__ import annotations

import random

import pytest

from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.placements import Placement
from muxjax.placement.planner.rebuild import Rebuilder, add_item
from muxjax.placement.planner.scorer import CandidateUnit, Scorer
from muxjax.scheduling.expected_load import ExpectedLoad
from tests.placement.fleets import SHAPES


def test_items_stay_sorted_and_parts_of_a_model_are_merged() -> None:
    assert add_item(((0, 1.0), (2, 0.5)), (1, 0.25)) == ((0, 1.0), (1, 0.25), (2, 0.5))
    assert add_item(((0, 0.5),), (0, 0.25)) == ((0, 0.75),)


@pytest.mark.parametrize("seed", range(5))
def test_a_rebuild_places_the_models_of_the_old_units(seed: int) -> None:
    cluster = parse_cluster("1x4:h100")
    loads = [ModelLoad(name, "llama3-8b", ExpectedLoad(5.0)) for name in "abc"]
    scorer = Scorer(loads, cluster, [Roofline(SHAPES, cluster.groups[0].device)], "time_sliced")
    placement = Placement(scorer, [CandidateUnit(0, 4, ((0, 1.0), (1, 1.0)))])
    rebuilder = Rebuilder(scorer, random.Random(seed))
    assert rebuilder.smallest_mesh == [{0: 1}] * 3
    assert rebuilder.choose_units(placement) == [0]
    old = [placement.remove(0)]
    new = rebuilder.rebuild(placement, old, (2, 1.0))
    assert new is not None
    parts = [item for unit in new for item in unit.items]
    assert {model for model, _ in parts} == {0, 1, 2}
    assert sum(part for _, part in parts) == pytest.approx(3.0)
    assert sum(unit.size for unit in new) <= 4
