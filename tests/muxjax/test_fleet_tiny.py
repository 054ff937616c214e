"""Three trained models of different L, K and H on a small pool, against the same models isolated.

Pages change owners often, and freed pages are filled with NaN: a page read by a request that does
not own it, or a token written to the wrong row, changes the output.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from muxjax import Fleet
from tests import tiny
from tests.compiles import counted_compiles
from tests.muxjax.trained_fleets import (
    MAX_MODEL_LEN,
    ClientRequest,
    ReceivedOutput,
    fleet,
    random_params,
    stream_output,
)

pytestmark = pytest.mark.slow

NUM_REQUESTS = 90
CLIENTS = 24


def random_requests(seed: int) -> list[ClientRequest]:
    rng = random.Random(seed)
    text = tiny.TEXT.read_text("utf-8")
    lines = tiny.learned().splitlines(keepends=True)
    requests = []
    for _ in range(NUM_REQUESTS):
        kind = rng.randrange(3)
        if kind == 0:  # memorized by the models
            prompt: str | list[int] = "".join(lines[rng.randrange(len(lines) - 4) :])[
                : rng.randrange(12, 100)
            ]
        elif kind == 1:  # not memorized, of any length
            start = rng.randrange(len(text) - MAX_MODEL_LEN)
            prompt = text[start : start + rng.randrange(1, MAX_MODEL_LEN)]
        else:
            prompt = [rng.randrange(256) for _ in range(rng.choice([1, 3, 30, 150]))]
        cancel_after = rng.choice([0, 1, 5, 30]) if rng.random() < 0.2 else None
        model = rng.choice(tiny.FAMILIES)
        requests.append(ClientRequest(model, prompt, random_params(rng), cancel_after))
    return requests


def assert_same(request: ClientRequest, output: ReceivedOutput, isolated: ReceivedOutput) -> None:
    if output.reason == "cancelled":
        assert request.cancel_after is not None
        assert output.tokens == isolated.tokens[: len(output.tokens)], request
        assert isolated.text.startswith(output.text), request
    else:
        assert (output.tokens, output.text, output.reason) == (
            isolated.tokens,
            isolated.text,
            isolated.reason,
        ), request
    for logprobs, expected in zip(output.logprobs, isolated.logprobs, strict=False):
        np.testing.assert_allclose(logprobs.logprob, expected.logprob, atol=1e-3)
        assert len(logprobs.top) == request.params.logprobs


@pytest.fixture(scope="module")
def requests() -> list[ClientRequest]:
    return random_requests(seed=0)


@pytest.fixture(scope="module")
def isolated_outputs(requests: list[ClientRequest]) -> list[ReceivedOutput]:
    """The outputs of one request at a time, in a fleet with only its model and a large pool."""
    outputs = {}
    for name in tiny.FAMILIES:
        # Different buckets from the fleet under test, so that no result is equal by accident.
        with Fleet.load(fleet(name, memory="16MB", max_seqs=1, prefill_tokens=16)) as loaded:
            for index, request in enumerate(requests):
                if request.model == name:
                    outputs[index] = stream_output(loaded, request, cancel=False)
    return [outputs[index] for index in range(len(requests))]


def test_requests_cover_all_models_and_finish_reasons(
    requests: list[ClientRequest], isolated_outputs: list[ReceivedOutput]
) -> None:
    assert {output.reason for output in isolated_outputs} == {"stop", "length"}
    assert sum(len(output.tokens) for output in isolated_outputs) > 20 * NUM_REQUESTS
    assert sum(request.cancel_after is not None for request in requests) > NUM_REQUESTS / 10
    assert {request.model for request in requests} == set(tiny.FAMILIES)
    sonnet = tiny.learned() * 2
    texts = [
        output.text
        for request, output in zip(requests, isolated_outputs, strict=True)
        if request.params.greedy and not request.params.penalized
        if isinstance(request.prompt, str) and request.prompt in sonnet
    ]
    assert any(len(text) > 20 and text in sonnet for text in texts)


@pytest.mark.parametrize("policy", ["adbs", "fcfs", "round_robin"])
def test_concurrent_outputs_on_a_small_pool_match_isolated_ones(
    policy: str, requests: list[ClientRequest], isolated_outputs: list[ReceivedOutput]
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
            outputs = list(clients.map(lambda request: stream_output(loaded, request), requests))
        after = loaded.stats()
    for request, output, isolated in zip(requests, outputs, isolated_outputs, strict=True):
        assert_same(request, output, isolated)
    assert compiled == []
    assert after["pool_address"] == before["pool_address"]
    assert after["requests"] == 0
    assert after["free_pages"] + after["cached_pages"] == after["usable_pages"]
    models = after["models"].values()
    assert all(model["kv_pages_used"] == 0 for model in models)
    assert sum(model["preemptions"] for model in models) > 0
    assert any(output.reason == "cancelled" for output in outputs)
