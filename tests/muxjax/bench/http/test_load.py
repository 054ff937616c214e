"""When requests are sent, over how many connections, and what an interrupt leaves."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from muxjax.bench.http.client import RequestInput, RequestResult, Server
from muxjax.bench.http.load import LoadResult, run_load, send_all
from muxjax.errors import BenchError
from tests.muxjax.bench.servers import event, serving, text_event


def fine(path: str, body: Any) -> tuple[int, list[bytes]]:
    return 200, [text_event(body["model"], "stop"), event(b"[DONE]")]


def test_each_request_is_sent_when_it_is_due() -> None:
    inputs = [RequestInput("m", "late", 1, 1, arrival=0.15), RequestInput("m", "soon", 1, 1)]
    seen: list[RequestResult] = []
    with serving(fine) as url:
        load = run_load(Server(url), inputs, on_result=seen.append)
    assert [result.request.prompt for result in load.results] == ["late", "soon"]
    assert [result.request.prompt for result in seen] == ["soon", "late"]
    assert load.results[0].sent is not None
    assert load.results[0].sent >= 0.15
    assert load.duration >= 0.15
    assert load.interrupted == 0


def test_models_may_have_servers_of_their_own() -> None:
    def other(path: str, body: Any) -> tuple[int, list[bytes]]:
        return 200, [text_event("other", "stop"), event(b"[DONE]")]

    inputs = [RequestInput("a", "x", 1, 1), RequestInput("b", "x", 1, 1)]
    with serving(fine) as one, serving(other) as two:
        load = run_load({"a": Server(one), "b": Server(two)}, inputs)
        assert [result.text for result in load.results] == ["a", "other"]
        with pytest.raises(BenchError, match="no server for b"):
            run_load({"a": Server(one)}, inputs)


def test_no_more_than_so_many_at_once() -> None:
    under_way = most = 0
    lock = threading.Lock()
    together = threading.Event()

    def slow(path: str, body: Any) -> tuple[int, list[bytes]]:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
            if under_way == 2:
                together.set()
        together.wait(5)
        with lock:
            under_way -= 1
        return fine(path, body)

    with serving(slow) as url:
        load = run_load(Server(url), [RequestInput("m", "x", 1, 1)] * 6, max_concurrency=2)
    assert most == 2
    assert len(load.results) == 6
    with pytest.raises(BenchError, match="at least 1"):
        run_load(Server("http://127.0.0.1:1"), [RequestInput("m", "x", 1, 1)], max_concurrency=0)
    with pytest.raises(BenchError, match="no requests"):
        run_load(Server("http://127.0.0.1:1"), [])


def test_an_interrupt_keeps_what_is_finished() -> None:
    async def interrupted(url: str) -> LoadResult:
        first = asyncio.Event()
        inputs = [RequestInput("m", "x", 1, 1), RequestInput("m", "x", 1, 1, arrival=1000.0)]
        run = asyncio.create_task(
            send_all(Server(url), inputs, on_result=lambda result: first.set())
        )
        await first.wait()
        run.cancel()
        return await run

    with serving(fine) as url:
        load = asyncio.run(interrupted(url))
    assert [result.success for result in load.results] == [True]
    assert load.interrupted == 1
