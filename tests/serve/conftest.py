"""Fixtures: a live server on a loopback port, with a fake fleet."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import httpx2
import pytest
import uvicorn

from muxjax import Fleet
from muxjax.serve.address import bind, url_of
from muxjax.serve.app import create_app
from muxjax.serve.settings import ServerSettings
from tests.serve.fake_fleet import FakeFleet


@contextlib.contextmanager
def running_server(
    fleet: Fleet | FakeFleet, settings: ServerSettings | None = None
) -> Iterator[str]:
    """Runs a server and yields its URL."""
    bound = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(fleet, settings), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    url = url_of(bound)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield url
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until `condition()` is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def shared() -> Iterator[tuple[FakeFleet, str]]:
    """One server for all tests, because starting a server takes longer than most tests."""
    fleet = FakeFleet()
    with running_server(fleet) as url:
        yield fleet, url


@pytest.fixture
def fleet(shared: tuple[FakeFleet, str]) -> FakeFleet:
    """The fleet of the shared server, reset."""
    fleet, _ = shared
    fleet.__init__()  # type: ignore[misc]
    return fleet


@pytest.fixture
def server(shared: tuple[FakeFleet, str], fleet: FakeFleet) -> str:
    """URL of the shared server."""
    return shared[1]


@pytest.fixture
def http(server: str) -> Iterator[httpx2.Client]:
    """A client of the server."""
    with httpx2.Client(base_url=server, timeout=20) as client:
        yield client
