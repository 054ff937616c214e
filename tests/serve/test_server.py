"""The server as a process: what it prints, and how it ends."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from muxjax.serve.server import AddressInUse, bind, url_of, welcome
from tests.serve.fake_fleet import FakeFleet

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def serving(delay: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, once it says that it is ready."""
    command = [sys.executable, "-m", "tests.serve.serve_fake", str(delay)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith("serving chat, plain/base, ids on http://127.0.0.1:")
            yield process, line.split()[-1]
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(number: signal.Signals) -> None:
    with serving(0.0) as (process, url):
        answer = httpx.post(f"{url}/v1/completions", json={"model": "chat", "prompt": "a"})
        assert answer.status_code == 200
        process.send_signal(number)
        rest, _ = process.communicate(timeout=20)
        assert rest.endswith("closed\n")
        assert process.returncode == 0


def test_a_running_answer_is_finished_first() -> None:
    body = {"model": "chat", "prompt": "ab", "max_tokens": 40, "stream": True}
    with (
        serving(0.02) as (process, url),
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        rest, _ = process.communicate(timeout=20)
        assert rest.endswith("closed\n")
        assert process.returncode == 0


def test_a_taken_port_is_one_clear_error() -> None:
    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(AddressInUse, match=f":{port}: Address already in use"):
            bind("127.0.0.1", port)
    with pytest.raises(AddressInUse, match="cannot serve on nowhere"):
        bind("nowhere.invalid", 0)


def test_addresses() -> None:
    with bind("0.0.0.0", 0) as bound:
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_the_curl_lines_are_real_requests(server: str, fleet: FakeFleet) -> None:
    first, *lines = welcome(fleet, server).splitlines()
    assert first == f"serving chat, plain/base, ids on {server}"
    for line in lines:
        command, url, header, kind, data, body = shlex.split(line)
        assert (command, header, data) == ("curl", "-H", "-d")
        answer = httpx.post(url, content=body, headers=dict([kind.split(": ")]))
        assert answer.status_code == 200, answer.text
        assert json.loads(body)["model"] == answer.json()["model"]
