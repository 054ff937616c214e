"""Trained models generate the same tokens with and without the prefix cache.

The requests share prefixes, as conversations and system prompts do. They are concurrent, on a pool
so small that requests are preempted and cached blocks are evicted. Freed pages are filled with NaN,
so that a hit in a freed block changes the output.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from muxjax import Fleet, SamplingParams
from tests import tiny
from tests.muxjax.trained_fleets import (
    MAX_MODEL_LEN,
    ClientRequest,
    ReceivedOutput,
    fleet,
    random_params,
    stream_output,
)

pytestmark = pytest.mark.slow

NUM_REQUESTS = 40
CLIENTS = 12


def requests_with_shared_prefixes(seed: int) -> list[ClientRequest]:
    """Requests with a few different prefixes and random sampling parameters."""
    rng = random.Random(seed)
    text = tiny.learned()
    prefixes = [text[: rng.randrange(60, 130)], text[40:150], "thou " * 24]
    requests = []
    for _ in range(NUM_REQUESTS):
        prefix = rng.choice(prefixes)
        prompt = prefix[: rng.choice([len(prefix), 64, 96])] + text[: rng.randrange(0, 30)]
        params = random_params(rng)
        if rng.random() < 0.5:  # requests with a repetition penalty do not use the cache
            params = SamplingParams(
                max_tokens=params.max_tokens, temperature=0.0, logprobs=params.logprobs
            )
        model = rng.choice(tiny.FAMILIES)
        requests.append(ClientRequest(model, prompt[: MAX_MODEL_LEN - 2], params, None))
    return requests


def stream_all(loaded: Fleet, requests: list[ClientRequest], clients: int) -> list[ReceivedOutput]:
    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(lambda request: stream_output(loaded, request), requests))


@pytest.fixture(scope="module")
def requests() -> list[ClientRequest]:
    return requests_with_shared_prefixes(seed=3)


def config(prefix_cache: bool) -> dict:
    sizes = {"max_seqs": 8, "prefill_tokens": 64, "decode_tokens": 4}
    keys = fleet(*tiny.FAMILIES, memory="2500kB", **sizes)
    keys["pool"]["prefix_cache"] = prefix_cache
    return keys


@pytest.fixture(scope="module")
def expected_outputs(requests: list[ClientRequest]) -> list[ReceivedOutput]:
    """The outputs without a cache, of one request at a time."""
    with Fleet.load(config(False)) as loaded:
        outputs = stream_all(loaded, requests, 1)
        models = loaded.stats()["models"].values()
        assert sum(model["prefix_queries"] + model["kv_pages_cached"] for model in models) == 0
    return outputs


@pytest.fixture(scope="module")
def small() -> Iterator[Fleet]:
    with Fleet.load(config(True), poison=True) as loaded:
        yield loaded


def test_outputs_on_a_small_pool_match_those_without_a_cache(
    small: Fleet, requests: list[ClientRequest], expected_outputs: list[ReceivedOutput]
) -> None:
    for clients in (CLIENTS, 1):
        outputs = stream_all(small, requests, clients)
        for request, output, expected in zip(requests, outputs, expected_outputs, strict=True):
            assert (output.tokens, output.text, output.reason) == (
                expected.tokens,
                expected.text,
                expected.reason,
            ), request
            for logprobs, right in zip(output.logprobs, expected.logprobs, strict=True):
                np.testing.assert_allclose(logprobs.logprob, right.logprob, atol=1e-3)
        small.units[0].engine.call(lambda unit: unit.check_invariants())
    after = small.stats()
    models = after["models"]
    assert after["requests"] == 0
    assert after["free_pages"] + after["cached_pages"] == after["usable_pages"]
    assert all(model["kv_pages_used"] == 0 for model in models.values())
    assert all(model["prefix_hits"] > 0 for model in models.values())
    assert sum(model["preemptions"] for model in models.values()) > 0


def test_a_restart_clears_the_prefix_cache(small: Fleet) -> None:
    greedy = SamplingParams(max_tokens=8, temperature=0.0)
    prompt = tiny.learned()[:100]
    (first,) = small.generate("gemma3", prompt, greedy)
    (cached,) = small.generate("gemma3", prompt, greedy)
    assert cached.num_cached_tokens > 0
    small.restart("0", "for the test")
    assert small.stats()["models"]["gemma3"]["kv_pages_cached"] == 0
    (restarted,) = small.generate("gemma3", prompt, greedy)
    assert restarted.num_cached_tokens == 0
    assert restarted.token_ids == cached.token_ids == first.token_ids


def test_repetition_penalties_and_prompt_logprobs_bypass_the_prefix_cache(small: Fleet) -> None:
    prompt = tiny.learned()[:100]
    small.generate("llama", prompt, SamplingParams(max_tokens=1))
    for params in (
        SamplingParams(max_tokens=20, temperature=0.0, repetition_penalty=1.3),
        SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=1),
    ):
        (warm,) = small.generate("llama", prompt, params)
        small.restart("0", "for the test")
        (cold,) = small.generate("llama", prompt, params)
        assert warm == cold
        assert warm.num_cached_tokens == 0
