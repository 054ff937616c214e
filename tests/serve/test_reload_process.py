"""SIGHUP applies the fleet file to a running server."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.muxjax.tiny_fleets import entry, fleet
from tests.serve.conftest import wait_until
from tests.serve.server_process import start_muxjax

ROOT = Path(__file__).parents[2]
FILE = fleet("llama", "qwen3", max_seqs=2, prefill_tokens=16)
EXTRA = {**entry("llama"), "name": "extra"}


def body(model: str, max_tokens: int) -> dict[str, Any]:
    return {"model": model, "prompt": "hello", "max_tokens": max_tokens, "ignore_eos": True}


def greedy(url: str, model: str, max_tokens: int = 100) -> str:
    request = {**body(model, max_tokens), "temperature": 0}
    answer = httpx2.post(f"{url}/v1/completions", json=request, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def statuses(url: str) -> dict[str, str]:
    data = httpx2.get(f"{url}/v1/models").json()["data"]
    return {model["id"]: model["status"] for model in data}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"  # JSON is YAML
    path.write_text(json.dumps(FILE))
    return path


@pytest.fixture
def server(file: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with start_muxjax(file) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith("serving llama, qwen3 on http")
            yield process, line.split()[-1]
        finally:
            process.kill()


def test_sighup_applies_the_fleet_file_and_keeps_requests(
    server: tuple[subprocess.Popen[str], str], file: Path
) -> None:
    process, url = server
    expected = {model: greedy(url, model) for model in ("llama", "qwen3")}
    errors: list[str] = []
    done = threading.Event()

    def ask(model: str) -> None:
        while not done.is_set():
            try:
                if greedy(url, model) != expected[model]:
                    errors.append(model)
            except (AssertionError, httpx2.HTTPError) as error:
                errors.append(str(error))

    threads = [threading.Thread(target=ask, args=(model,)) for model in expected]
    for thread in threads:
        thread.start()
    file.write_text(json.dumps({**FILE, "models": [*FILE["models"], EXTRA]}))
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: statuses(url).get("extra") == "loaded", 60)
    assert greedy(url, "extra") == expected["llama"]
    assert httpx2.post(f"{url}/models/sleep", json={"model": "extra"}, timeout=60).is_success
    assert statuses(url)["extra"] == "sleeping"
    assert greedy(url, "extra") == expected["llama"]  # wakes it
    file.write_text(json.dumps(FILE))
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: "extra" not in statuses(url), 60)
    file.write_text("models: [")
    process.send_signal(signal.SIGHUP)
    assert process.stderr
    wait_until(lambda: "fleet_not_reloaded" in process.stderr.readline(), 60)
    done.set()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert statuses(url) == {"llama": "loaded", "qwen3": "loaded"}
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
