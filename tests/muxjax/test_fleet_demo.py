"""The demo models, served concurrently from one pool, against the outputs of `transformers`.

The models are downloaded unless they are in the user's cache.
"""

import asyncio
import random

import jax
import pytest

from muxjax import Fleet, SamplingParams
from muxjax.models.download.demo_models import DEMO_MODELS
from tests import golden

pytestmark = pytest.mark.slow

GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)


def fleet_config(memory: str, **engine: int) -> dict:
    return {
        "models": [
            {"name": name, "source": f"demo:{name}", "dtype": "float32", "max_model_len": 256}
            for name in golden.DEMO_NAMES
        ],
        "pool": {"memory": memory},
        "engine": {"max_seqs": 8, "prefill_tokens": 64, **engine},
    }


@pytest.fixture(scope="module")
def fleet():
    assert set(golden.DEMO_NAMES) <= set(DEMO_MODELS)
    with Fleet.load(fleet_config("1GB")) as loaded:
        yield loaded


async def generate_concurrently(
    fleet: Fleet, cases: list[tuple[str, golden.Greedy]]
) -> list[list[int]]:
    completions = await asyncio.gather(
        *(fleet.agenerate(name, case.prompt_ids, GREEDY) for name, case in cases)
    )
    return [completion.token_ids for (completion,) in completions]


def test_prompts_are_encoded_as_by_transformers(fleet):
    for name in ("smollm2-135m", "gemma3-270m"):
        for case in golden.greedy(name):
            assert fleet.models[name].tokenizer.encode(case.text) == case.prompt_ids


def test_isolated_outputs_match_transformers(fleet):
    for name in golden.DEMO_NAMES:
        for case in golden.greedy(name)[:2]:
            assert fleet.generate(name, case.prompt_ids, GREEDY)[0].token_ids == case.output_ids


def test_concurrent_outputs_match_transformers(fleet):
    cases = [(name, case) for name in golden.DEMO_NAMES for case in golden.greedy(name)]
    for seed in range(2):
        random.Random(seed).shuffle(cases)
        outputs = asyncio.run(generate_concurrently(fleet, cases))
        for (name, case), tokens in zip(cases, outputs, strict=True):
            assert tokens == case.output_ids, f"{name}: {case.text!r}"
    stats = fleet.stats()
    assert all(model["kv_pages_used"] == 0 for model in stats["models"].values())


def test_no_step_copies_the_pool(fleet):
    """The temporary memory of every program is below 5 % of a pool of 1 GB."""
    stats = fleet.stats()
    assert stats["pool_bytes"] > 0.99e9
    for program in stats["programs"]:
        assert program["temp_bytes"] < 0.05 * stats["pool_bytes"], program


def test_no_request_compiles_or_moves_the_pool(fleet):
    """Requests have random lengths and parameters, in batches of varying size."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **kwargs: object) -> None:
        if "compile" in event:
            compiled.append(event)

    address = fleet.stats()["pool_address"]
    jax.monitoring.register_event_duration_secs_listener(listen)
    rng = random.Random(0)
    streams = []
    for index in range(24):
        name = rng.choice(golden.DEMO_NAMES)
        prompt = [rng.randrange(5, 1000) for _ in range(rng.choice([1, 5, 30, 150]))]
        params = SamplingParams(
            max_tokens=rng.randrange(1, 12),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.1]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            logprobs=rng.choice([None, 0, 5]),
            seed=index,
            ignore_eos=True,
        )
        streams.append(fleet.stream(name, prompt, params))
    for stream in streams:
        assert list(stream)[-1].finish_reason == "length"
    assert compiled == []
    assert fleet.stats()["pool_address"] == address


def test_seeded_outputs_do_not_depend_on_the_batch(fleet):
    rng = random.Random(1)
    for name in golden.DEMO_NAMES:
        prompts = [case.prompt_ids for case in golden.greedy(name)]
        params = [
            SamplingParams(
                max_tokens=12, temperature=0.9, top_p=rng.choice([1.0, 0.9]), seed=seed,
                ignore_eos=True,
            )
            for seed in range(len(prompts))
        ]  # fmt: skip
        batched = fleet.generate(name, prompts, params)
        for prompt, settings, completion in zip(prompts, params, batched, strict=True):
            assert fleet.generate(name, prompt, settings)[0].token_ids == completion.token_ids


def test_preemption_changes_no_tokens():
    """Three models preempt each other's requests on a small pool."""
    with Fleet.load(fleet_config("26MB", max_seqs=4, decode_tokens=4)) as small:
        cases = [(name, case) for name in golden.DEMO_NAMES for case in golden.greedy(name)]
        for seed in range(2):
            random.Random(seed).shuffle(cases)
            outputs = asyncio.run(generate_concurrently(small, cases))
            for (name, case), tokens in zip(cases, outputs, strict=True):
                assert tokens == case.output_ids, f"{name}: {case.text!r}"
        models = small.stats()["models"].values()
        assert sum(model["preemptions"] for model in models) > 0
        assert all(model["kv_pages_used"] == 0 for model in models)
