"""Prometheus metrics for given events of streams and calls."""

from __future__ import annotations

from typing import Any

from muxjax.engine.health import UnitHealth
from muxjax.scheduling.specs import LatencySlo
from muxjax.serve.access.tracked_stream import StreamSummary
from muxjax.serve.ops.metrics import PrometheusMetrics

STATS: dict[str, Any] = {
    "usable_pages": 100,
    "models": {"chat": {"running": 2, "kv_pages_used": 25, "preemptions": 3, "decode_seconds": 1}},
}
HEALTH = [UnitHealth("0", ("chat",), True, 1.5, None, 2)]


def values(metrics: PrometheusMetrics) -> dict[str, float]:
    text = metrics.render(STATS, HEALTH, states={"chat": "sleeping"}, waiting={"chat": 4}).decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def finish(metrics: PrometheusMetrics, reason: str, seconds: float) -> None:
    metrics.on_first_token("chat", seconds / 2, 3, 1)
    metrics.on_tokens("chat", 0.1, 2)
    metrics.on_stream_end(StreamSummary("chat", reason, 3, 3, 8, seconds / 2, seconds))


def test_every_metric_of_a_model_exists_from_the_start() -> None:
    samples = values(PrometheusMetrics(["chat"], {"chat": LatencySlo(ttft=1.0)}))
    assert samples['vllm:generation_tokens_total{model_name="chat"}'] == 0
    assert samples['vllm:request_success_total{finished_reason="stop",model_name="chat"}'] == 0
    assert samples['muxjax:slo_hits_total{model_name="chat",target="ttft"}'] == 0


def test_streams_are_counted() -> None:
    metrics = PrometheusMetrics(["chat"], {})
    finish(metrics, "stop", 1.0)
    finish(metrics, "timeout", 9.0)
    samples = values(metrics)
    assert samples['vllm:prompt_tokens_total{model_name="chat"}'] == 6
    assert samples['vllm:generation_tokens_total{model_name="chat"}'] == 6
    assert samples['vllm:request_success_total{finished_reason="stop",model_name="chat"}'] == 1
    assert samples['muxjax:request_failure_total{model_name="chat",reason="timeout"}'] == 1
    assert samples['vllm:e2e_request_latency_seconds_sum{model_name="chat"}'] == 1.0
    assert samples['vllm:inter_token_latency_seconds_sum{model_name="chat"}'] == 0.1


def test_finished_requests_are_compared_with_the_targets() -> None:
    metrics = PrometheusMetrics(["chat"], {"chat": LatencySlo(ttft=1.0, tpot=0.1)})
    finish(metrics, "stop", 1.0)
    finish(metrics, "length", 4.0)
    finish(metrics, "cancelled", 9.0)
    assert metrics.slo_counts("chat") == {
        "ttft": {"seconds": 1.0, "hits": 1, "misses": 1},
        "tpot": {"seconds": 0.1, "hits": 0, "misses": 2},
    }
    metrics.set_targets({"other": LatencySlo(ttft=1.0)})
    assert metrics.slo_counts("chat") == {}


def test_open_and_refused_calls_are_counted() -> None:
    metrics = PrometheusMetrics([], {})
    for status in (200, 429):
        metrics.on_call_start()
        metrics.on_call_end(status)
    metrics.on_call_start()
    samples = values(metrics)
    assert samples["muxjax:open_calls"] == 1
    assert samples['muxjax:refused_requests_total{status="429"}'] == 1
    assert 'muxjax:refused_requests_total{status="200"}' not in samples


def test_unit_metrics_are_read_from_stats_and_health() -> None:
    samples = values(PrometheusMetrics(["chat"], {}))
    assert samples['vllm:num_requests_running{model_name="chat"}'] == 2
    assert samples['vllm:kv_cache_usage_perc{model_name="chat"}'] == 0.25
    assert samples['vllm:num_preemptions_total{model_name="chat"}'] == 3
    assert samples['muxjax:device_seconds_total{model_name="chat",phase="decode"}'] == 1
    assert samples['muxjax:queue{model_name="chat"}'] == 4
    assert samples['muxjax:model_state{model_name="chat",state="sleeping"}'] == 1
    assert samples['muxjax:model_state{model_name="chat",state="loaded"}'] == 0
    assert samples['muxjax:unit_restarts_total{unit="0"}'] == 2
    assert samples['muxjax:unit_stalled_seconds{unit="0"}'] == 1.5
