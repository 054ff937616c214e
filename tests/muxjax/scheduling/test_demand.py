from __future__ import annotations

import pytest

from muxjax.scheduling.demand import (
    SPARE_PART,
    decode_batch,
    decode_cycle,
    decode_demand,
    expected_demand,
    kv_demand,
    prefill_demand,
)
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.expected_load import ExpectedLoad
from muxjax.scheduling.fair_share import EVEN_PART
from muxjax.scheduling.policies.registry import create_policy
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import BucketLimits, ModelSpec


def model(
    name: str = "a", rate: float = 2.0, prompt: float = 100.0, output: float = 50.0
) -> ModelSpec:
    load = ExpectedLoad(rate, prompt, output)
    return ModelSpec(name, 10, 5, 400, BucketLimits(max_seqs=8), load)


def test_kv_demand_is_rate_times_tokens_times_pages_per_token() -> None:
    assert kv_demand(model()) == pytest.approx(2 * (100 + 50) * 10 / 5)


def test_prefill_demand_is_rate_times_prompt_time() -> None:
    estimates = StepEstimates(["a"], prefill_seconds=0.001)
    assert prefill_demand(model(), estimates) == pytest.approx(2 * 0.1)


def test_long_prompts_are_counted_in_chunks() -> None:
    estimates = StepEstimates(["a"])
    estimates.observe_prefill("a", 512, 0.512)
    estimates.observe_prefill("a", 2000, 20.0)
    assert prefill_demand(model(prompt=2000.0), estimates) == pytest.approx(2 * 2.0)


def test_decode_batch_is_the_tokens_due_in_a_cycle() -> None:
    assert decode_batch(model(rate=8.0), 0.0125) == pytest.approx(8 * 50 * 0.0125)
    assert decode_batch(model(), 0.0001) == 1.0
    assert decode_batch(model(), 60.0) == 8.0  # its slots


def test_decode_demand_falls_with_the_cycle() -> None:
    estimates = StepEstimates(["a"], decode_seconds=0.01)
    busy = model(rate=8.0)
    assert decode_demand(busy, estimates, 0.0125) == pytest.approx(8 * 50 * 0.01 / 5)
    assert decode_demand(busy, estimates, 0.02) == pytest.approx(8 * 50 * 0.01 / 8)


def step_costs(prefill: float, decode: float) -> StepEstimates:
    """Estimates of two models: `prefill` seconds a prompt, `decode` seconds at any batch."""
    estimates = StepEstimates(["a", "b"])
    for name in ("a", "b"):
        estimates.observe_prefill(name, 100, prefill)
        for batch in (1, 2, 4, 8):
            estimates.observe_decode(name, batch, 1, decode)
    return estimates


def test_all_models_fit_the_device_at_the_chosen_cycle() -> None:
    specs = [model("a", rate=2.0), model("b", rate=1.0)]
    estimates = step_costs(prefill=0.2, decode=0.01)
    # With a batch of 1, decodes alone would need 1.5 seconds a second.
    cycle = decode_cycle(specs, estimates)
    demands = expected_demand(specs, estimates).values()
    total = sum(demand.prefill_seconds + demand.decode_seconds for demand in demands)
    longest = 8 / 50
    least = 0.6 + sum(decode_demand(spec, estimates, longest) for spec in specs)
    assert 0 < cycle < longest
    assert total == pytest.approx(1 - SPARE_PART * (1 - least), rel=0.02)


def test_prefills_of_a_busy_unit_get_the_time_that_they_need() -> None:
    specs = [model("a", rate=3.0), model("b", rate=0.5)]
    estimates = step_costs(prefill=0.2, decode=0.01)
    scheduler = Scheduler(specs, 10 + 10 * 400, create_policy("adbs"), demand=expected_demand)
    scheduler.estimates = estimates
    shares = scheduler.fair_share
    demands = expected_demand(specs, estimates)
    shares.set_demand(
        {
            (name, phase): seconds
            for name, demand in demands.items()
            for phase, seconds in (
                ("prefill", demand.prefill_seconds),
                ("decode", demand.decode_seconds),
            )
        }
    )
    assert shares.shares["a", "prefill"] > 0.9 * demands["a"].prefill_seconds


def test_overloaded_unit_is_planned_with_full_batches() -> None:
    specs = [model("a", rate=20.0)]
    assert decode_cycle(specs, step_costs(prefill=0.2, decode=0.01)) == pytest.approx(8 / 1000)


def test_model_without_load_has_no_demand() -> None:
    specs = [model(rate=0.0, prompt=0.0, output=0.0)]
    demand = expected_demand(specs, StepEstimates(["a"]))["a"]
    assert (demand.kv, demand.prefill_seconds, demand.decode_seconds) == (0.0, 0.0, 0.0)


def test_quotas_and_shares_follow_expected_demand() -> None:
    specs = [model("popular", rate=3.0), model("rare", rate=1.0)]
    scheduler = Scheduler(specs, 10 + 10 * 400, create_policy("adbs"), demand=expected_demand)
    quotas = scheduler.quotas.quotas
    assert quotas["popular"] == 3 * quotas["rare"]
    # Apart from the even part, time shares follow the rates.
    beyond = {key: share - EVEN_PART / 4 for key, share in scheduler.fair_share.shares.items()}
    assert beyond["popular", "prefill"] == pytest.approx(3 * beyond["rare", "prefill"])
