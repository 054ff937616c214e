from __future__ import annotations

import pytest

from muxjax.scheduling.demand import (
    decode_batch,
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


def test_decode_time_falls_with_the_batch() -> None:
    estimates = StepEstimates(["a"])
    estimates.observe_decode("a", 1, 1, 0.01)
    # 2 requests a second of 50 tokens of 0.01 s are one at a time.
    assert decode_batch(model(), estimates) == pytest.approx(1.0)
    assert decode_demand(model(), estimates) == pytest.approx(1.0)
    # Four times the rate, and steps of several sequences take a little longer.
    for size in (2, 4, 8):
        estimates.observe_decode("a", size, 1, 0.0125)
    busy = model(rate=8.0)
    assert decode_batch(busy, estimates) == pytest.approx(5.0)
    assert decode_demand(busy, estimates) == pytest.approx(8 * 50 * 0.0125 / 5)


def test_the_batch_is_limited_by_slots() -> None:
    estimates = StepEstimates(["a"], decode_seconds=0.01)
    assert decode_batch(model(rate=100.0), estimates) == 8.0
    assert decode_demand(model(rate=100.0), estimates) == pytest.approx(100 * 50 * 0.01 / 8)


def test_model_without_load_has_no_demand() -> None:
    demand = expected_demand(model(rate=0.0, prompt=0.0, output=0.0), StepEstimates(["a"]))
    assert (demand.kv, demand.prefill_seconds, demand.decode_seconds) == (0.0, 0.0, 0.0)


def test_quotas_and_shares_follow_expected_demand() -> None:
    specs = [model("popular", rate=3.0), model("rare", rate=1.0)]
    scheduler = Scheduler(specs, 10 + 10 * 400, create_policy("adbs"), demand=expected_demand)
    quotas = scheduler.quotas.quotas
    assert quotas["popular"] == 3 * quotas["rare"]
    # Apart from the even part, time shares follow the rates.
    beyond = {key: share - EVEN_PART / 4 for key, share in scheduler.fair_share.shares.items()}
    assert beyond["popular", "prefill"] == pytest.approx(3 * beyond["rare", "prefill"])
