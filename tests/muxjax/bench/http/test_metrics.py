"""Numbers of a run, worked out by hand."""

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
    asked = RequestInput(model, "x", 10, tokens)
    return RequestResult(
        asked,
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
        result("a", 0.0, 1.0, 3.0, 5),  # tpot 0.5, 5/3 tokens a second
        result("a", 1.0, 1.5, 1.5, 1),  # no tpot, 2 tokens a second
        result("b", 0.0, 2.0, 4.0, 3),  # tpot 1
        result("b", 0.0, 0.0, 0.0, 3, error="HTTP 500"),
    ],
    duration=4.0,
)


def test_vllms_keys() -> None:
    found = summarize(LOAD, Measures(percentiles=(50.0, 99.9), goodput={"ttft": 1000.0}))
    assert found["duration"] == 4.0
    assert (found["completed"], found["failed"]) == (3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 9)
    assert found["request_throughput"] == pytest.approx(3 / 4)
    assert found["output_throughput"] == pytest.approx(9 / 4)
    assert found["total_token_throughput"] == pytest.approx(39 / 4)
    assert found["request_goodput"] == pytest.approx(2 / 4)
    assert found["slo_attainment"] == pytest.approx(2 / 4)
    ttfts = [1000.0, 500.0, 2000.0]
    assert found["mean_ttft_ms"] == pytest.approx(np.mean(ttfts))
    assert found["median_ttft_ms"] == pytest.approx(1000)
    assert found["std_ttft_ms"] == pytest.approx(np.std(ttfts))
    assert found["p99.9_ttft_ms"] == pytest.approx(np.percentile(ttfts, 99.9))
    assert found["mean_tpot_ms"] == pytest.approx(750)
    assert found["mean_itl_ms"] == pytest.approx(500)
    assert found["mean_e2el_ms"] == pytest.approx((3000 + 500 + 4000) / 3)
    assert found["max_concurrent_requests"] == 3
    assert found["models"]["b"]["completed"] == 1
    assert found["models"]["b"]["slo_attainment"] == 0
    # Model a: (5/3 + 2) / 2; model b: (3/4 + 0) / 2.
    a, b = 11 / 6, 3 / 8
    assert found["jain_index"] == pytest.approx((a + b) ** 2 / (2 * (a * a + b * b)))


def test_without_goodput_and_with_nothing_finished() -> None:
    failed = LoadResult([result("a", 0.0, 0.0, 0.0, 1, error="no")], 1.0, interrupted=2)
    found = summarize(failed)
    assert found["request_goodput"] is None
    assert found["slo_attainment"] is None
    assert found["mean_ttft_ms"] is None
    assert found["jain_index"] is None
    assert found["interrupted"] == 2


def test_invalid_measures() -> None:
    with pytest.raises(BenchError, match="no metric 'tps'"):
        Measures(metrics=("tps",))
    with pytest.raises(BenchError, match="0 to 100"):
        Measures(percentiles=(101.0,))
    with pytest.raises(BenchError, match="not 'itl'"):
        Measures(goodput={"itl": 1.0})
    with pytest.raises(BenchError, match="0 ms or more"):
        Measures(goodput={"ttft": -1.0})
