"""Reading and cancelling the streams of a call."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from muxjax.errors import EngineDead, InvalidRequest
from muxjax.grammar import Grammar
from muxjax.outputs import Delta
from muxjax.sampling_params import SamplingParams
from muxjax.serve.openai.generation import (
    GenerationCall,
    cancel_on_disconnect,
    start_generation,
)
from tests.serve.fake_fleet import FakeFleet

PROMPTS = [list(b"ab"), list(b"c")]


async def start(fleet: FakeFleet, n: int = 1, **params: Any) -> GenerationCall:
    params = {"max_tokens": 4, **params}
    return await start_generation(fleet, "chat", PROMPTS, [SamplingParams(**params)] * n)


async def ignore(index: int, delta: Delta) -> None:
    pass


def test_outputs_are_in_the_order_of_prompts_and_choices() -> None:
    async def test() -> None:
        fleet = FakeFleet(delay=0.001)
        call = await start(fleet, n=2)
        outputs = await call.collect()
        assert [output.text for output in outputs] == ["abab", "abab", "cccc", "cccc"]
        assert [output.finish_reason for output in outputs] == ["length"] * 4
        assert call.num_prompt_tokens == 3
        assert not fleet.active

    asyncio.run(test())


@pytest.mark.parametrize("n", [1, 2])
def test_deltas_of_one_stream_are_in_order(n: int) -> None:
    async def test() -> None:
        texts = [""] * (2 * n)

        async def append(index: int, delta: Delta) -> None:
            texts[index] += delta.text

        call = await start(FakeFleet(), n)
        await call.read(append)
        assert texts == ["abab"] * n + ["cccc"] * n

    asyncio.run(test())


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_an_engine_error_is_raised_to_the_reader(prompts: list[list[int]]) -> None:
    async def test() -> None:
        fleet = FakeFleet(die_after=2)
        call = await start_generation(fleet, "chat", prompts, [SamplingParams(max_tokens=5)])
        with pytest.raises(EngineDead, match="out of memory"):
            await call.read(ignore)
        call.cancel()
        assert not fleet.active

    asyncio.run(test())


def test_a_handler_error_is_raised_and_stops_reading() -> None:
    async def test() -> None:
        async def fail(index: int, delta: Delta) -> None:
            raise ValueError("cannot format")

        call = await start(FakeFleet(delay=0.001), n=3)
        with pytest.raises(ValueError, match="cannot format"):
            await call.read(fail)

    asyncio.run(test())


def test_collecting_an_aborted_output_raises() -> None:
    async def test() -> None:
        call = await start(FakeFleet(delay=0.05))
        for stream in call.streams:
            stream.end()
        with pytest.raises(EngineDead, match="shutting down"):
            await call.collect()

    asyncio.run(test())


def test_one_invalid_prompt_cancels_the_call() -> None:
    async def test() -> None:
        fleet = FakeFleet()
        prompts = [*PROMPTS, [1000]]
        with pytest.raises(InvalidRequest, match="out of range"):
            await start_generation(fleet, "chat", prompts, [SamplingParams()])
        assert len(fleet.requests) == 2
        assert not fleet.active

    asyncio.run(test())


def test_a_call_cancelled_during_grammar_compilation_ends_its_streams() -> None:
    async def test() -> None:
        fleet = FakeFleet()
        starting = asyncio.create_task(start(fleet, grammar=Grammar.json_object()))
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        for _ in range(100):
            if len(fleet.requests) == 2 and not fleet.active:
                break
            await asyncio.sleep(0.01)
        assert len(fleet.requests) == 2
        assert not fleet.active

    asyncio.run(test())


def test_a_disconnect_cancels_the_work() -> None:
    async def test() -> None:
        cancelled = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()

        async def receive() -> dict[str, str]:
            await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        with pytest.raises(ClientDisconnect):
            await cancel_on_disconnect(receive, work())
        assert cancelled.is_set()

    asyncio.run(test())
