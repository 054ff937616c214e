"""Health, model states and counters over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from muxjax.scheduling.specs import LatencySlo
from muxjax.serve.settings import ServerSettings
from tests.serve.conftest import running_server
from tests.serve.fake_fleet import FakeFleet

BODY = {"model": "chat", "prompt": "ab", "max_tokens": 6}
FLEET = FakeFleet()
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def http() -> Iterator[httpx2.Client]:
    slo = {"chat": LatencySlo(ttft=10.0, tpot=1e-9)}
    with (
        running_server(FLEET, ServerSettings(slo=slo)) as url,
        httpx2.Client(base_url=url, timeout=20) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def reset() -> None:
    FLEET.__init__()  # type: ignore[misc]


def sample(text: str, name: str) -> float:
    """Returns the value of one metric, given its name with labels."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[-1])


def test_a_healthy_server_is_ready(http: httpx2.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/health/ready").json() == {"status": "ready"}
    assert http.get("/health/plain/base").json() == {"status": "loaded", "unit": "0"}
    assert http.get("/health/none").status_code == 404


def test_a_hanging_unit_is_not_ready(http: httpx2.Client) -> None:
    FLEET.stalled = 61.0
    assert http.get("/health").status_code == 200
    for path in ("/health/ready", "/health/chat"):
        answer = http.get(path)
        assert answer.status_code == 503
        assert "has executed no step for 61.0 s" in answer.json()["reason"]


def test_a_dead_unit_is_not_ready(http: httpx2.Client) -> None:
    FLEET.dead = "out of memory"
    for path in ("/health/ready", "/health/chat"):
        assert "has ended: out of memory" in http.get(path).json()["reason"]
    answer = http.post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_models_are_listed_with_their_status(http: httpx2.Client) -> None:
    (chat, _, _) = http.get("/v1/models").json()["data"]
    assert chat["id"] == "chat"
    assert (chat["status"], chat["unit"], chat["max_model_len"]) == ("loaded", "0", 256)


def test_metrics_count_requests(http: httpx2.Client) -> None:
    before = http.get("/metrics").text
    assert http.post("/v1/completions", json=BODY).status_code == 200
    assert http.post("/v1/completions", json={**BODY, "temperature": -1}).status_code == 400
    after = http.get("/metrics")
    assert after.headers["content-type"].startswith("text/plain; version=0.0.4")
    increases = {
        'vllm:prompt_tokens_total{model_name="chat"}': 3,
        'vllm:generation_tokens_total{model_name="chat"}': 6,
        'vllm:request_success_total{finished_reason="length",model_name="chat"}': 1,
        'vllm:time_to_first_token_seconds_count{model_name="chat"}': 1,
        'vllm:inter_token_latency_seconds_count{model_name="chat"}': 5,
        'vllm:e2e_request_latency_seconds_count{model_name="chat"}': 1,
        'vllm:request_time_per_output_token_seconds_count{model_name="chat"}': 1,
        'muxjax:slo_hits_total{model_name="chat",target="ttft"}': 1,
        'muxjax:slo_misses_total{model_name="chat",target="tpot"}': 1,
        'muxjax:slo_misses_total{model_name="chat",target="ttft"}': 0,
    }
    for name, increase in increases.items():
        assert sample(after.text, name) - sample(before, name) == increase, name
    assert sample(after.text, 'muxjax:refused_requests_total{status="400"}') >= 1
    assert sample(after.text, 'muxjax:model_state{model_name="ids",state="loaded"}') == 1
    assert sample(after.text, 'vllm:num_requests_running{model_name="ids"}') == 0


def test_stats_as_one_response_and_as_a_stream(http: httpx2.Client) -> None:
    stats = http.get("/stats").json()
    assert [model["name"] for model in stats["models"]] == ["chat", "plain/base", "ids"]
    assert [model["chat"] for model in stats["models"]] == [True, False, False]
    assert stats["pool"]["pages"] == 100
    with http.stream("GET", "/stats/stream") as stream:
        lines = (line for line in stream.iter_lines() if line)
        updates = [json.loads(next(lines).removeprefix("data: ")) for _ in range(2)]
    assert updates[1]["time"] > updates[0]["time"]


def test_the_dashboard_queries_existing_metrics(http: httpx2.Client) -> None:
    http.post("/v1/completions", json=BODY)
    text = http.get("/metrics").text
    dashboard = json.loads((ROOT / "examples" / "grafana.json").read_text())
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    assert len(expressions) > 8
    for expression in expressions:
        for name in re.findall(r"(?:vllm|muxjax):\w+", expression):
            assert f"\n{name}" in f"\n{text}", name
