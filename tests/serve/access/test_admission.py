"""Queues, time limits and the end of the server, on the fake fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from muxjax.config.server import ServerConfig
from muxjax.errors import EngineDead, TimedOut
from muxjax.sampling_params import SamplingParams
from muxjax.serve.access.admission import Admission
from muxjax.serve.access.tracked_stream import Ending, TrackedStream
from muxjax.serve.errors import ApiError
from tests.serve.fake_fleet import FakeFleet

PROMPT = list(b"ab")


class Notes:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.firsts: list[tuple[str, int, int]] = []
        self.tokens = 0
        self.endings: list[Ending] = []

    def first(self, model: str, seconds: float, prompt_tokens: int, tokens: int) -> None:
        self.firsts.append((model, prompt_tokens, tokens))
        self.tokens += tokens

    def more(self, model: str, seconds: float, tokens: int) -> None:
        self.tokens += tokens

    def ended(self, ending: Ending) -> None:
        self.endings.append(ending)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def make(fleet: FakeFleet, **config: Any) -> tuple[Admission, Notes]:
    notes = Notes()
    return Admission(fleet, ServerConfig(**config), (notes,)), notes


def open_one(admission: Admission, tokens: int = 5) -> TrackedStream:
    return admission.view(None, None).stream("chat", PROMPT, SamplingParams(max_tokens=tokens))


async def reasons(stream: TrackedStream) -> list[str | None]:
    return [delta.finish_reason async for delta in stream]


def test_a_stream_is_followed_to_its_end() -> None:
    async def test() -> None:
        admission, notes = make(FakeFleet())
        stream = open_one(admission)
        assert admission.waiting("chat") == 1
        assert (await reasons(stream))[-1] == "length"
        stream.cancel()
        assert notes.firsts == [("chat", 2, 1)]
        assert notes.tokens == 5
        (ending,) = notes.endings
        assert (ending.reason, ending.prompt_tokens, ending.output_tokens) == ("length", 2, 5)
        assert ending.tpot is not None
        assert admission.waiting("chat") == 0
        assert not admission.streams

    run(test)


def test_the_queue_is_exact_at_the_edge() -> None:
    async def test() -> None:
        admission, _ = make(FakeFleet(delay=0.01), max_queue=3)
        streams = [open_one(admission) for _ in range(3)]
        with pytest.raises(ApiError) as caught:
            open_one(admission)
        assert caught.value.status == 429
        assert int(caught.value.headers["retry-after"]) >= 1
        # Other models have queues of their own.
        admission.view(None, None).stream("ids", PROMPT).cancel()
        # One that has got its first token waits no more, nor does one that has left.
        reader = aiter(streams[0])
        await anext(reader)
        streams += [open_one(admission)]
        streams[1].cancel()
        streams += [open_one(admission)]
        with pytest.raises(ApiError):
            open_one(admission)
        for stream in streams:
            stream.cancel()
        assert admission.waiting("chat") == 0

    run(test)


def test_time_limits() -> None:
    async def test() -> None:
        fleet = FakeFleet(delay=0.05)
        admission, notes = make(fleet, request_timeout=0.12)
        with pytest.raises(TimedOut, match=r"the request took longer than 0\.12 s"):
            await reasons(open_one(admission, 100))
        assert notes.endings[-1].reason == "timeout"
        assert not fleet.active
        slow, _ = make(FakeFleet(delay=5.0), queue_timeout=0.02)
        with pytest.raises(TimedOut, match="its first token"):
            await reasons(open_one(slow))
        quick, notes = make(FakeFleet(delay=0.01), queue_timeout=0.05)
        assert len(await reasons(open_one(quick, 10))) == 10

    run(test)


def test_a_server_that_stops() -> None:
    async def test() -> None:
        fleet = FakeFleet(delay=0.01)
        admission, notes = make(fleet)
        stream = open_one(admission, 200)
        reader = aiter(stream)
        await anext(reader)
        admission.draining = True
        with pytest.raises(ApiError) as caught:
            open_one(admission)
        assert (caught.value.status, caught.value.headers["retry-after"]) == (503, "10")
        await anext(reader)
        admission.cut()
        assert [delta.finish_reason async for delta in reader][-1] == "abort"
        assert notes.endings[-1].reason == "abort"
        assert not admission.streams

    run(test)


def test_an_engine_that_ends() -> None:
    async def test() -> None:
        admission, notes = make(FakeFleet(die_after=2))
        with pytest.raises(EngineDead):
            await reasons(open_one(admission))
        assert notes.endings[-1].reason == "error"

    run(test)
