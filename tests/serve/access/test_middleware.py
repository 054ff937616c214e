"""API keys, key limits, origin checks and logs over HTTP."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from muxjax.config.server import ServerConfig
from muxjax.sampling_params import SamplingParams
from muxjax.serve.access.keys import Key, Keys, digest_of
from muxjax.serve.settings import ServerSettings
from tests.serve.conftest import running_server, wait_until
from tests.serve.fake_fleet import FakeFleet

BODY = {"model": "chat", "prompt": "ab", "max_tokens": 4}
SECRETS = {
    name: f"the secret of {name}"
    for name in (
        "all",
        "one",
        "watcher",
        "admin",
        "slow",
        "tokens",
        "once",
        "team-1",
        "team-2",
        "boss",
    )
}
LIMITS: dict[str, dict[str, Any]] = {
    "all": {},
    "one": {"models": ["chat"]},
    "watcher": {"rights": ["metrics"]},
    "admin": {"rights": ["admin"]},
    "slow": {"requests_per_minute": 3},
    "tokens": {"tokens_per_minute": 30},
    "once": {"concurrency": 1},
    "team-1": {"cache_group": "team", "priority": -5},
    "team-2": {"cache_group": "team"},
    "boss": {"rights": ["generate", "admin"], "priority": 2},
}
KEYS = Keys(
    Key.model_validate({"name": name, "sha256": digest_of(secret).hex(), **LIMITS[name]})
    for name, secret in SECRETS.items()
)
FLEET = FakeFleet()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    config = ServerConfig(cors_origins=("https://friend.example",), body_timeout=0.3)
    with running_server(FLEET, ServerSettings(config, KEYS, local_only=True)) as address:
        yield address


def auth(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[name]}"}


def ask(url: str, name: str, **change: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/completions", json={**BODY, **change}, headers=auth(name))


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer the secret of al",
        "Bearer the secret of alll",
        "Basic the secret of all",
        "the secret of all",
        "Bearer \xff",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/metrics", "/stats", "/none"])
def test_calls_without_a_valid_key_get_401(url: str, path: str, header: str | None) -> None:
    headers = [] if header is None else [(b"Authorization", header.encode("latin-1"))]
    answer = httpx2.get(f"{url}{path}", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "chat" not in answer.text


def test_public_paths_do_not_mention_models(url: str) -> None:
    for path in ("/", "/docs", "/docs/start.js", "/health", "/health/ready", "/openapi.json"):
        answer = httpx2.get(f"{url}{path}")
        assert answer.status_code == 200
        assert "plain/base" not in answer.text
    assert httpx2.get(f"{url}/health/chat").status_code == 401


def test_a_key_lists_only_permitted_models(url: str) -> None:
    listed = httpx2.get(f"{url}/v1/models", headers=auth("all")).json()["data"]
    assert {model["id"] for model in listed} == {"chat", "plain/base", "ids"}
    listed = httpx2.get(f"{url}/v1/models", headers=auth("one")).json()["data"]
    assert [model["id"] for model in listed] == ["chat"]
    assert ask(url, "one").status_code == 200
    paths = ("/v1/models/plain/base", "/health/plain/base", "/v1/models/none", "/health/none")
    answers = [httpx2.get(f"{url}{path}", headers=auth("one")) for path in paths]
    answers += [ask(url, "one", model="plain/base"), ask(url, "one", model="none")]
    for answer in answers:
        assert answer.status_code == 404
    # The errors for a hidden and for an unknown model are the same.
    hidden, none = (answers[-2].text, answers[-1].text)
    assert hidden.replace("plain/base", "none") == none
    stats = httpx2.get(f"{url}/stats", headers=auth("one"))
    assert [model["name"] for model in stats.json()["models"]] == ["chat"]
    assert "plain/base" not in stats.text
    with httpx2.stream("GET", f"{url}/stats/stream", headers=auth("one")) as stream:
        lines = stream.iter_lines()
        line = next(lines)
        assert "chat" in line
        assert "plain/base" not in line


def test_paths_require_rights(url: str) -> None:
    assert httpx2.get(f"{url}/metrics", headers=auth("watcher")).status_code == 200
    assert httpx2.get(f"{url}/metrics", headers=auth("all")).status_code == 403
    assert ask(url, "watcher").status_code == 403
    assert ask(url, "admin").status_code == 403
    load = f"{url}/models/load"
    assert httpx2.post(load, headers=auth("all"), json={}).status_code == 403
    assert httpx2.post(load, headers=auth("admin"), json={}).status_code == 400


def test_requests_per_minute_are_limited(url: str) -> None:
    for _ in range(3):
        assert ask(url, "slow").status_code == 200
    refused = ask(url, "slow")
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    # GET requests do not count, and other keys have their own limits.
    assert httpx2.get(f"{url}/v1/models", headers=auth("slow")).status_code == 200
    assert ask(url, "all").status_code == 200


def test_tokens_per_minute_are_limited(url: str) -> None:
    # The prompt "ab" has three tokens.
    assert ask(url, "tokens", max_tokens=28).status_code == 400
    assert ask(url, "tokens", max_tokens=12).status_code == 200  # 15
    assert ask(url, "tokens", max_tokens=13).status_code == 429
    FLEET.text = "c"  # ends after two tokens; the rest of the reservation is refunded
    try:
        assert ask(url, "tokens", max_tokens=12).json()["usage"]["total_tokens"] == 5
    finally:
        FLEET.text = None
    assert ask(url, "tokens", max_tokens=8).status_code == 429  # 20 + 11
    assert ask(url, "tokens", max_tokens=7).status_code == 200  # 30
    assert ask(url, "tokens", max_tokens=1).status_code == 429


def test_concurrent_calls_are_limited(url: str) -> None:
    FLEET.delay = 0.05
    try:
        body = {**BODY, "stream": True, "max_tokens": 100}
        with httpx2.stream(
            "POST", f"{url}/v1/completions", json=body, headers=auth("once")
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert ask(url, "once").status_code == 429
    finally:
        FLEET.delay = 0.0
    wait_until(lambda: ask(url, "once").status_code == 200)


def test_other_origins_are_refused(url: str) -> None:
    same_origin = {"Origin": url, **auth("all")}
    assert httpx2.post(f"{url}/v1/completions", json=BODY, headers=same_origin).status_code == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://[", ""):
        headers = {"Origin": origin, **auth("all")}
        answer = httpx2.post(f"{url}/v1/completions", json=BODY, headers=headers)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in answer.headers
    friend = {"Origin": "https://friend.example", **auth("all")}
    answer = httpx2.post(f"{url}/v1/completions", json=BODY, headers=friend)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    preflight = {**friend, "Access-Control-Request-Method": "POST"}
    del preflight["Authorization"]
    assert httpx2.options(f"{url}/v1/completions", headers=preflight).status_code == 200


def test_a_local_server_refuses_foreign_host_names() -> None:
    config = ServerConfig(allowed_hosts=("proxy.example",))
    with running_server(FakeFleet(), ServerSettings(config, local_only=True)) as address:
        for host in ("localhost", "localhost:80", "127.0.0.1:1", "[::1]:80", "proxy.example"):
            answer = httpx2.get(f"{address}/v1/models", headers={"Host": host})
            assert answer.status_code == 200, host
        for host in ("evil.example", "localhost.evil.example", "[::1", "localhost]"):
            answer = httpx2.get(f"{address}/v1/models", headers={"Host": host})
            assert answer.status_code == 403, host
        assert "allowed_hosts" in answer.json()["error"]["message"]
        # Cross-origin requests are refused by default.
        preflight = {"Origin": "https://x.example", "Access-Control-Request-Method": "POST"}
        answer = httpx2.options(f"{address}/v1/completions", headers=preflight)
        assert "access-control-allow-origin" not in answer.headers


def test_a_slow_body_gets_408(url: str) -> None:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        client.sendall(f"{head}Authorization: Bearer {SECRETS['all']}\r\n\r\n{{".encode())
        answer = client.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer.lower()


def test_logs_have_no_prompts_or_secrets(
    url: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from muxjax.serve.logs import JsonFormatter

    word = "xylophone-7731"
    caplog.set_level(logging.DEBUG)
    bodies: list[dict[str, Any]] = [
        {**BODY, "prompt": word},
        {**BODY, "prompt": word, "stream": True},
        {**BODY, "prompt": word, word: 1},
        {**BODY, "prompt": word * 100},
        {**BODY, "prompt": word, "model": word},
        {**BODY, "prompt": word, "temperature": word},
        {"model": "chat", "messages": [{"role": "user", "content": word}], "max_tokens": 3},
        {"model": "chat", "messages": [{"role": word, "content": word}]},
    ]
    for body in bodies:
        for path in ("/v1/completions", "/v1/chat/completions"):
            httpx2.post(f"{url}{path}", json=body, headers=auth("all"))
    httpx2.post(f"{url}/v1/completions", content=word, headers=auth("all"))
    httpx2.get(f"{url}/v1/models?q={word}", headers=auth("all"))
    httpx2.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {word}"})
    # Without the records of the HTTP client.
    records = [record for record in caplog.records if not record.name.startswith("http")]
    written = [JsonFormatter().format(record) for record in records]
    printed = capfd.readouterr()
    assert any('"event": "request"' in line and "/v1/completions" in line for line in written)
    for text in (*written, printed.out, printed.err):
        assert word not in text
        assert "the secret of" not in text


def test_calls_are_logged_with_their_request_ids(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    from muxjax.serve.logs import JsonFormatter

    caplog.set_level(logging.INFO)
    lines: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(json.loads(JsonFormatter().format(record)))  # type: ignore[method-assign]
    logging.getLogger("muxjax.serve").addHandler(handler)
    try:
        headers = {"X-Request-Id": "mine-1", **auth("all")}
        answer = httpx2.post(f"{url}/v1/completions", json=BODY, headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"
        wait_until(lambda: bool(lines))
    finally:
        logging.getLogger("muxjax.serve").removeHandler(handler)
    (line,) = lines
    assert line["request_id"] == "mine-1"
    assert (line["event"], line["status"], line["key"]) == ("request", 200, "all")
    assert (line["model"], line["prompt_tokens"], line["output_tokens"]) == ("chat", 3, 4)


def sampling_params(url: str, name: str, **change: Any) -> SamplingParams:
    """The sampling parameters that reach the fleet."""
    assert ask(url, name, **change).status_code == 200
    return FLEET.requests[-1][2]


def test_priority_is_limited_by_the_key(url: str) -> None:
    assert sampling_params(url, "all").priority == 0
    assert sampling_params(url, "all", priority=-3).priority == -3
    assert sampling_params(url, "team-1").priority == -5
    assert sampling_params(url, "team-1", priority=-5).priority == -5
    refused = ask(url, "team-1", priority=-4)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "priority"
    assert "at most -5" in refused.json()["error"]["message"]
    assert ask(url, "all", priority=1).status_code == 400
    # An admin key may raise the priority.
    assert sampling_params(url, "boss").priority == 2
    assert sampling_params(url, "boss", priority=100).priority == 100


def test_only_cache_groups_share_prefixes(url: str) -> None:
    unsalted, salted = (
        sampling_params(url, "all").cache_salt,
        sampling_params(url, "all", cache_salt="x").cache_salt,
    )
    assert unsalted == sampling_params(url, "all").cache_salt
    others = [sampling_params(url, name).cache_salt for name in ("one", "once", "team-1")]
    assert len({unsalted, salted, *others}) == 5
    assert sampling_params(url, "team-2").cache_salt == others[2]
    # The salt digest of another key does not give access to its prefixes.
    assert sampling_params(url, "one", cache_salt=unsalted).cache_salt != unsalted
    assert (
        sampling_params(url, "team-2", cache_salt="x").cache_salt
        == sampling_params(url, "team-1", cache_salt="x").cache_salt
    )
