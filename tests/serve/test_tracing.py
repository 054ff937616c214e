"""Spans of calls."""

from __future__ import annotations

import builtins
from typing import Any

import httpx2
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from muxjax.serve.settings import ServerSettings
from muxjax.serve.tracing import Tracing, TracingUnavailable
from tests.serve.conftest import running_server
from tests.serve.fake_fleet import FakeFleet

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_each_call_is_a_span_of_the_client_trace() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter)
    with running_server(FakeFleet(), ServerSettings(tracing=tracing)) as url:
        body = {"model": "chat", "prompt": "ab", "max_tokens": 5, "stream": True}
        headers = {"traceparent": PARENT, "x-request-id": "mine"}
        assert "[DONE]" in httpx2.post(f"{url}/v1/completions", json=body, headers=headers).text
        assert httpx2.post(f"{url}/v1/completions", json={}).status_code == 400
    tracing.close()
    good, bad = exporter.get_finished_spans()
    assert good.name == "POST /v1/completions"
    assert good.parent is not None
    assert f"{good.parent.span_id:016x}" == PARENT.split("-")[2]
    attributes = dict(good.attributes or {})
    assert attributes.pop("gen_ai.latency.time_to_first_token") >= 0  # type: ignore[operator]
    assert attributes == {
        "gen_ai.request.id": "mine",
        "gen_ai.request.model": "chat",
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.cached_tokens": 0,
        "gen_ai.usage.completion_tokens": 5,
        "http.response.status_code": 200,
    }
    assert (bad.attributes or {})["http.response.status_code"] == 400


def test_the_error_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = builtins.__import__

    def import_without_otel(name: str, *arguments: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return import_module(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", import_without_otel)
    with pytest.raises(TracingUnavailable, match=r"muxjax\[otel\]"):
        Tracing.to_endpoint("http://127.0.0.1:4318/v1/traces")
