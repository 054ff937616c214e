from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.placements import MeshBudget, Placement
from muxjax.placement.planner.scorer import CandidateUnit, Scorer
from muxjax.scheduling.expected_load import ExpectedLoad
from tests.placement.exhaustive import packs
from tests.placement.fleets import SHAPES


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 8),
    st.lists(st.sampled_from((1, 2, 4, 8)), min_size=1, max_size=6),
)
def test_meshes_fit_exactly_if_they_can_be_packed(
    nodes: int, devices: int, sizes: list[int]
) -> None:
    budget = MeshBudget(parse_cluster(f"{nodes}x{devices}:h100").groups[0])
    fits = True
    for size in sizes:
        if size not in budget.sizes or not budget.fits(size):
            fits = False
            break
        budget.counts[size] += 1
    assert fits == packs(sorted(sizes, reverse=True), [devices] * nodes)


def test_the_value_is_the_sum_over_the_units() -> None:
    cluster = parse_cluster("1x2:h100")
    loads = [ModelLoad(name, "llama3-8b", ExpectedLoad(1.0)) for name in "ab"]
    scorer = Scorer(loads, cluster, [Roofline(SHAPES, cluster.groups[0].device)], "time_sliced")
    units = [CandidateUnit(0, 1, ((model, 1.0),)) for model in (0, 1)]
    placement = Placement(scorer, units)
    assert placement.value == pytest.approx(sum(scorer.feasible_score(u).value for u in units))
    assert not placement.budgets[0].fits(1)
    assert placement.remove(0) == units[0]
    assert placement.units == [units[1]]
    assert placement.budgets[0].fits(1)
    assert placement.value == pytest.approx(scorer.feasible_score(units[1]).value)
