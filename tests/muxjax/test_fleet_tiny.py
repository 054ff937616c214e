"""Three trained models of different L, K and H on one small pool, against each of them isolated.

Pages change owners all the time, and freed pages hold NaN: a page read by a request that does not
own it, or a token written to the wrong row, changes the output.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from muxjax import Fleet
from tests import tiny
from tests.compiles import counted_compiles
from tests.muxjax.trained_fleets import LONGEST, Answer, Ask, ask, fleet, random_params

pytestmark = pytest.mark.slow

NUM_REQUESTS = 90
CLIENTS = 24


def random_asks(seed: int) -> list[Ask]:
    rng = random.Random(seed)
    text = tiny.TEXT.read_text("utf-8")
    lines = tiny.learned().splitlines(keepends=True)
    asks = []
    for _ in range(NUM_REQUESTS):
        kind = rng.randrange(3)
        if kind == 0:  # known by heart
            prompt: str | list[int] = "".join(lines[rng.randrange(len(lines) - 4) :])[
                : rng.randrange(12, 100)
            ]
        elif kind == 1:  # not known, of any length
            start = rng.randrange(len(text) - LONGEST)
            prompt = text[start : start + rng.randrange(1, LONGEST)]
        else:
            prompt = [rng.randrange(256) for _ in range(rng.choice([1, 3, 30, 150]))]
        leaves = rng.choice([0, 1, 5, 30]) if rng.random() < 0.2 else None
        asks.append(Ask(rng.choice(tiny.FAMILIES), prompt, random_params(rng), leaves))
    return asks


def assert_same(question: Ask, found: Answer, alone: Answer) -> None:
    if found.reason == "cancelled":
        assert question.leaves_after is not None
        assert found.tokens == alone.tokens[: len(found.tokens)], question
        assert alone.text.startswith(found.text), question
    else:
        assert (found.tokens, found.text, found.reason) == (
            alone.tokens,
            alone.text,
            alone.reason,
        ), question
    for mine, other in zip(found.logprobs, alone.logprobs, strict=False):
        np.testing.assert_allclose(mine.logprob, other.logprob, atol=1e-3)
        assert len(mine.top) == question.params.logprobs


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    return random_asks(seed=0)


@pytest.fixture(scope="module")
def alone(asks: list[Ask]) -> list[Answer]:
    """Each request isolated, in a fleet with only its model and more pages than it needs."""
    answers = {}
    for name in tiny.FAMILIES:
        # Other buckets than in the fleet under test, so that no result is equal by accident.
        with Fleet.load(fleet(name, memory="16MB", max_seqs=1, prefill_tokens=16)) as loaded:
            for index, question in enumerate(asks):
                if question.model == name:
                    answers[index] = ask(loaded, question, stays=True)
    return [answers[index] for index in range(len(asks))]


def test_the_run_has_everything(asks: list[Ask], alone: list[Answer]) -> None:
    """The requests cover all kinds of ends and models."""
    reasons = [answer.reason for answer in alone]
    assert {"stop", "length"} == set(reasons)
    assert sum(len(answer.tokens) for answer in alone) > 20 * NUM_REQUESTS
    assert sum(question.leaves_after is not None for question in asks) > NUM_REQUESTS / 10
    assert {question.model for question in asks} == set(tiny.FAMILIES)
    sonnet = tiny.learned() * 2
    by_heart = [
        answer
        for question, answer in zip(asks, alone, strict=True)
        if question.params.greedy and not question.params.penalized
        if isinstance(question.prompt, str) and question.prompt in sonnet
    ]
    assert any(len(answer.text) > 20 and answer.text in sonnet for answer in by_heart)


@pytest.mark.parametrize("policy", ["adbs", "fcfs", "round_robin"])
def test_any_mix_on_one_small_pool_is_as_alone(
    policy: str, asks: list[Ask], alone: list[Answer]
) -> None:
    config = fleet(
        *tiny.FAMILIES,
        memory="2500kB",
        policy=policy,
        max_seqs=8,
        prefill_tokens=64,
        decode_tokens=4,
    )
    with Fleet.load(config, poison=True) as loaded:
        before = loaded.stats()
        with counted_compiles() as compiled, ThreadPoolExecutor(CLIENTS) as clients:
            found = list(clients.map(lambda question: ask(loaded, question), asks))
        after = loaded.stats()
    for question, mine, other in zip(asks, found, alone, strict=True):
        assert_same(question, mine, other)
    assert compiled == []
    assert after["pool_address"] == before["pool_address"]
    assert after["requests"] == 0
    assert after["free_pages"] + after["cached_pages"] == after["usable_pages"]
    models = after["models"].values()
    assert all(model["kv_pages_used"] == 0 for model in models)
    assert sum(model["preemptions"] for model in models) > 0
    assert any(answer.reason == "cancelled" for answer in found)
