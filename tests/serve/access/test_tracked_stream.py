"""A tracked stream is released exactly once, for any reason it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from muxjax.config.server import ServerConfig
from muxjax.errors import EngineDead, TimedOut
from muxjax.sampling_params import SamplingParams
from muxjax.serve.access.keys import Key
from muxjax.serve.access.limits import KeyLimits
from muxjax.serve.access.queues import ModelQueue
from muxjax.serve.access.tracked_stream import (
    OpenStreams,
    QueueTicket,
    StreamSummary,
    TrackedStream,
)
from tests.serve.fake_fleet import FakeFleet

LIMITS = Key(name="a", sha256="0" * 64, tokens_per_minute=100)


class Summaries:
    def __init__(self) -> None:
        self.ends: list[StreamSummary] = []

    def on_first_token(self, model: str, seconds: float, prompt_tokens: int, tokens: int) -> None:
        pass

    def on_tokens(self, model: str, seconds: float, tokens: int) -> None:
        pass

    def on_stream_end(self, summary: StreamSummary) -> None:
        self.ends.append(summary)


class Tracked:
    """A tracked stream of four tokens with its queue, limits and observer."""

    def __init__(self, fleet: FakeFleet, **config: Any) -> None:
        self.observer = Summaries()
        self.streams = OpenStreams(ServerConfig(**config), (self.observer,))
        self.queue = ModelQueue()
        self.queue.waiting = 1
        self.limits = KeyLimits(LIMITS)
        params = SamplingParams(max_tokens=4)
        self.stream = TrackedStream(
            fleet.stream("chat", list(b"ab"), params),
            "chat",
            4,
            ticket=QueueTicket(self.queue, self.limits, self.limits.reserve(6), 4),
            open_streams=self.streams,
            loop=asyncio.get_running_loop(),
        )

    def check_released(self, reason: str, used_tokens: int) -> None:
        assert [end.reason for end in self.observer.ends] == [reason]
        assert self.queue.waiting == 0
        assert len(self.streams) == 0
        self.limits.reserve(100 - used_tokens)  # all other tokens are available


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


async def read_all(stream: TrackedStream) -> int:
    return sum([len(delta.token_ids) async for delta in stream])


def test_a_stream_read_to_the_end_is_released() -> None:
    async def test() -> None:
        tracked = Tracked(FakeFleet())
        assert len(tracked.streams) == 1
        assert await read_all(tracked.stream) == 4
        tracked.stream.cancel()
        tracked.check_released("length", 6)
        assert tracked.stream.ttft is not None

    run(test)


def test_a_cancelled_stream_is_released() -> None:
    async def test() -> None:
        tracked = Tracked(FakeFleet())
        tracked.stream.cancel()
        tracked.stream.cancel()
        tracked.check_released("cancelled", 2)
        tracked = Tracked(FakeFleet())
        async for _ in tracked.stream:
            break
        tracked.stream.cancel()
        tracked.check_released("cancelled", 3)

    run(test)


def test_cancelling_the_reader_does_not_release_the_stream() -> None:
    async def test() -> None:
        tracked = Tracked(FakeFleet(delay=5.0))
        reading = asyncio.create_task(read_all(tracked.stream))
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert not tracked.observer.ends
        tracked.stream.cancel()
        tracked.check_released("cancelled", 2)

    run(test)


def test_a_failed_stream_is_released() -> None:
    async def test() -> None:
        tracked = Tracked(FakeFleet(die_after=1))
        with pytest.raises(EngineDead):
            await read_all(tracked.stream)
        tracked.check_released("error", 3)
        tracked = Tracked(FakeFleet(delay=5.0), queue_timeout=0.01)
        started = time.monotonic()
        with pytest.raises(TimedOut, match=r"the first token exceeded its time limit of 0\.01 s"):
            await read_all(tracked.stream)
        assert time.monotonic() - started < 4
        tracked.check_released("timeout", 2)

    run(test)


def test_an_aborted_stream_is_released() -> None:
    async def test() -> None:
        tracked = Tracked(FakeFleet(delay=0.05))
        tracked.stream.end()
        assert await read_all(tracked.stream) == 0
        tracked.check_released("abort", 2)

    run(test)


def test_time_per_output_token() -> None:
    summary = StreamSummary("chat", "stop", 2, 5, 16, ttft=1.0, seconds=3.0)
    assert summary.tpot == 0.5
    assert StreamSummary("chat", "stop", 2, 1, 16, ttft=1.0, seconds=3.0).tpot is None
