"""Due times, concurrency limits and interrupts of load generation."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from muxjax.bench.http.client import RequestInput, RequestResult, Server
from muxjax.bench.http.load import LoadResult, run_load, send_all
from muxjax.errors import BenchError
from tests.muxjax.bench.servers import event, serving, text_event


def respond(path: str, body: Any) -> tuple[int, list[bytes]]:
    return 200, [text_event(body["model"], "stop"), event(b"[DONE]")]


def test_requests_are_sent_at_their_due_times() -> None:
    inputs = [RequestInput("m", "late", 1, 1, arrival=0.15), RequestInput("m", "soon", 1, 1)]
    seen: list[RequestResult] = []
    with serving(respond) as url:
        load = run_load(Server(url), inputs, on_result=seen.append)
    assert [result.request.prompt for result in load.results] == ["late", "soon"]
    assert [result.request.prompt for result in seen] == ["soon", "late"]
    assert load.results[0].sent is not None
    assert load.results[0].sent >= 0.15
    assert load.duration >= 0.15
    assert load.interrupted == 0


def test_models_may_have_different_servers() -> None:
    def other(path: str, body: Any) -> tuple[int, list[bytes]]:
        return 200, [text_event("other", "stop"), event(b"[DONE]")]

    inputs = [RequestInput("a", "x", 1, 1), RequestInput("b", "x", 1, 1)]
    with serving(respond) as url, serving(other) as other_url:
        load = run_load({"a": Server(url), "b": Server(other_url)}, inputs)
        assert [result.text for result in load.results] == ["a", "other"]
        with pytest.raises(BenchError, match="no server for b"):
            run_load({"a": Server(url)}, inputs)


def test_concurrency_is_limited() -> None:
    running = peak = 0
    lock = threading.Lock()
    concurrent = threading.Event()

    def slow(path: str, body: Any) -> tuple[int, list[bytes]]:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
            if running == 2:
                concurrent.set()
        concurrent.wait(5)
        with lock:
            running -= 1
        return respond(path, body)

    with serving(slow) as url:
        load = run_load(Server(url), [RequestInput("m", "x", 1, 1)] * 6, max_concurrency=2)
    assert peak == 2
    assert len(load.results) == 6
    with pytest.raises(BenchError, match="at least 1"):
        run_load(Server("http://127.0.0.1:1"), [RequestInput("m", "x", 1, 1)], max_concurrency=0)
    with pytest.raises(BenchError, match="no requests"):
        run_load(Server("http://127.0.0.1:1"), [])


def test_an_interrupt_keeps_finished_requests() -> None:
    async def interrupted(url: str) -> LoadResult:
        first = asyncio.Event()
        inputs = [RequestInput("m", "x", 1, 1), RequestInput("m", "x", 1, 1, arrival=1000.0)]
        run = asyncio.create_task(
            send_all(Server(url), inputs, on_result=lambda result: first.set())
        )
        await first.wait()
        run.cancel()
        return await run

    with serving(respond) as url:
        load = asyncio.run(interrupted(url))
    assert [result.success for result in load.results] == [True]
    assert load.interrupted == 1
