"""Soak test (marker `soak`): many concurrent clients for `SOAK_SECONDS` seconds.

Some clients disconnect, some send invalid requests, and one of three models repeatedly sleeps and
wakes. Greedy outputs must equal the outputs of the same requests sent one at a time. At the end no
page, file descriptor or task may be in use. The growth of memory is printed.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2
import psutil
import pytest

from muxjax import Fleet
from muxjax.config.server import ServerConfig
from muxjax.serve.settings import ServerSettings
from tests.muxjax.tiny_fleets import fleet as tiny_fleet
from tests.serve.conftest import running_server, wait_until

CLIENTS = 50
SECONDS = float(os.environ.get("SOAK_SECONDS", "150"))
PROMPTS = ("hello", "a longer prompt that takes several chunks to read", "x", "the end of it all")
LENGTHS = (1, 7, 24, 60)
INVALID_BODIES: tuple[Any, ...] = (
    b"{",
    b"\xff\xfe",
    b'{"model": "llama"}',
    b'{"model": "llama", "prompt": "x", "temperature": -1}',
    b'{"model": "unknown", "prompt": "x"}',
    b'{"model": "llama", "prompt": "x", "max_tokens": 100000000000000000000}',
    b'{"model": "llama", "prompt": [99999]}',
    b"[" * 100_000,
)

SLEEPER = "qwen3"
RequestKey = tuple[str, str, int]
"""Model, prompt and number of output tokens."""


@pytest.fixture(scope="module")
def loaded() -> Iterator[Fleet]:
    # The pool is too small for all requests, so some are preempted.
    with Fleet.load(tiny_fleet(memory="1MB")) as fleet:
        yield fleet


def request_body(key: RequestKey, stream: bool) -> dict[str, Any]:
    model, prompt, tokens = key
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }


class Client:
    """Sends requests, disconnects or sends invalid bodies at random.

    `verify` is off, because TLS contexts would use more memory than the leaks to detect.
    """

    def __init__(
        self, url: str, number: int, expected: dict[RequestKey, str], counts: Counter
    ) -> None:
        self._url = url
        self._random = random.Random(number)
        self._expected = expected
        self._counts = counts

    async def run(self, until: float) -> None:
        limits = httpx2.Limits(max_connections=1)
        async with httpx2.AsyncClient(
            base_url=self._url, timeout=120, limits=limits, verify=False
        ) as http:
            while time.monotonic() < until:
                (kind,) = self._random.choices(
                    ("complete", "stream", "disconnect", "send_invalid"), (4, 4, 2, 2)
                )
                await getattr(self, kind)(http)
                self._counts[kind] += 1

    def _choose(self) -> RequestKey:
        return self._random.choice(list(self._expected))

    async def complete(self, http: httpx2.AsyncClient) -> None:
        key = self._choose()
        answer = await http.post("/v1/completions", json=request_body(key, False))
        assert answer.status_code == 200, answer.text
        self._compare(key, answer.json()["choices"][0]["text"])

    async def stream(self, http: httpx2.AsyncClient) -> None:
        key = self._choose()
        text = ""
        async with http.stream("POST", "/v1/completions", json=request_body(key, True)) as answer:
            assert answer.status_code == 200
            last = ""
            async for line in answer.aiter_lines():
                last = line or last
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        assert last == "data: [DONE]"
        self._compare(key, text)

    async def disconnect(self, _: httpx2.AsyncClient) -> None:
        key = self._choose()
        streaming = self._random.random() < 0.5
        # A separate client: if a call is cancelled while it connects, httpx2 may not free its slot
        # in the connection pool, and later calls would wait forever.
        async with httpx2.AsyncClient(base_url=self._url, timeout=120, verify=False) as http:
            body = request_body(key, streaming)
            call = asyncio.ensure_future(http.post("/v1/completions", json=body))
            await asyncio.sleep(self._random.random() * 0.2)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    async def send_invalid(self, http: httpx2.AsyncClient) -> None:
        answer = await http.post("/v1/completions", content=self._random.choice(INVALID_BODIES))
        assert answer.status_code in (400, 404), answer.text

    async def sleep_model(self, until: float) -> None:
        """Puts a model to sleep repeatedly; requests wake it."""
        async with httpx2.AsyncClient(base_url=self._url, timeout=120, verify=False) as http:
            while time.monotonic() < until:
                answer = await http.post("/models/sleep", json={"model": SLEEPER})
                assert answer.status_code == 200, answer.text
                self._counts["sleeps"] += 1
                await asyncio.sleep(0.2 + self._random.random())

    def _compare(self, key: RequestKey, text: str) -> None:
        self._counts["answers"] += 1
        if text != self._expected[key]:
            self._counts["wrong"] += 1


@pytest.mark.soak
def test_soak(loaded: Fleet) -> None:
    config = ServerConfig(max_queue=1000)
    process = psutil.Process()
    with running_server(loaded, ServerSettings(config)) as url, httpx2.Client(base_url=url) as http:
        expected: dict[RequestKey, str] = {}
        for model in loaded.models:
            for prompt in PROMPTS:
                for tokens in LENGTHS:
                    key = (model, prompt, tokens)
                    answer = http.post("/v1/completions", json=request_body(key, False), timeout=60)
                    expected[key] = answer.json()["choices"][0]["text"]
        asyncio.run(_send_load(url, 0, expected, Counter(), seconds=min(10.0, SECONDS / 5)))
        settle(loaded, http)
        files, threads, tasks = process.num_fds(), process.num_threads(), open_tasks()
        memory = [(time.monotonic(), process.memory_info().rss)]
        counts: Counter = Counter()
        rounds = 6
        for turn in range(1, rounds + 1):
            asyncio.run(_send_load(url, turn, expected, counts, seconds=SECONDS / rounds))
            loaded.admin.wake(SLEEPER)
            settle(loaded, http)
            memory.append((time.monotonic(), process.memory_info().rss))
        print(dict(counts))
        slope = (memory[-1][1] - memory[1][1]) / (memory[-1][0] - memory[1][0])
        print(
            f"memory {memory[1][1] / 1e6:.1f} -> {memory[-1][1] / 1e6:.1f} MB, "
            f"{slope / 1e3 * 60:.1f} kB a minute"
        )
        assert counts["wrong"] == 0
        assert counts["answers"] > 0
        assert counts["sleeps"] > 0
        wait_until(lambda: process.num_fds() <= files, 20)
        wait_until(lambda: open_tasks() <= tasks, 20)
        assert process.num_threads() <= threads + 2
        metrics = http.get("/metrics").text
        assert "muxjax:open_calls 1.0\n" in metrics  # this call
        assert 'muxjax:unit_restarts_total{unit="0"} 0.0' in metrics
        loaded.units[0].engine.call(lambda unit: unit.check_invariants())


def open_tasks() -> int:
    """Returns the number of unfinished tasks in all event loops of this process."""
    tasks = (item for item in gc.get_objects() if isinstance(item, asyncio.Task))
    return sum(not task.done() for task in tasks)


def settle(fleet: Fleet, http: httpx2.Client) -> None:
    """Waits until no request and no page is in use."""

    def idle() -> bool:
        stats = fleet.stats()
        used = sum(model["kv_pages_used"] for model in stats["models"].values())
        return stats["requests"] == 0 and used == 0

    wait_until(idle, 60)


async def _send_load(
    url: str, turn: int, expected: dict[RequestKey, str], counts: Counter, *, seconds: float
) -> None:
    until = time.monotonic() + seconds
    clients = [Client(url, 1000 * turn + number, expected, counts) for number in range(CLIENTS)]
    sleeper = Client(url, -turn, expected, counts)
    await asyncio.gather(*(client.run(until) for client in clients), sleeper.sleep_model(until))
