"""Answers with the prefix cache on and off: the same, token for token, on trained models.

The requests share beginnings, as conversations and system prompts do. They arrive at once, on a
pool so small that requests are preempted and cached blocks are evicted all the time. Freed pages
hold NaN, so that a hit in a block that was reused shows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from muxjax import Fleet, SamplingParams
from tests import tiny
from tests.muxjax.trained_fleets import LONGEST, Answer, Ask, ask, fleet, random_params

pytestmark = pytest.mark.slow

NUM_REQUESTS = 40
CLIENTS = 12


def alike_asks(seed: int) -> list[Ask]:
    """Requests with few different beginnings and all kinds of sampling parameters."""
    rng = random.Random(seed)
    text = tiny.learned()
    beginnings = [text[: rng.randrange(60, 130)], text[40:150], "thou " * 24]
    asks = []
    for _ in range(NUM_REQUESTS):
        begin = rng.choice(beginnings)
        prompt = begin[: rng.choice([len(begin), 64, 96])] + text[: rng.randrange(0, 30)]
        params = random_params(rng)
        if rng.random() < 0.5:  # as most requests are; a repetition penalty finds nothing
            params = SamplingParams(
                max_tokens=params.max_tokens, temperature=0.0, logprobs=params.logprobs
            )
        asks.append(Ask(rng.choice(tiny.FAMILIES), prompt[: LONGEST - 2], params, None))
    return asks


def ask_all(loaded: Fleet, asks: list[Ask], clients: int) -> list[Answer]:
    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(lambda question: ask(loaded, question), asks))


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    return alike_asks(seed=3)


def config(prefix_cache: bool) -> dict:
    sizes = {"max_seqs": 8, "prefill_tokens": 64, "decode_tokens": 4}
    found = fleet(*tiny.FAMILIES, memory="2500kB", **sizes)
    found["pool"]["prefix_cache"] = prefix_cache
    return found


@pytest.fixture(scope="module")
def computed(asks: list[Ask]) -> list[Answer]:
    """Without a cache, one after the other."""
    with Fleet.load(config(False)) as loaded:
        answers = ask_all(loaded, asks, 1)
        models = loaded.stats()["models"].values()
        assert sum(model["prefix_queries"] + model["kv_pages_cached"] for model in models) == 0
    return answers


@pytest.fixture(scope="module")
def small() -> Iterator[Fleet]:
    with Fleet.load(config(True), poison=True) as loaded:
        yield loaded


def test_a_crowd_on_a_small_pool_gets_what_is_computed_without_a_cache(
    small: Fleet, asks: list[Ask], computed: list[Answer]
) -> None:
    for clients in (CLIENTS, 1):
        found = ask_all(small, asks, clients)
        for question, mine, other in zip(asks, found, computed, strict=True):
            assert (mine.tokens, mine.text, mine.reason) == (
                other.tokens,
                other.text,
                other.reason,
            ), question
            for own, wanted in zip(mine.logprobs, other.logprobs, strict=True):
                np.testing.assert_allclose(own.logprob, wanted.logprob, atol=1e-3)
        small.units[0].engine.call(lambda unit: unit.check_invariants())
    after = small.stats()
    models = after["models"]
    assert after["requests"] == 0
    assert after["free_pages"] + after["cached_pages"] == after["usable_pages"]
    assert all(model["kv_pages_used"] == 0 for model in models.values())
    assert all(model["prefix_hits"] > 0 for model in models.values())
    assert sum(model["preemptions"] for model in models.values()) > 0


def test_a_restart_forgets_what_the_pool_held(small: Fleet) -> None:
    greedy = SamplingParams(max_tokens=8, temperature=0.0)
    prompt = tiny.learned()[:100]
    (wanted,) = small.generate("gemma3", prompt, greedy)
    (again,) = small.generate("gemma3", prompt, greedy)
    assert again.num_cached_tokens > 0
    small.restart("0", "for the test")
    assert small.stats()["models"]["gemma3"]["kv_pages_cached"] == 0
    (fresh,) = small.generate("gemma3", prompt, greedy)
    assert fresh.num_cached_tokens == 0
    assert fresh.token_ids == again.token_ids == wanted.token_ids


def test_a_repetition_penalty_and_logprobs_of_the_prompt_see_all_of_it(small: Fleet) -> None:
    """Such requests do not use the prefix cache, though it has their prompt."""
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
