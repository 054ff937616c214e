from __future__ import annotations

import json

import pytest

from muxjax.errors import PlanError
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.upstream_estimator import (
    UpstreamEstimator,
    supports_profile,
    upstream_model,
)
from muxjax.scheduling.expected_load import ExpectedLoad
from tests.placement.data import a100_profile
from tests.placement.planner.harness import flat_profile


def estimator(*rates: float, devices: int = 4, **times: float) -> UpstreamEstimator:
    members = [
        upstream_model(ModelLoad(f"m{i}", "llama-7b", ExpectedLoad(rate)))
        for i, rate in enumerate(rates)
    ]
    return UpstreamEstimator(flat_profile(**times), members, devices)


def test_a_model_alone_is_served_at_a_batch_by_bisection() -> None:
    found = estimator(2.0).candidate("m0", 1)
    assert found is not None
    # 2 = B / (337 (0.02 + 0.0001 B) + 0.01), so B = 14.5; the bisection stops within one of it.
    assert (found.percent, found.throughput) == (30, 2.0)
    assert found.batch in (13, 14, 15)


def test_batches_round_up_to_the_next_profiled_one() -> None:
    assert estimator(6.0).score_unit(1, (("m0", 30),))[0] == pytest.approx(6.0, abs=0.6)  # at 51
    profile = flat_profile()
    for batch in ("64", "128"):
        for length in ("128", "256", "512"):
            profile["llama-7b"]["1"]["30"][batch][length]["decoding"] = 1000.0
    slow = UpstreamEstimator(
        profile, [upstream_model(ModelLoad("m0", "llama-7b", ExpectedLoad(6.0)))], 1
    )
    # Now 33 sequences cost as much as 64 do, so that 32 serve most.
    assert slow.score_unit(1, (("m0", 30),))[0] <= 32 / (337 * 0.0232 + 0.01)


def test_a_unit_whose_batches_are_at_their_caps_scores_nothing() -> None:
    # One 7B model for whose KV nothing is left: the pool of the formula is 78.4 - 14 - 6 GB.
    members = [
        upstream_model(ModelLoad(f"m{i}", "llama-7b", ExpectedLoad(1000.0))) for i in range(4)
    ]
    crowded = UpstreamEstimator(flat_profile(), members, 4)
    score, throughputs = crowded.score_unit(1, tuple((m.name, 30) for m in members))
    assert (score, throughputs) == (0.0, [])


def test_scores_are_weighted_by_rates_and_may_exceed_them() -> None:
    one = estimator(1.0, 3.0)
    score, throughputs = one.score_unit(2, (("m0", 30), ("m1", 30)))
    assert score == pytest.approx((throughputs[0] * 1 + throughputs[1] * 3) / 4)


def test_replicas_are_other_models_to_it() -> None:
    one = estimator(4.0)
    half = one.add_replica("m0", 0.5)
    assert one.models[half].rate == 2.0
    assert one.add_replica("m0", 1.0) == "m0"


def test_only_llama_is_known() -> None:
    with pytest.raises(PlanError, match="gpt: the upstream-compatible estimator knows llama-7b"):
        upstream_model(ModelLoad("gpt", "gpt-2", ExpectedLoad(1.0)))
    profile = flat_profile()
    assert supports_profile(profile, {"llama-7b"})
    assert not supports_profile({"gpt-2": profile["llama-7b"]}, {"gpt-2"})
    del profile["llama-7b"]["1"]["100"]
    assert not supports_profile(profile, {"llama-7b"})


def test_a_size_that_was_not_profiled_is_no_candidate() -> None:
    assert estimator(1.0).candidate("m0", 8) is None


def test_muxserves_profile() -> None:
    profile = json.loads(a100_profile().read_text())
    thirty = UpstreamEstimator(
        profile, [upstream_model(ModelLoad("a", "llama-30b", ExpectedLoad(1.0)))], 8
    )
    assert thirty.candidate("a", 1) is None
    assert thirty.candidate("a", 2) is not None
    assert thirty.candidate("a", 8) is None
