"""Large bodies, and clients that disconnect while they send a request or receive its answer."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.serve.conftest import wait_until
from tests.serve.fake_fleet import FakeFleet
from tests.serve.request_bodies import CHAT, COMPLETION, error_of


def test_a_large_body_is_refused_before_it_is_read(server: str, http: httpx2.Client) -> None:
    large = {"model": "chat", "prompt": "x" * 10_000_000}
    error = error_of(http.post("/v1/completions", json=large), 413)
    assert error["code"] == "request_too_large"
    # Only the header is sent: the response does not wait for the body.
    with connected(server) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n"
        )
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")
    # Without a Content-Length, reading ends at the limit.
    parts = (b" " * 65536 for _ in range(200))
    error_of(http.post("/v1/completions", content=parts), 413)
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200


def test_a_body_below_the_limit_is_read(http: httpx2.Client) -> None:
    error = error_of(http.post("/v1/completions", json={**COMPLETION, "prompt": "x" * 4_000_000}))
    assert "the prompt has 4000001 tokens" in error["message"]


def connected(server: str) -> socket.socket:
    address = urlsplit(server)
    assert address.hostname
    assert address.port
    return socket.create_connection((address.hostname, address.port), timeout=20)


def post_bytes(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("abrupt", [True, False])
def test_a_disconnect_cancels_the_requests(
    server: str, fleet: FakeFleet, stream: bool, n: int, abrupt: bool
) -> None:
    fleet.delay = 0.05
    body = {**CHAT, "stream": stream, "n": n, "max_tokens": 200}
    with connected(server) as client:
        client.sendall(post_bytes("/v1/chat/completions", body))
        wait_until(lambda: len(fleet.active) == n)
        if stream:
            client.recv(100)
        if abrupt:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: not fleet.active, seconds=5)
    fleet.delay = 0.0
    assert httpx2.post(f"{server}/v1/completions", json=COMPLETION).status_code == 200


def test_a_disconnect_while_sending_the_body_queues_nothing(server: str, fleet: FakeFleet) -> None:
    with connected(server) as client:
        client.sendall(post_bytes("/v1/completions", COMPLETION)[:-5])
    assert httpx2.post(f"{server}/v1/completions", json=COMPLETION).status_code == 200
    assert len(fleet.requests) == 1


def test_one_invalid_prompt_cancels_the_call(http: httpx2.Client, fleet: FakeFleet) -> None:
    error_of(http.post("/v1/completions", json={**COMPLETION, "prompt": ["a", "x" * 300]}))
    assert len(fleet.requests) == 1
    assert not fleet.active
