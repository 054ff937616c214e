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


def test_bisection_finds_the_batch_of_an_isolated_model() -> None:
    candidate = estimator(2.0).candidate("m0", 1)
    assert candidate is not None
    # 2 = B / (337 (0.02 + 0.0001 B) + 0.01), so B = 14.5; the bisection stops within 1 of it.
    assert (candidate.percent, candidate.throughput) == (30, 2.0)
    assert candidate.batch in (13, 14, 15)


def test_batches_round_up_to_the_next_profiled_batch() -> None:
    # The batch is 51.
    assert estimator(6.0).score_unit(1, (("m0", 30),))[0] == pytest.approx(6.0, abs=0.6)
    profile = flat_profile()
    for batch in ("64", "128"):
        for length in ("128", "256", "512"):
            profile["llama-7b"]["1"]["30"][batch][length]["decoding"] = 1000.0
    slow = UpstreamEstimator(
        profile, [upstream_model(ModelLoad("m0", "llama-7b", ExpectedLoad(6.0)))], 1
    )
    # Now 33 sequences cost as much as 64, so a batch of 32 has the highest throughput.
    assert slow.score_unit(1, (("m0", 30),))[0] <= 32 / (337 * 0.0232 + 0.01)


def test_a_unit_with_all_batches_at_their_limits_scores_0() -> None:
    # Four models of 14 GB and 6 GB of activations exceed 78.4 GB, so the KV pool is empty.
    members = [
        upstream_model(ModelLoad(f"m{i}", "llama-7b", ExpectedLoad(1000.0))) for i in range(4)
    ]
    crowded = UpstreamEstimator(flat_profile(), members, 4)
    score, throughputs = crowded.score_unit(1, tuple((m.name, 30) for m in members))
    assert (score, throughputs) == (0.0, [])


def test_scores_are_weighted_by_rates_and_may_exceed_them() -> None:
    score, throughputs = estimator(1.0, 3.0).score_unit(2, (("m0", 30), ("m1", 30)))
    assert score == pytest.approx((throughputs[0] * 1 + throughputs[1] * 3) / 4)


def test_replicas_are_separate_models() -> None:
    upstream = estimator(4.0)
    half = upstream.add_replica("m0", 0.5)
    assert upstream.models[half].rate == 2.0
    assert upstream.add_replica("m0", 1.0) == "m0"


def test_only_llama_models_are_supported() -> None:
    with pytest.raises(PlanError, match="gpt: the upstream-compatible estimator supports llama-7b"):
        upstream_model(ModelLoad("gpt", "gpt-2", ExpectedLoad(1.0)))
    profile = flat_profile()
    assert supports_profile(profile, {"llama-7b"})
    assert not supports_profile({"gpt-2": profile["llama-7b"]}, {"gpt-2"})
    del profile["llama-7b"]["1"]["100"]
    assert not supports_profile(profile, {"llama-7b"})


def test_a_mesh_size_without_profile_has_no_candidate() -> None:
    assert estimator(1.0).candidate("m0", 8) is None


def test_muxserves_profile_limits_the_mesh_sizes() -> None:
    profile = json.loads(a100_profile().read_text())
    upstream = UpstreamEstimator(
        profile, [upstream_model(ModelLoad("a", "llama-30b", ExpectedLoad(1.0)))], 8
    )
    assert upstream.candidate("a", 1) is None
    assert upstream.candidate("a", 2) is not None
    assert upstream.candidate("a", 8) is None
