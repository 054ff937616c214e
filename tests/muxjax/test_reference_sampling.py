"""Sampling of a fleet against numpy, from the logits of the dense model.

A model with 20 tokens can report all log-probabilities, so that they are compared completely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax import Fleet, SamplingParams
from muxjax.models.checkpoints.loading import open_checkpoint
from muxjax.models.nn.decoder import Decoder
from tests.muxjax.tiny_fleets import entry, fleet

VOCAB = 20
EOS = 19
PROMPT = [3, 1, 4, 1, 5, 9]


def small_model() -> dict[str, Any]:
    small = entry("llama")
    return {**small, "config": {**small["config"], "vocab_size": VOCAB, "eos_token_id": EOS}}


@pytest.fixture(scope="module")
def loaded() -> Iterator[Fleet]:
    with Fleet.load({**fleet(), "models": [small_model()]}) as small_fleet:
        yield small_fleet


@pytest.fixture(scope="module")
def dense() -> Callable[[list[int]], np.ndarray]:
    """Logits after each of up to 64 tokens, without pool, slots or steps."""
    model = small_model()
    checkpoint = open_checkpoint(model["source"], config_mapping=model["config"], progress=False)
    params = {name: jnp.asarray(value) for name, value in checkpoint.weights()}
    decoder = Decoder(checkpoint.config, params)

    def logits(tokens: list[int]) -> np.ndarray:
        padded = jnp.asarray([tokens + [0] * (64 - len(tokens))])
        return np.asarray(decoder.dense_logits(padded))[0, : len(tokens)]

    return logits


def reference(raw: np.ndarray, output: list[int], position: int, params: SamplingParams) -> int:
    """The token that `params` select from raw logits, after this output."""
    logits = raw.astype(np.float64)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    counts = np.bincount(output, minlength=VOCAB)
    seen = (counts > 0) | (np.bincount(PROMPT, minlength=VOCAB) > 0)
    factor = params.repetition_penalty
    logits = np.where(seen, np.where(logits > 0, logits / factor, logits * factor), logits)
    logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    if len(output) < params.min_tokens:
        logits[EOS] = -np.inf
    if params.greedy:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / params.temperature)
    if params.top_k:
        weights[weights < np.sort(weights)[-min(params.top_k, VOCAB)]] = 0
    if params.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        enough = np.cumsum(weights[order]) >= params.top_p * weights.sum()
        weights[weights < weights[order[enough.argmax()]]] = 0
    weights[weights < params.min_p * weights.max()] = 0
    seed = np.array([params.seed >> 32, params.seed & 0xFFFFFFFF], np.uint32)
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    uniform = float(jax.random.uniform(jax.random.fold_in(key, position)))
    return int((np.cumsum(weights) > uniform * weights.sum()).argmax())


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "bias": {"logit_bias": {7: 2.5, 2: -100.0, 11: 1.0}},
    "a banned token": {"temperature": 0.0, "logit_bias": dict.fromkeys(range(0, 20, 2), -100.0)},
    "a forced token": {"logit_bias": {13: 100.0}},
    "repetition": {"repetition_penalty": 1.7},
    "presence and frequency": {"presence_penalty": 1.5, "frequency_penalty": -0.75},
    "penalties and bias": {
        "temperature": 0.0,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.3,
        "logit_bias": {3: 1.5, 8: -2.0},
    },
    "min_p": {"min_p": 0.6, "temperature": 1.5},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.4},
    "all": {"top_k": 9, "top_p": 0.8, "min_p": 0.1, "temperature": 0.7, "logit_bias": {1: 0.5}},
    "min_tokens": {"min_tokens": 20, "logit_bias": {EOS: 3.0}},
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logprobs_match_the_reference(
    loaded: Fleet, dense: Callable[[list[int]], np.ndarray], case: str
) -> None:
    values = {"max_tokens": 24, "seed": 2**40 + 5, **CASES[case]}
    params = SamplingParams(logprobs=VOCAB, ignore_eos="min_tokens" not in values, **values)
    answer = loaded.generate("llama", PROMPT, params)[0]
    assert answer.logprobs is not None
    logits = dense(PROMPT + answer.token_ids)[len(PROMPT) - 1 :]
    for index, logprobs in enumerate(answer.logprobs):
        position = len(PROMPT) + index
        expected = reference(logits[index], answer.token_ids[:index], position, params)
        assert answer.token_ids[index] == expected
        values = logits[index] - np.logaddexp.reduce(logits[index])
        assert logprobs.logprob == pytest.approx(values[expected], abs=1e-4)
        assert dict(logprobs.top) == pytest.approx(dict(enumerate(values)), abs=1e-4)
    if case == "min_tokens":
        assert answer.finish_reason == "stop"
        assert len(answer.token_ids) >= 21
        assert EOS not in answer.token_ids[:20]
    else:
        assert len(answer.token_ids) == 24


def test_requests_do_not_affect_each_other(loaded: Fleet) -> None:
    """Concurrent requests, in reused slots, have the same tokens as isolated ones."""
    params = [
        SamplingParams(max_tokens=12, seed=index, ignore_eos="min_tokens" not in case, **case)
        for index, case in enumerate(CASES.values())
        if "min_tokens" not in case
    ]
    isolated = [loaded.generate("llama", PROMPT, single)[0].token_ids for single in params]
    concurrent = loaded.generate("llama", [PROMPT] * len(params), params)
    assert [answer.token_ids for answer in concurrent] == isolated


@pytest.mark.parametrize("length", [2, 31, 70])
def test_prompt_logprobs(loaded: Fleet, length: int) -> None:
    """Prompts of one or several chunks have the log-probabilities of generated tokens."""
    prompt = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=3)
    plain = SamplingParams(max_tokens=1, temperature=0.0, logprobs=VOCAB)
    answers = loaded.generate("llama", [prompt, prompt[:1], prompt], [params, params, plain])
    prompt_logprobs = answers[0].prompt_logprobs
    assert prompt_logprobs is not None
    assert len(prompt_logprobs) == length - 1
    assert answers[0].token_ids == answers[2].token_ids
    assert (answers[1].prompt_logprobs, answers[2].prompt_logprobs) == ([], None)
    for at in sorted({1, length // 2, length - 1}):
        generated = loaded.generate("llama", prompt[:at], plain)[0].logprobs
        assert generated is not None
        expected = dict(generated[0].top)
        logprobs = prompt_logprobs[at - 1]
        assert logprobs.logprob == pytest.approx(expected[prompt[at]], abs=2e-5)
        assert [token for token, _ in logprobs.top] == [t for t, _ in generated[0].top[:3]]
