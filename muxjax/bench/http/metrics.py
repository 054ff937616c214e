"""Metrics of a run over HTTP, under the names of vLLM's `bench serve`.

`completed`, `failed`, `duration`, `total_input_tokens`, `total_output_tokens`, `request_throughput`,
`request_goodput`, `output_throughput`, `total_token_throughput`, and `mean_`, `median_`, `std_` and
`pNN_` of `ttft_ms`, `tpot_ms`, `itl_ms` and `e2el_ms` are computed as in vLLM: latencies of finished
requests only, TPOT of requests with two or more tokens. MuxJAX adds:

| key | meaning |
|---|---|
| `models` | the same keys for each model |
| `slo_attainment` | fraction of all requests sent that finished within the limits of `--goodput`; a failed request is a miss |
| `jain_index` | Jain's fairness index of the models' speeds: 1 if all models are served equally fast, 1/n if only one of n models is served. A model's speed is the mean over its requests of output tokens per second of latency; a failed request has speed 0 |
| `approximate_output_tokens` | number of requests whose tokens the server did not report; their events were counted instead |
| `interrupted` | number of requests that Ctrl-C left unfinished; no other metric includes them |
"""  # noqa: E501  a table

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from muxjax.bench.http.client import RequestResult
from muxjax.bench.http.load import LoadResult
from muxjax.errors import BenchError
from muxjax.scheduling.fairness import jain_index

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Measures:
    """The metrics to report.

    Attributes:
      metrics: latencies to report, from `METRICS`.
      percentiles: percentiles of each latency.
      goodput: limits in ms for `ttft`, `tpot` or `e2el`; without a limit, goodput is not reported.

    Raises:
      BenchError: an unknown metric, or a percentile or limit out of range.
    """

    metrics: tuple[str, ...] = METRICS
    percentiles: tuple[float, ...] = (99.0,)
    goodput: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise BenchError(f"no metric {name!r}; there are {', '.join(METRICS)}")
        for percentile in self.percentiles:
            if not 0 <= percentile <= 100:
                raise BenchError(f"--metric-percentiles must be from 0 to 100, not {percentile:g}")
        for name, limit in self.goodput.items():
            if name not in GOODPUT_METRICS:
                raise BenchError(f"--goodput takes {', '.join(GOODPUT_METRICS)}, not {name!r}")
            if not (math.isfinite(limit) and limit >= 0):
                raise BenchError(f"--goodput {name} must be 0 ms or more, not {limit}")


def summarize(load: LoadResult, measures: Measures | None = None) -> dict[str, Any]:
    """All metrics of the module's table."""
    measures = measures or Measures()
    names = dict.fromkeys(result.request.model for result in load.results)
    by_model = {
        name: [result for result in load.results if result.request.model == name] for name in names
    }
    return {
        "duration": load.duration,
        **_model_metrics(load.results, load.duration, measures),
        "max_concurrent_requests": _peak_concurrency(load.results),
        "jain_index": jain_index([_speed(results) for results in by_model.values()]),
        "interrupted": load.interrupted,
        "models": {
            name: _model_metrics(results, load.duration, measures)
            for name, results in by_model.items()
        },
    }


def _model_metrics(
    results: Sequence[RequestResult], duration: float, measures: Measures
) -> dict[str, Any]:
    finished = [result for result in results if result.success]
    prompt = sum(result.prompt_tokens for result in finished)
    output = sum(result.output_tokens for result in finished)

    def rate(amount: float) -> float:
        return amount / duration if duration > 0 else 0.0

    good = sum(_meets_limits(result, measures.goodput) for result in finished)
    metrics: dict[str, Any] = {
        "completed": len(finished),
        "failed": len(results) - len(finished),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": rate(len(finished)),
        "request_goodput": rate(good) if measures.goodput else None,
        "slo_attainment": good / len(results) if measures.goodput and results else None,
        "output_throughput": rate(output),
        "total_token_throughput": rate(prompt + output),
        "approximate_output_tokens": sum(not result.counted for result in finished),
    }
    times = {
        "ttft": [result.ttft for result in finished],
        "tpot": [result.tpot for result in finished if result.output_tokens > 1],
        "itl": [gap for result in finished for gap in result.itl],
        "e2el": [result.latency for result in finished],
    }
    for name in measures.metrics:
        metrics.update(_statistics(name, times[name], measures.percentiles))
    return metrics


def _statistics(
    name: str, seconds: Sequence[float], percentiles: Sequence[float]
) -> dict[str, float | None]:
    values = 1e3 * np.asarray(seconds)
    not_empty = len(values) > 0

    def statistic(function: Any, *arguments: float) -> float | None:
        return float(function(values, *arguments)) if not_empty else None

    statistics = {
        f"mean_{name}_ms": statistic(np.mean),
        f"median_{name}_ms": statistic(np.median),
        f"std_{name}_ms": statistic(np.std),
    }
    for percentile in percentiles:
        statistics[f"p{percentile:g}_{name}_ms"] = statistic(np.percentile, percentile)
    return statistics


def _meets_limits(result: RequestResult, limits: Mapping[str, float]) -> bool:
    latencies = {"ttft": result.ttft, "tpot": result.tpot, "e2el": result.latency}
    return all(1e3 * latencies[name] <= limit for name, limit in limits.items())


def _speed(results: Sequence[RequestResult]) -> float:
    speeds = [
        result.output_tokens / result.latency if result.success and result.latency else 0.0
        for result in results
    ]
    return sum(speeds) / len(speeds)


def _peak_concurrency(results: Sequence[RequestResult]) -> int:
    changes = []
    for result in results:
        if result.success and result.sent is not None and result.end is not None:
            changes += [(result.sent, 1), (result.end, -1)]
    peak = running = 0
    for _, change in sorted(changes):
        running += change
        peak = max(peak, running)
    return peak
