from __future__ import annotations

import itertools

import pytest

from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.costs.devices import DEVICES
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.bound import upper_bound
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.placements import Placement
from muxjax.placement.planner.scorer import Scorer
from muxjax.placement.planner.search import Search
from muxjax.scheduling.expected_load import ExpectedLoad
from tests.placement.fake_costs import FakeCosts
from tests.placement.fleets import SHAPES, large_fleet, tiny_fleet


def scorer_of(loads: list[ModelLoad], cluster: str, **options: object) -> Scorer:
    parsed = parse_cluster(cluster)
    costs = [Roofline(SHAPES, group.device) for group in parsed.groups]
    return Scorer(loads, parsed, costs, "time_sliced", **options)  # type: ignore[arg-type]


def test_the_parts_of_every_model_add_up_to_1() -> None:
    loads, cluster = large_fleet(2, 15)
    costs = Roofline(SHAPES, cluster.groups[0].device)
    scorer = Scorer(loads, cluster, [costs], "time_sliced")
    placement = Search(scorer, seed=3).run([], 60)
    assert placement is not None
    parts = dict.fromkeys(range(15), 0.0)
    for _, _, items, _ in placement.units:
        for model, part in items:
            parts[model] += part
    assert all(part == pytest.approx(1.0, abs=1e-6) for part in parts.values())
    rebuilt = Placement(scorer, placement.units)
    assert rebuilt.value == pytest.approx(placement.value)
    assert sum(size for _, size, _, _ in placement.units) <= cluster.num_devices


def test_equal_seeds_find_equal_placements() -> None:
    loads, cluster = large_fleet(1, 6)
    runs = []
    for _ in range(2):
        costs = Roofline(SHAPES, cluster.groups[0].device)
        placement = Search(Scorer(loads, cluster, [costs], "time_sliced"), seed=7).run([], 50)
        assert placement is not None
        runs.append(sorted(placement.units))
    assert runs[0] == runs[1]


def test_a_model_above_the_capacity_of_a_mesh_gets_replicas() -> None:
    loads = [
        ModelLoad("hot", "llama3-8b", ExpectedLoad(400.0)),
        ModelLoad("cold", "llama3-8b", ExpectedLoad(0.1)),
    ]
    scorer = scorer_of(loads, "2x4:a100-80gb")
    placement = Search(scorer).run([], 60)
    assert placement is not None
    replicas = [unit for unit in placement.units if any(model == 0 for model, _ in unit[2])]
    assert len(replicas) > 1
    isolated = scorer.score(0, 4, ((0, 1.0),))
    assert isolated is not None
    assert placement.value > 1.5 * isolated.value


def test_a_large_model_is_placed_on_the_larger_nodes() -> None:
    loads = [
        ModelLoad("large", "llama-65b", ExpectedLoad(0.5)),
        ModelLoad("small", "llama3-1b", ExpectedLoad(1.0)),
    ]
    scorer = scorer_of(loads, "1x1:a100-40gb,1x4:a100-80gb")
    placement = Search(scorer).run([], 100)
    assert placement is not None
    assert {unit[0] for unit in placement.units if unit[2][0][0] == 0} == {1}


def test_models_are_packed_into_tight_memory() -> None:
    # Three models of 60 GB and three of 15 GB: a device of 80 GB fits one of each.
    loads = [
        ModelLoad(f"m{i}", "large" if i < 3 else "small", ExpectedLoad(0.01)) for i in range(6)
    ]
    large, small = FakeCosts(weights=60e9, degrees=(1,)), FakeCosts(weights=15e9, degrees=(1,))

    class Costs(FakeCosts):
        def weight_bytes(self, model: str, *, tp: int = 1) -> float:
            return (large if model == "large" else small).weight_bytes(model, tp=tp)

    costs = Costs(kinds=("large", "small"), degrees=(1,))
    scorer = Scorer(loads, parse_cluster("3x1:a100-80gb"), [costs], "time_sliced")
    placement = Search(scorer).run([], 10)
    assert placement is not None
    assert len(placement.units) == 3


def test_no_placement_exceeds_the_bound() -> None:
    for seed in range(12):
        loads, cluster = tiny_fleet(seed)
        costs = Roofline(SHAPES, cluster.groups[0].device)
        for execution in ("time_sliced", "concurrent"):
            scorer = Scorer(loads, cluster, [costs], execution)
            placement = Search(scorer).run([], 30)
            if placement is not None:
                assert placement.value <= upper_bound(scorer) * (1 + 1e-9), (seed, execution)


def test_the_bound_of_a_servable_load_is_the_load() -> None:
    scorer = scorer_of([ModelLoad("a", "llama3-8b", ExpectedLoad(0.5))], "1x1:h100")
    assert upper_bound(scorer) == pytest.approx(0.5, rel=1e-3)


def test_the_minimum_share_serves_the_load() -> None:
    loads = [ModelLoad("a", "m", ExpectedLoad(rate, 1.0, 100.0)) for rate in (1.0, 3.0)]
    scorer = Scorer(
        [loads[0], ModelLoad("b", "m", ExpectedLoad(3.0, 1.0, 100.0))],
        parse_cluster("1x1:a100-80gb"),
        [FakeCosts(prefill=1e-6, decode=0.001, per_sequence=0.002)],
        "concurrent",
    )
    # With all compute a batch of b takes 0.1 + 0.2 b s: 1 request/s needs b = 0.125.
    assert scorer.min_share(0, 1, 1, (0, 1.0)) == 0.25
    assert scorer.min_share(0, 1, 1, (1, 1.0)) in (0.5, 0.75, 1.0)


def test_the_slo_objective_counts_only_models_within_their_slo() -> None:
    quick = ModelLoad("a", "llama3-8b", ExpectedLoad(1.0))
    strict = scorer_of([quick], "1x1:h100", objective="slo")
    score = strict.score(0, 1, ((0, 1.0),))
    assert score is not None
    assert score.value == pytest.approx(1.0, rel=1e-3)

    from muxjax.scheduling.specs import LatencySlo

    late = ModelLoad("a", "llama3-8b", ExpectedLoad(1.0), slo=LatencySlo(tpot=1e-5))
    score = scorer_of([late], "1x1:h100", objective="slo").score(0, 1, ((0, 1.0),))
    assert score is not None
    assert score.value < 0.02


def test_a_small_model_fits_on_every_preset() -> None:
    for name, (prompt, output) in itertools.product(DEVICES, ((100.0, 100.0),)):
        scorer = scorer_of(
            [ModelLoad("a", "llama3-1b", ExpectedLoad(1.0, prompt, output))], f"1x1:{name}"
        )
        assert scorer.score(0, 1, ((0, 1.0),)) is not None
