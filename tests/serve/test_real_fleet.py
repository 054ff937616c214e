"""Invalid requests and disconnects with a real engine: nothing leaks."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from muxjax import Fleet
from tests.muxjax.tiny_fleets import fleet as tiny_fleet
from tests.serve.conftest import running_server, wait_until

GOOD = {"model": "llama", "prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def loaded() -> Iterator[Fleet]:
    with Fleet.load(tiny_fleet()) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def url(loaded: Fleet) -> Iterator[str]:
    with running_server(loaded) as address:
        yield address


@pytest.fixture(scope="module")
def answer(url: str) -> dict[str, Any]:
    """The response to a valid request, sent before any invalid request."""
    return complete(url)


@pytest.fixture(autouse=True)
def still_serves(url: str, loaded: Fleet, answer: dict[str, Any]) -> Iterator[None]:
    """Checks after every test that no request or page is in use and the response is the same."""
    yield
    wait_until(lambda: idle(loaded), seconds=20)
    assert complete(url) == answer
    wait_until(lambda: idle(loaded), seconds=20)


def complete(url: str) -> dict[str, Any]:
    response = httpx2.post(f"{url}/v1/completions", json=GOOD, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def idle(fleet: Fleet) -> bool:
    stats = fleet.stats()
    used = sum(model["kv_pages_used"] for model in stats["models"].values())
    return stats["requests"] == 0 and used == 0


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [1, 10**6]}, 400, "token"),
        ({"prompt": [-1]}, 400, "not a token id"),
        ({"prompt": "x" * 100_000}, 400, "tokens"),
        ({"prompt": ["good", "x" * 100_000]}, 400, "tokens"),
        ({"model": "unknown"}, 404, "model 'unknown' is not served"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"frobnicate": 1}, 400, "frobnicate"),
    ],
)
def test_invalid_fields_are_refused(
    url: str, change: dict[str, Any], status: int, message: str
) -> None:
    response = httpx2.post(f"{url}/v1/completions", json={**GOOD, **change})
    assert response.status_code == status, response.text
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model": "llama", "prompt": "\xff"}', 400),
        (b'{"model": "llama", "prompt": "x', 400),
        (b" " * 10_000_000, 413),
    ],
)
def test_invalid_bodies_are_refused(url: str, body: bytes, status: int) -> None:
    assert httpx2.post(f"{url}/v1/completions", content=body).status_code == status


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("abrupt", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_disconnect_frees_pages(
    url: str, loaded: Fleet, stream: bool, abrupt: bool, n: int
) -> None:
    address = urlsplit(url)
    assert address.hostname
    assert address.port
    body = json.dumps({**GOOD, "max_tokens": 100, "stream": stream, "n": n}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=20) as client:
        client.sendall(head.encode() + body)
        if stream:
            assert client.recv(100)
        else:
            wait_until(lambda: not idle(loaded))
        if abrupt:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
