"""Header and usage of responses."""

from __future__ import annotations

import asyncio

from muxjax.sampling_params import SamplingParams
from muxjax.serve.openai.generation import start_generation
from muxjax.serve.openai.responses import SYSTEM_FINGERPRINT, response_header, usage_counts
from tests.serve.fake_fleet import FakeFleet


def test_response_ids_are_unique() -> None:
    first, second = (response_header("cmpl", "text_completion", "chat") for _ in range(2))
    assert first["id"].startswith("cmpl-")
    assert first["id"] != second["id"]
    assert (first["object"], first["model"]) == ("text_completion", "chat")
    assert first["system_fingerprint"] == SYSTEM_FINGERPRINT


def test_usage_counts_each_prompt_once() -> None:
    async def test() -> None:
        prompts = [list(b"x" * 20), list(b"y")]
        params = [SamplingParams(max_tokens=1)] * 2
        call = await start_generation(FakeFleet(), "chat", prompts, params)
        assert usage_counts(call, 4) == {
            "prompt_tokens": 21,
            "completion_tokens": 4,
            "total_tokens": 25,
            "prompt_tokens_details": {"cached_tokens": 16},
        }

    asyncio.run(test())
