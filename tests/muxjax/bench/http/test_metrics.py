"""Metrics of a small run, compared with exact values."""

from __future__ import annotations

import numpy as np
import pytest

from muxjax.bench.http.client import RequestInput, RequestResult
from muxjax.bench.http.load import LoadResult
from muxjax.bench.http.metrics import Measures, summarize
from muxjax.errors import BenchError


def result(
    model: str, sent: float, first: float, end: float, tokens: int, error: str = ""
) -> RequestResult:
    request = RequestInput(model, "x", 10, tokens)
    return RequestResult(
        request,
        sent,
        first,
        end,
        itl=[0.5] * (tokens - 1),
        prompt_tokens=10,
        output_tokens=tokens,
        counted=True,
        error=error,
    )


LOAD = LoadResult(
    [
        result("a", 0.0, 1.0, 3.0, 5),  # tpot 0.5, 5/3 tokens/s
        result("a", 1.0, 1.5, 1.5, 1),  # no tpot, 2 tokens/s
        result("b", 0.0, 2.0, 4.0, 3),  # tpot 1
        result("b", 0.0, 0.0, 0.0, 3, error="HTTP 500"),
    ],
    duration=4.0,
)


def test_metrics_of_vllm() -> None:
    metrics = summarize(LOAD, Measures(percentiles=(50.0, 99.9), goodput={"ttft": 1000.0}))
    assert metrics["duration"] == 4.0
    assert (metrics["completed"], metrics["failed"]) == (3, 1)
    assert (metrics["total_input_tokens"], metrics["total_output_tokens"]) == (30, 9)
    assert metrics["request_throughput"] == pytest.approx(3 / 4)
    assert metrics["output_throughput"] == pytest.approx(9 / 4)
    assert metrics["total_token_throughput"] == pytest.approx(39 / 4)
    assert metrics["request_goodput"] == pytest.approx(2 / 4)
    assert metrics["slo_attainment"] == pytest.approx(2 / 4)
    ttfts = [1000.0, 500.0, 2000.0]
    assert metrics["mean_ttft_ms"] == pytest.approx(np.mean(ttfts))
    assert metrics["median_ttft_ms"] == pytest.approx(1000)
    assert metrics["std_ttft_ms"] == pytest.approx(np.std(ttfts))
    assert metrics["p99.9_ttft_ms"] == pytest.approx(np.percentile(ttfts, 99.9))
    assert metrics["mean_tpot_ms"] == pytest.approx(750)
    assert metrics["mean_itl_ms"] == pytest.approx(500)
    assert metrics["mean_e2el_ms"] == pytest.approx((3000 + 500 + 4000) / 3)
    assert metrics["max_concurrent_requests"] == 3
    assert metrics["models"]["b"]["completed"] == 1
    assert metrics["models"]["b"]["slo_attainment"] == 0
    # Model a: (5/3 + 2) / 2; model b: (3/4 + 0) / 2.
    a, b = 11 / 6, 3 / 8
    assert metrics["jain_index"] == pytest.approx((a + b) ** 2 / (2 * (a * a + b * b)))


def test_metrics_without_goodput_and_finished_requests() -> None:
    failed = LoadResult([result("a", 0.0, 0.0, 0.0, 1, error="no")], 1.0, interrupted=2)
    metrics = summarize(failed)
    assert metrics["request_goodput"] is None
    assert metrics["slo_attainment"] is None
    assert metrics["mean_ttft_ms"] is None
    assert metrics["jain_index"] is None
    assert metrics["interrupted"] == 2


def test_invalid_measures() -> None:
    with pytest.raises(BenchError, match="no metric 'tps'"):
        Measures(metrics=("tps",))
    with pytest.raises(BenchError, match="0 to 100"):
        Measures(percentiles=(101.0,))
    with pytest.raises(BenchError, match="not 'itl'"):
        Measures(goodput={"itl": 1.0})
    with pytest.raises(BenchError, match="0 ms or more"):
        Measures(goodput={"ttft": -1.0})
