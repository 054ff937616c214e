from __future__ import annotations

import pytest

from muxjax.errors import PlanError
from muxjax.placement.simulator.simulated_units import (
    MAX_BLOCKS,
    PolicyName,
    SystemConfig,
    build_simulated_unit,
)
from muxjax.scheduling.kv_cache.pool_division import OpenPool
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from tests.muxjax.scheduling.harness import request
from tests.placement.simple_costs import SHAPE, SimpleCosts, planned, unit

SHAPES = {"small": SHAPE, "large": SHAPE}


def test_pool_pages_and_limits_follow_the_plan() -> None:
    models = planned("a"), planned("b")
    scheduler = build_simulated_unit(
        unit(*models), SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    # 512 bytes per token in two layers, 16 tokens per page.
    assert scheduler.allocator.num_pages == int(2e6 // (256 * 16))
    assert scheduler.models["a"].spec.tokens_per_page == 16
    assert scheduler.models["a"].spec.num_layers == 2
    assert scheduler.models["a"].spec.max_model_len == 512
    assert scheduler.models["a"].spec.limits.max_seqs == 16


def test_the_longest_request_is_limited_by_plan_and_model() -> None:
    # A pool of 195 tokens fits a request of 100 tokens, but not of the model's 512.
    small = unit(planned("a", longest=100), kv_bytes=1e5)
    scheduler = build_simulated_unit(
        small, SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    assert scheduler.models["a"].spec.max_model_len == 100
    model = unit(planned("a", longest=1000))
    scheduler = build_simulated_unit(
        model, SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    assert scheduler.models["a"].spec.max_model_len == 512


def test_a_small_model_on_a_large_device_has_larger_pages() -> None:
    large = unit(planned("a"), kv_bytes=64e9)
    scheduler = build_simulated_unit(
        large, SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    assert scheduler.allocator.num_pages // 2 <= MAX_BLOCKS
    assert (
        scheduler.allocator.num_pages * scheduler.models["a"].spec.tokens_per_page * 256
        > 0.95 * 64e9
    )


def test_the_kv_of_a_replica_is_on_its_devices_only() -> None:
    models = planned("a", tp=1, replicas=2), planned("b", tp=2)
    scheduler = build_simulated_unit(
        unit(*models), SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    specs = {name: state.spec for name, state in scheduler.models.items()}
    # Per device, tp=1 stores 512 bytes for half of the tokens, tp=2 half of the heads for all.
    assert specs["a"].tokens_per_page == specs["b"].tokens_per_page == 16


def test_quotas_and_floors_follow_the_plan() -> None:
    models = (
        planned("a", kv_floor=0.1, kv_quota=0.75),
        planned("b", kv_floor=0.1, kv_quota=0.25, rate=9.0),
    )
    scheduler = build_simulated_unit(
        unit(*models), SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    slabs = scheduler.allocator.num_slabs
    assert scheduler.quotas.quotas["a"] == pytest.approx(0.75 * slabs, abs=1)
    assert scheduler.quotas.floors["b"] == pytest.approx(0.1 * slabs, abs=1)


@pytest.mark.parametrize(
    ("system", "quotas"),
    [
        (SystemConfig("adbs"), KVQuotas),
        (SystemConfig("fcfs"), KVQuotas),
        (SystemConfig("temporal"), OpenPool),
        (SystemConfig("adbs", "concurrent"), KVQuotas),
        (SystemConfig("round_robin", "concurrent"), OpenPool),
        (SystemConfig("fcfs", "concurrent"), OpenPool),
    ],
)
def test_the_policy_determines_the_kv_quotas(system: SystemConfig, quotas: type[KVQuotas]) -> None:
    simulated = build_simulated_unit(
        unit(planned("a")), system, SimpleCosts(), SHAPES, bandwidth=None
    )
    assert type(simulated.scheduler.quotas) is quotas


@pytest.mark.parametrize(("policy", "prefills"), [("slo", 2), ("static", 2), ("adbs", 1)])
def test_exclusive_shares_allow_concurrent_prefills(policy: PolicyName, prefills: int) -> None:
    models = planned("a", prefill_share=1.0), planned("b", prefill_share=1.0)
    system = SystemConfig(policy, "concurrent")
    simulated = build_simulated_unit(unit(*models), system, SimpleCosts(), SHAPES, bandwidth=None)
    for number, model in enumerate("ab"):
        simulated.add(request(number, model))
    assert simulated.steps["prefill"] == prefills


@pytest.mark.parametrize("policy", ["slo", "static"])
def test_exclusive_shares_are_proportional_to_demand(policy: PolicyName) -> None:
    # Both decode nearly all the time, with different compute shares.
    common = {"prefill_share": 1.0, "prefill_time": 0.02, "decode_time": 0.9}
    models = planned("a", decode_share=0.8, **common), planned("b", decode_share=0.2, **common)
    system = SystemConfig(policy, "concurrent")
    simulated = build_simulated_unit(unit(*models), system, SimpleCosts(), SHAPES, bandwidth=None)
    parts = [simulated.executor._models[name].decode_share for name in "ab"]
    assert sum(parts) == pytest.approx(1.0)
    assert parts[0] == pytest.approx(0.1 + 0.8 * 0.74 / 0.94)


@pytest.mark.parametrize("decode_time", [0.012, 0.068, 0.082, 0.144, 0.9])
def test_a_single_model_gets_all_of_the_compute(decode_time: float) -> None:
    model = planned("a", prefill_share=1.0, prefill_time=0.013, decode_time=decode_time)
    system = SystemConfig("slo", "concurrent")
    simulated = build_simulated_unit(unit(model), system, SimpleCosts(), SHAPES, bandwidth=None)
    assert simulated.executor._models["a"].decode_share == 1.0


def test_initial_step_estimates_are_those_of_the_cost_model() -> None:
    scheduler = build_simulated_unit(
        unit(planned("a")), SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    assert scheduler.estimates.prefill("a", 64) == pytest.approx(0.064)
    assert scheduler.estimates.decode("a", 3) == pytest.approx(0.010)


def test_the_error_of_a_small_pool_names_remedies() -> None:
    small = unit(planned("a"), kv_bytes=1e5)
    with pytest.raises(
        PlanError, match=r"unit unit-0 .1 x toy, .*: pool too small: a needs"
    ) as error:
        build_simulated_unit(small, SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None)
    assert "place fewer models on it, or use more devices" in str(error.value)
