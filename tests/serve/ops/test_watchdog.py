"""The watchdog with a fake fleet, and with a real engine that hangs."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from muxjax import Fleet
from muxjax.config.server import ServerConfig
from muxjax.executor.jax_executor import JaxExecutor
from muxjax.scheduling.steps import StepResult
from muxjax.serve.logs import JsonFormatter
from muxjax.serve.ops.watchdog import Watchdog, describe_stacks
from muxjax.serve.settings import ServerSettings
from tests.muxjax.tiny_fleets import fleet as tiny_fleet
from tests.serve.conftest import running_server, wait_until
from tests.serve.fake_fleet import FakeFleet


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.emit = lambda record: events.append(json.loads(JsonFormatter().format(record)))  # type: ignore[method-assign]
    logger = logging.getLogger("muxjax.serve")
    logger.addHandler(handler)
    yield events
    logger.removeHandler(handler)


def watch(fleet: FakeFleet, now: list[float], **options: float) -> Watchdog:
    return Watchdog(fleet, stall_timeout=5.0, restarts=2, clock=lambda: now[0], **options)


def test_a_working_unit_is_not_restarted(lines: list[dict[str, Any]]) -> None:
    fleet = FakeFleet(restartable=True, stalled=4.9)
    watch(fleet, [0.0]).check_units()
    assert fleet.restarts == 0
    assert not lines


def test_a_hanging_unit_is_logged_and_restarted(lines: list[dict[str, Any]]) -> None:
    fleet = FakeFleet(restartable=True, stalled=5.1)
    watch(fleet, [0.0]).check_units()
    assert fleet.restarts == 1
    failed, restarted = lines
    assert (failed["event"], failed["unit"], failed["alive"]) == ("unit_failed", "0", True)
    assert "chat: waiting=0" in failed["state"]
    assert "MainThread" not in failed["stacks"]  # the thread that runs the check
    assert restarted["event"] == "unit_restarted"


def test_a_unit_is_lost_after_too_many_restarts(lines: list[dict[str, Any]]) -> None:
    now = [0.0]
    fleet = FakeFleet(restartable=True)
    watchdog = watch(fleet, now)
    for _ in range(2):
        fleet.dead = "out of memory"
        watchdog.check_units()
        assert fleet.dead is None
    fleet.dead = "out of memory"
    watchdog.check_units()
    watchdog.check_units()
    assert fleet.restarts == 2
    assert watchdog.is_lost("0")
    assert [line["event"] for line in lines].count("unit_given_up") == 1
    fleet.dead = None  # repaired by hand
    watchdog.check_units()
    assert not watchdog.is_lost("0")
    now[0] = 600.0  # earlier restarts have expired
    fleet.dead = "out of memory"
    watchdog.check_units()
    assert fleet.restarts == 3


def test_a_unit_that_cannot_be_restarted_is_lost(lines: list[dict[str, Any]]) -> None:
    watchdog = watch(FakeFleet(dead="gone"), [0.0])
    watchdog.check_units()
    assert watchdog.is_lost("0")
    assert lines[-1]["event"] == "unit_not_restarted"


def test_the_thread_restarts_units() -> None:
    fleet = FakeFleet(restartable=True, dead="gone")
    restarted = threading.Event()
    restart = fleet.restart
    fleet.restart = lambda unit, reason: (restart(unit, reason), restarted.set())  # type: ignore[assignment,func-returns-value]
    watchdog = watch(fleet, [0.0], interval=0.01)
    watchdog.start()
    assert restarted.wait(10)
    watchdog.close()


def test_stacks_have_no_values_of_variables() -> None:
    started, resume = threading.Event(), threading.Event()

    def hang(prompt: str) -> None:
        started.set()
        assert resume.wait(20), prompt

    thread = threading.Thread(target=hang, args=("a private prompt",), name="hanging")
    thread.start()
    assert started.wait(10)
    stacks = describe_stacks()
    resume.set()
    thread.join(10)
    assert "hanging:" in stacks
    assert "resume.wait(20)" in stacks
    assert "private" not in stacks


def test_a_hanging_engine_is_restarted_and_keeps_its_requests(
    monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]]
) -> None:
    """While the engine hangs, health reports it; after the restart its requests continue."""
    hang, resume = threading.Event(), threading.Event()
    executor_result = JaxExecutor.result

    def result(self: JaxExecutor, handle: Any) -> StepResult:
        if hang.is_set():
            hang.clear()
            assert resume.wait(60)
        return executor_result(self, handle)

    monkeypatch.setattr(JaxExecutor, "result", result)
    config = ServerConfig(stall_timeout=1.5)
    body = {"model": "llama", "prompt": "hello", "max_tokens": 8, "temperature": 0}
    with (
        Fleet.load(tiny_fleet("llama")) as fleet,
        running_server(fleet, ServerSettings(config)) as url,
        httpx2.Client(base_url=url, timeout=30) as client,
    ):
        expected = client.post("/v1/completions", json=body).json()["choices"]
        assert client.get("/health/ready").status_code == 200
        hang.set()
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            events = [line for line in answer.iter_lines() if line]
        assert events[-1] == "data: [DONE]"
        parts = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
        text = "".join(part["choices"][0]["text"] for part in parts)
        assert text == expected[0]["text"]
        wait_until(lambda: any(line["event"] == "unit_restarted" for line in lines))
        failed = next(line for line in lines if line["event"] == "unit_failed")
        assert "muxjax-engine" in failed["stacks"]
        assert "hello" not in json.dumps(failed)
        assert client.post("/v1/completions", json=body).json()["choices"] == expected
        assert client.get("/health/llama").json() == {"status": "loaded", "unit": "0"}
        assert 'muxjax:unit_restarts_total{unit="0"} 1.0' in client.get("/metrics").text
        resume.set()
