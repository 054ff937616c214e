"""The server as a process: its address, signals and shutdown."""

from __future__ import annotations

import json
import shlex
import signal
import ssl
import threading
from pathlib import Path

import httpx2
import pytest
import trustme

from muxjax.serve.access.keys import Key, Keys, digest_of
from muxjax.serve.address import bind, is_local
from muxjax.serve.server import (
    InsecureServer,
    Tls,
    TlsError,
    check_exposure,
    welcome_text,
)
from muxjax.serve.settings import ServerSettings
from tests.serve.conftest import wait_until
from tests.serve.fake_fleet import FakeFleet
from tests.serve.server_process import serving


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server(number: signal.Signals) -> None:
    with serving(0.0) as (process, url):
        answer = httpx2.post(f"{url}/v1/completions", json={"model": "chat", "prompt": "a"})
        assert answer.status_code == 200
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
        assert output.endswith("closed\n")
        assert process.returncode == 0


def test_shutdown_finishes_running_streams() -> None:
    body = {"model": "chat", "prompt": "ab", "max_tokens": 40, "stream": True}
    with (
        serving(0.02) as (process, url),
        httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        output, _ = process.communicate(timeout=20)
        assert output.endswith("closed\n")
        assert process.returncode == 0


def test_the_curl_commands_are_valid_requests(server: str, fleet: FakeFleet) -> None:
    first, *lines = welcome_text(fleet, server).splitlines()
    assert first == f"serving chat, plain/base, ids on {server}"
    for line in lines:
        command, url, header, kind, data, body = shlex.split(line)
        assert (command, header, data) == ("curl", "-H", "-d")
        answer = httpx2.post(url, content=body, headers=dict([kind.split(": ")]))
        assert answer.status_code == 200, answer.text
        assert json.loads(body)["model"] == answer.json()["model"]


def test_draining_refuses_new_requests_and_aborts_late_ones() -> None:
    body = {"model": "chat", "prompt": "ab", "max_tokens": 200, "stream": True}
    with (
        serving(0.02, drain_timeout=0.5) as (process, url),
        httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx2.get(f"{url}/health/ready").status_code == 503)
        assert httpx2.get(f"{url}/health").status_code == 200
        refused = httpx2.post(f"{url}/v1/completions", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert refused.json()["error"]["code"] == "server_stopping"
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "abort"
        assert 5 < len(events) < 100
        output, _ = process.communicate(timeout=20)
        assert output.endswith("closed\n")
        assert process.returncode == 0


def test_an_aborted_response_is_a_retryable_error() -> None:
    body = {"model": "chat", "prompt": "ab", "max_tokens": 200}
    answers: list[httpx2.Response] = []

    def ask(url: str) -> None:
        answers.append(httpx2.post(f"{url}/v1/completions", json=body, timeout=20))

    with serving(0.02, drain_timeout=0.3) as (process, url):
        asking = threading.Thread(target=ask, args=(url,))
        asking.start()
        wait_until(lambda: 'muxjax:queue{model_name="chat"} 0.0' in metrics(url) and busy(url))
        process.send_signal(signal.SIGTERM)
        asking.join(20)
        (answer,) = answers
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        process.communicate(timeout=20)


def metrics(url: str) -> str:
    return httpx2.get(f"{url}/metrics").text


def busy(url: str) -> bool:
    return 'vllm:generation_tokens_total{model_name="chat"} 0.0' not in metrics(url)


def test_serving_other_machines_requires_keys() -> None:
    keys = Keys([Key(name="a", sha256=digest_of("a secret").hex())])
    with bind("127.0.0.1", 0) as bound:
        assert is_local(bound)
        check_exposure(bound, ServerSettings(local_only=True), insecure=False)
    with bind("0.0.0.0", 0) as bound:
        assert not is_local(bound)
        check_exposure(bound, ServerSettings(keys=keys), insecure=False)
        check_exposure(bound, ServerSettings(), insecure=True)
        with pytest.raises(InsecureServer, match=r"no API key is set.*MUXJAX_API_KEY.*--insecure"):
            check_exposure(bound, ServerSettings(), insecure=False)


def test_https_with_a_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    server_cert = authority.issue_cert("127.0.0.1")
    certificate, key, trusted = (tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem"))
    server_cert.private_key_pem.write_to_path(key)
    for blob in server_cert.cert_chain_pems:
        blob.write_to_path(certificate, append=True)
    authority.cert_pem.write_to_path(trusted)
    context = ssl.create_default_context(cafile=trusted)
    with serving(0.0, tls=(certificate, key)) as (_, url):
        assert url.startswith("https://127.0.0.1:")
        assert httpx2.get(f"{url}/health", verify=context).status_code == 200
    with pytest.raises(TlsError, match="cannot be used"):
        Tls(certificate, certificate).check()
    with pytest.raises(TlsError, match="No such file"):
        Tls(tmp_path / "none.pem", key).check()
