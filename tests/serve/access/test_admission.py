"""Queues, time limits and draining."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from muxjax.config.server import ServerConfig
from muxjax.errors import EngineDead, TimedOut
from muxjax.sampling_params import SamplingParams
from muxjax.serve.access.admission import Admission
from muxjax.serve.access.tracked_stream import StreamSummary, TrackedStream
from muxjax.serve.errors import ApiError
from tests.serve.fake_fleet import FakeFleet

PROMPT = list(b"ab")


class Recorder:
    """An observer that records the events it receives."""

    def __init__(self) -> None:
        self.firsts: list[tuple[str, int, int]] = []
        self.tokens = 0
        self.endings: list[StreamSummary] = []

    def on_first_token(self, model: str, seconds: float, prompt_tokens: int, tokens: int) -> None:
        self.firsts.append((model, prompt_tokens, tokens))
        self.tokens += tokens

    def on_tokens(self, model: str, seconds: float, tokens: int) -> None:
        self.tokens += tokens

    def on_stream_end(self, summary: StreamSummary) -> None:
        self.endings.append(summary)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def build(fleet: FakeFleet, **config: Any) -> tuple[Admission, Recorder]:
    recorder = Recorder()
    return Admission(fleet, ServerConfig(**config), (recorder,)), recorder


def open_stream(admission: Admission, tokens: int = 5) -> TrackedStream:
    return admission.fleet_view(None, None).stream(
        "chat", PROMPT, SamplingParams(max_tokens=tokens)
    )


async def finish_reasons(stream: TrackedStream) -> list[str | None]:
    return [delta.finish_reason async for delta in stream]


def test_observers_receive_the_events_of_a_stream() -> None:
    async def test() -> None:
        admission, recorder = build(FakeFleet())
        stream = open_stream(admission)
        assert admission.waiting("chat") == 1
        assert (await finish_reasons(stream))[-1] == "length"
        stream.cancel()
        assert recorder.firsts == [("chat", 2, 1)]
        assert recorder.tokens == 5
        (ending,) = recorder.endings
        assert (ending.reason, ending.prompt_tokens, ending.output_tokens) == ("length", 2, 5)
        assert ending.tpot is not None
        assert admission.waiting("chat") == 0
        assert not admission.streams

    run(test)


def test_a_full_queue_refuses_requests() -> None:
    async def test() -> None:
        admission, _ = build(FakeFleet(delay=0.01), max_queue=3)
        streams = [open_stream(admission) for _ in range(3)]
        with pytest.raises(ApiError) as caught:
            open_stream(admission)
        assert caught.value.status == 429
        assert int(caught.value.headers["retry-after"]) >= 1
        # Each model has its own queue.
        admission.fleet_view(None, None).stream("ids", PROMPT).cancel()
        # A stream leaves the queue with its first token or when it is cancelled.
        reader = aiter(streams[0])
        await anext(reader)
        streams += [open_stream(admission)]
        streams[1].cancel()
        streams += [open_stream(admission)]
        with pytest.raises(ApiError):
            open_stream(admission)
        for stream in streams:
            stream.cancel()
        assert admission.waiting("chat") == 0

    run(test)


def test_time_limits_end_streams() -> None:
    async def test() -> None:
        fleet = FakeFleet(delay=0.05)
        admission, recorder = build(fleet, request_timeout=0.12)
        with pytest.raises(TimedOut, match=r"the request exceeded its time limit of 0\.12 s"):
            await finish_reasons(open_stream(admission, 100))
        assert recorder.endings[-1].reason == "timeout"
        assert not fleet.active
        slow, _ = build(FakeFleet(delay=5.0), queue_timeout=0.02)
        with pytest.raises(TimedOut, match="the first token"):
            await finish_reasons(open_stream(slow))
        quick, recorder = build(FakeFleet(delay=0.01), queue_timeout=0.05)
        assert len(await finish_reasons(open_stream(quick, 10))) == 10

    run(test)


def test_draining_refuses_requests_and_abort_ends_streams() -> None:
    async def test() -> None:
        fleet = FakeFleet(delay=0.01)
        admission, recorder = build(fleet)
        stream = open_stream(admission, 200)
        reader = aiter(stream)
        await anext(reader)
        admission.draining = True
        with pytest.raises(ApiError) as caught:
            open_stream(admission)
        assert (caught.value.status, caught.value.headers["retry-after"]) == (503, "10")
        await anext(reader)
        admission.abort_all()
        assert [delta.finish_reason async for delta in reader][-1] == "abort"
        assert recorder.endings[-1].reason == "abort"
        assert not admission.streams

    run(test)


def test_engine_errors_are_observed() -> None:
    async def test() -> None:
        admission, recorder = build(FakeFleet(die_after=2))
        with pytest.raises(EngineDead):
            await finish_reasons(open_stream(admission))
        assert recorder.endings[-1].reason == "error"

    run(test)
