from __future__ import annotations

from collections.abc import Sequence

import pytest

from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.placements import Placement
from muxjax.placement.planner.planner import PlannerOptions, create_scorer
from muxjax.placement.planner.scorer import CandidateUnit, Scorer
from muxjax.placement.simulator.group_attainment import GroupSimulator
from muxjax.placement.simulator.guided_search import SIMULATED_REQUESTS, search_by_simulation
from muxjax.placement.simulator.simulated_units import SystemConfig
from muxjax.scheduling.expected_load import ExpectedLoad
from tests.placement.fleets import SHAPES

# Short requests are late beside the prefills of the second model, but not beside the first.
SHORT = ModelLoad("short", "llama-7b", ExpectedLoad(2.0, 100, 4))
LONG = ModelLoad("long", "llama-13b", ExpectedLoad(1.0, 1500, 30))
TOGETHER = [CandidateUnit(0, 1, ((0, 1.0), (1, 1.0)))]


@pytest.fixture(autouse=True)
def _short_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muxjax.placement.simulator.group_attainment.MAX_SECONDS", 30.0)


def searcher(
    loads: Sequence[ModelLoad], cluster: str = "1x2:a100-80gb"
) -> tuple[Scorer, GroupSimulator]:
    parsed = parse_cluster(cluster)
    scorer = create_scorer(
        loads, parsed, [Roofline(SHAPES, parsed.groups[0].device)], PlannerOptions()
    )
    return scorer, GroupSimulator(scorer, {}, SystemConfig(), seed=1)


def test_search_improves_on_its_start() -> None:
    scorer, simulator = searcher([SHORT, LONG])
    units = search_by_simulation(scorer, simulator, PlannerOptions(effort=0.05), [TOGETHER])
    assert simulator.placement_loss(units) < 0.5 * simulator.placement_loss(TOGETHER)
    models = sorted(model for unit in units for model, _ in unit.items)
    assert models == [0, 1]
    assert all(Placement(scorer, units).budgets[0].counts[size] <= 2 for size in (1, 2))


def test_search_is_deterministic() -> None:
    found = []
    for _ in range(2):
        scorer, simulator = searcher([SHORT, LONG])
        found.append(
            search_by_simulation(scorer, simulator, PlannerOptions(effort=0.05, seed=4), [TOGETHER])
        )
    assert found[0] == found[1]


def test_search_ends_within_its_budget() -> None:
    heavy = ModelLoad("heavy", "llama-13b", ExpectedLoad(20.0, 1000, 40))
    scorer, simulator = searcher([SHORT, heavy])
    progress: list[float] = []
    start = [CandidateUnit(0, 1, ((0, 1.0),)), CandidateUnit(0, 1, ((1, 1.0),))]
    search_by_simulation(
        scorer,
        simulator,
        PlannerOptions(effort=0.05),
        [start],
        lambda done, attainment: progress.append(done),
    )
    assert progress == pytest.approx(sorted(progress))
    assert progress[-1] == 1.0
    assert simulator.requests < 2 * SIMULATED_REQUESTS
