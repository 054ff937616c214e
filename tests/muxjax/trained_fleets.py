"""Fleets of the trained tiny models, and random requests to them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from muxjax import Fleet, SamplingParams
from muxjax.scheduling.steps import TokenLogprobs
from tests import tiny

MAX_MODEL_LEN = 192
"""`max_model_len` of all three. One such request of the Gemma uses most of the pool."""


@dataclass(frozen=True)
class ClientRequest:
    """A request, and the number of tokens after which its client cancels it."""

    model: str
    prompt: str | list[int]
    params: SamplingParams
    cancel_after: int | None


@dataclass(frozen=True)
class ReceivedOutput:
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    reason: str


def fleet(*models: str, memory: str, policy: str = "adbs", **engine: int) -> dict:
    return {
        "models": [
            {
                "name": name,
                "source": str(tiny.trained() / name / "orbax"),
                "max_model_len": MAX_MODEL_LEN,
                "prompt_tokens": 48,
                "output_tokens": 32,
            }
            for name in models
        ],
        "pool": {"memory": memory},
        "policy": policy,
        "engine": engine,
    }


def random_params(rng: random.Random) -> SamplingParams:
    """Random parameters: half are greedy, and at least a third set each other parameter."""

    def sometimes(low: float, high: float, otherwise: float) -> float:
        return rng.uniform(low, high) if rng.random() < 1 / 3 else otherwise

    return SamplingParams(
        max_tokens=rng.choice([1, 2, 9, 20, 40, 60, 500]),
        temperature=rng.choice([0.0, rng.uniform(0.3, 1.5)]),
        top_k=rng.choice([0, 0, 1, 5, 40]),
        top_p=sometimes(0.3, 0.99, 1.0),
        min_p=sometimes(0.01, 0.3, 0.0),
        repetition_penalty=sometimes(0.8, 1.5, 1.0),
        presence_penalty=sometimes(-1.0, 1.0, 0.0),
        frequency_penalty=sometimes(-0.5, 1.0, 0.0),
        seed=rng.getrandbits(64),
        stop=rng.choice([(), (), ("thou",), ("\n\n", "shade")]),
        stop_token_ids=rng.choice([(), (), (ord("."),), (ord(";"), ord("?"))]),
        logprobs=rng.choice([None, 0, 3]),
    )


def stream_output(loaded: Fleet, request: ClientRequest, *, cancel: bool = True) -> ReceivedOutput:
    """The output that a client receives; with `cancel=False` it does not cancel its request."""
    cancel_after = request.cancel_after if cancel else None
    text, tokens, logprobs, reason = "", [], [], None
    with loaded.stream(request.model, request.prompt, request.params) as stream:
        if cancel_after == 0:
            stream.cancel()
        for delta in stream:
            text += delta.text
            tokens += delta.token_ids
            logprobs += delta.logprobs or []
            reason = delta.finish_reason
            if cancel_after is not None and len(tokens) >= cancel_after:
                stream.cancel()
    assert reason is not None
    return ReceivedOutput(text, tokens, logprobs, reason)
