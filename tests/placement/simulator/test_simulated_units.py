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


def test_the_pool_is_the_plans_and_pages_hold_whole_tokens() -> None:
    models = planned("a"), planned("b")
    found = build_simulated_unit(
        unit(*models), SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    # 512 bytes a token over two layers, 16 tokens a page.
    assert found.allocator.num_pages == int(2e6 // (256 * 16))
    assert found.models["a"].spec.tokens_per_page == 16
    assert found.models["a"].spec.num_layers == 2
    assert found.models["a"].spec.max_model_len == 512
    assert found.models["a"].spec.limits.max_seqs == 16


def test_the_longest_request_is_the_plans_where_it_says() -> None:
    # A pool of 195 tokens: none of 512, the model's own length, but one of 100.
    small = unit(planned("a", longest=100), kv_bytes=1e5)
    found = build_simulated_unit(
        small, SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    assert found.models["a"].spec.max_model_len == 100
    model = unit(planned("a", longest=1000))
    found = build_simulated_unit(
        model, SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    assert found.models["a"].spec.max_model_len == 512


def test_a_toy_on_a_large_device_has_larger_pages() -> None:
    large = unit(planned("a"), kv_bytes=64e9)
    found = build_simulated_unit(
        large, SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    assert found.allocator.num_pages // 2 <= MAX_BLOCKS
    assert found.allocator.num_pages * found.models["a"].spec.tokens_per_page * 256 > 0.95 * 64e9


def test_a_copy_holds_its_tokens_on_its_own_devices() -> None:
    models = planned("a", tp=1, replicas=2), planned("b", tp=2)
    found = build_simulated_unit(
        unit(*models), SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    specs = {name: state.spec for name, state in found.models.items()}
    # tp=1 on one of two devices is half of 512 bytes each, tp=2 is half of the heads on both.
    assert specs["a"].tokens_per_page == specs["b"].tokens_per_page == 16


def test_the_plans_quotas_and_floors_are_the_units() -> None:
    models = (
        planned("a", kv_floor=0.1, kv_quota=0.75),
        planned("b", kv_floor=0.1, kv_quota=0.25, rate=9.0),
    )
    found = build_simulated_unit(
        unit(*models), SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    slabs = found.allocator.num_slabs
    assert found.quotas.quotas["a"] == pytest.approx(0.75 * slabs, abs=1)
    assert found.quotas.floors["b"] == pytest.approx(0.1 * slabs, abs=1)


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
def test_who_divides_the_pool(system: SystemConfig, quotas: type[KVQuotas]) -> None:
    found = build_simulated_unit(unit(planned("a")), system, SimpleCosts(), SHAPES, bandwidth=None)
    assert type(found.scheduler.quotas) is quotas


@pytest.mark.parametrize(("policy", "at_once"), [("slo", 2), ("static", 2), ("adbs", 1)])
def test_who_has_a_part_of_the_compute_of_its_own(policy: PolicyName, at_once: int) -> None:
    models = planned("a", prefill_share=1.0), planned("b", prefill_share=1.0)
    system = SystemConfig(policy, "concurrent")
    found = build_simulated_unit(unit(*models), system, SimpleCosts(), SHAPES, bandwidth=None)
    for number, model in enumerate("ab"):
        found.add(request(number, model))
    assert found.steps["prefill"] == at_once


@pytest.mark.parametrize("policy", ["slo", "static"])
def test_a_part_of_the_compute_is_as_large_as_the_need_of_it(policy: PolicyName) -> None:
    # Both decode nearly all the time, on parts of the chip that are not alike.
    common = {"prefill_share": 1.0, "prefill_time": 0.02, "decode_time": 0.9}
    models = planned("a", decode_share=0.8, **common), planned("b", decode_share=0.2, **common)
    system = SystemConfig(policy, "concurrent")
    found = build_simulated_unit(unit(*models), system, SimpleCosts(), SHAPES, bandwidth=None)
    parts = [found.executor._models[name].decode_share for name in "ab"]
    assert sum(parts) == pytest.approx(1.0)
    assert parts[0] == pytest.approx(0.1 + 0.8 * 0.74 / 0.94)


@pytest.mark.parametrize("decode_time", [0.012, 0.068, 0.082, 0.144, 0.9])
def test_a_model_alone_has_the_whole_chip(decode_time: float) -> None:
    alone = planned("a", prefill_share=1.0, prefill_time=0.013, decode_time=decode_time)
    system = SystemConfig("slo", "concurrent")
    found = build_simulated_unit(unit(alone), system, SimpleCosts(), SHAPES, bandwidth=None)
    assert found.executor._models["a"].decode_share == 1.0


def test_the_scheduler_begins_with_the_cost_models_times() -> None:
    found = build_simulated_unit(
        unit(planned("a")), SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None
    ).scheduler
    assert found.estimates.prefill("a", 64) == pytest.approx(0.064)
    assert found.estimates.decode("a", 3) == pytest.approx(0.010)


def test_a_pool_that_is_too_small_says_what_would_do() -> None:
    small = unit(planned("a"), kv_bytes=1e5)
    with pytest.raises(PlanError, match=r"unit unit-0 .1 x toy.: pool too small: a needs") as error:
        build_simulated_unit(small, SystemConfig(), SimpleCosts(), SHAPES, bandwidth=None)
    assert "place fewer models on it, or on more devices" in str(error.value)
