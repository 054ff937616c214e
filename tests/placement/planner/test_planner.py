from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from muxjax.errors import PlanError
from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.planner import PlannerOptions, plan_placement
from muxjax.scheduling.expected_load import ExpectedLoad
from tests.placement.data import a100_profile, shared_data
from tests.placement.planner.harness import plan_of

ROOT = Path(__file__).parents[3]


def chatlmsys(case: str) -> list[ModelLoad]:
    text = (shared_data() / "chatlmsys" / f"{case}.yaml").read_text()
    # Upstream always assumes ShareGPT's mean lengths.
    return [
        ModelLoad(m["name"], m["model"], ExpectedLoad(m["rate"], 161.0, 337.0))
        for m in yaml.safe_load(text)["models"]
    ]


def test_plans_are_as_good_as_exhaustive_search() -> None:
    # A separate process without run-time type checks is ten times faster.
    done = subprocess.run(
        [sys.executable, "-m", "tests.placement.exhaustive", "200"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    gaps = json.loads(done.stdout)
    assert gaps["cases"] == 200
    assert gaps["mean_gap"] < 0.005
    assert gaps["worst_gap"] < 0.03
    # The search without the exact start of small fleets.
    assert gaps["mean_gap_of_search"] < 0.01


@pytest.mark.parametrize(
    ("case", "upstream"),
    [("condense500", 5.2096), ("condense1200", 9.5086), ("condense1600", 10.5986)],
)
def test_plans_are_better_than_upstreams_by_both_scores(case: str, upstream: float) -> None:
    table = ProfileTable(a100_profile())
    cluster = parse_cluster("4x8:a100-80gb")
    plans = [
        plan_placement(
            chatlmsys(case), cluster, [table], PlannerOptions("concurrent", as_upstream=as_upstream)
        )
        for as_upstream in (True, False)
    ]
    theirs, ours = plans
    assert round(theirs.upstream_score or 0, 4) == upstream
    assert (ours.upstream_score or 0) >= upstream
    assert ours.score > theirs.score
    assert ours.throughput > theirs.throughput


def test_a_plan_is_consistent() -> None:
    loads = [ModelLoad(f"m{i}", "llama3-8b", ExpectedLoad(2.0 + i)) for i in range(5)]
    plan = plan_of(loads, "2x4:a100-80gb")
    assert plan.rate == sum(load.expected.rate for load in loads)
    assert plan.throughput <= plan.rate
    assert plan.score <= plan.bound
    assert 0 <= plan.gap < 1
    planned: dict[str, float] = {}
    for unit in plan.units:
        memory = {device.name: device.memory for device in plan.devices}[unit.device]
        assert unit.weight_bytes + unit.kv_bytes + unit.reserved_bytes == pytest.approx(memory)
        assert sum(model.kv_quota for model in unit.models) == pytest.approx(1.0)
        assert sum(m.prefill_time + m.decode_time for m in unit.models) <= 1 + 1e-6
        for model in unit.models:
            planned[model.name] = planned.get(model.name, 0.0) + model.rate
            assert model.kv_floor <= model.kv_quota + 1e-9
            assert model.max_batch >= 1
    assert planned == pytest.approx({load.name: load.expected.rate for load in loads})


def test_equal_inputs_and_seeds_give_equal_plans() -> None:
    loads = [ModelLoad(f"m{i}", "llama3-8b", ExpectedLoad(20.0 + i)) for i in range(4)]
    plans = [plan_of(loads, "1x4:h100", seed=5) for _ in range(2)]
    first, second = (plan.model_copy(update={"seconds": 0.0}) for plan in plans)
    assert first == second
    other = plan_of(loads, "1x4:h100", seed=6)
    assert other.config_hash != first.config_hash


def test_configured_floors_are_kept() -> None:
    loads = [
        ModelLoad("a", "llama3-8b", ExpectedLoad(10.0)),
        ModelLoad("b", "llama3-8b", ExpectedLoad(0.1), kv_floor=0.4),
    ]
    plan = plan_of(loads, "1x1:h100")
    models = {model.name: model for unit in plan.units for model in unit.models}
    assert models["b"].kv_floor == 0.4
    assert models["b"].kv_quota >= 0.4
    assert models["a"].kv_quota <= 0.6


def test_the_weighted_objective_is_the_weighted_throughput() -> None:
    loads = [ModelLoad(f"m{i}", "llama3-8b", ExpectedLoad(40.0 * (1 + i))) for i in range(3)]
    plan = plan_of(loads, "1x2:a100-80gb", objective="weighted")
    assert plan.score == pytest.approx(plan.weighted_throughput, rel=1e-3)
    assert plan.score <= plan.bound


def test_a_fleet_without_load_is_placed() -> None:
    plan = plan_of([ModelLoad("a", "llama3-8b", ExpectedLoad(0.0))], "1x1:h100")
    assert plan.units[0].models[0].name == "a"
    assert plan.throughput == 0


def test_a_model_that_fits_on_no_mesh_raises() -> None:
    loads = [
        ModelLoad("small", "llama3-1b", ExpectedLoad(1.0)),
        ModelLoad("big", "llama-65b", ExpectedLoad(1.0)),
    ]
    with pytest.raises(PlanError, match=r"big .* fits nowhere on 4x1:a100-80gb") as caught:
        plan_of(loads, "4x1:a100-80gb")
    text = str(caught.value)
    assert "130.6 GB of weights" in text
    assert "has 80.0 GB" in text
    assert "1.7 times the memory would be enough" in text


def test_a_tp_size_above_the_devices_of_a_node_raises() -> None:
    table = ProfileTable(a100_profile())
    with pytest.raises(
        PlanError, match="can be sharded over 4, 8 devices, and no node has that many"
    ):
        plan_placement(
            [ModelLoad("big", "llama-65b", ExpectedLoad(1.0))],
            parse_cluster("8x2:a100-80gb"),
            [table],
        )


def test_models_that_do_not_fit_together_raise() -> None:
    loads = [ModelLoad(f"m{i}", "llama-30b", ExpectedLoad(1.0)) for i in range(5)]
    with pytest.raises(PlanError, match="the fleet does not fit on 1x4:a100-80gb: its 5 models"):
        plan_of(loads, "1x4:a100-80gb")


def test_an_output_without_tokens_raises() -> None:
    with pytest.raises(PlanError, match="hot: output_tokens must be at least 1, not 0"):
        ModelLoad("hot", "llama3-8b", ExpectedLoad(output_tokens=0.0))


def test_duplicate_names_and_an_empty_fleet_raise() -> None:
    with pytest.raises(PlanError, match="two models of the fleet are called a"):
        plan_of([ModelLoad("a", "llama3-8b", ExpectedLoad(1.0))] * 2, "1x1:h100")
    with pytest.raises(PlanError, match="no models"):
        plan_of([], "1x1:h100")


def test_a_model_without_costs_raises() -> None:
    with pytest.raises(PlanError, match="a: there are no costs for gpt"):
        plan_of([ModelLoad("a", "gpt", ExpectedLoad(1.0))], "1x1:h100")


def test_as_upstream_needs_muxserves_profile() -> None:
    with pytest.raises(PlanError, match="needs MuxServe's profile"):
        plan_of([ModelLoad("a", "llama3-8b", ExpectedLoad(1.0))], "1x1:h100", as_upstream=True)


def test_a_fleet_is_placed_on_many_nodes() -> None:
    loads = [ModelLoad(f"m{i}", "llama3-8b", ExpectedLoad(3.0)) for i in range(12)]
    plan = plan_of(loads, "64x8:v5e", effort=0.1)
    assert plan.throughput == pytest.approx(36.0)


def test_time_fractions_are_valid_if_the_search_starts_from_upstreams_placement() -> None:
    # Upstream's units have curves for a compute share; time-sliced programs use all of it.
    kinds = ["llama-7b"] * 12 + ["llama-13b"] * 4 + ["llama-30b"] * 2 + ["llama-65b"]
    loads = [
        ModelLoad(f"llm-{index}", kind, ExpectedLoad(40 * (index + 1) ** -2.1))
        for index, kind in enumerate(kinds)
    ]
    table = ProfileTable(a100_profile())
    plan = plan_placement(
        loads, parse_cluster("4x8:a100-80gb"), [table], PlannerOptions("time_sliced")
    )
    for unit in plan.units:
        assert sum(m.prefill_time + m.decode_time for m in unit.models) <= 1 + 1e-6


def test_a_plan_has_the_longest_request() -> None:
    plan = plan_of([ModelLoad("a", "llama3-8b", ExpectedLoad(1.0), longest=4096)], "1x1:h100")
    assert plan.units[0].models[0].longest == 4096
