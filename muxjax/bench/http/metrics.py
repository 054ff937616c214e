"""A run over HTTP in numbers, under the names of vLLM's `bench serve`.

`completed`, `failed`, `duration`, `total_input_tokens`, `total_output_tokens`, `request_throughput`,
`request_goodput`, `output_throughput`, `total_token_throughput`, and `mean_`, `median_`, `std_` and
`pNN_` of `ttft_ms`, `tpot_ms`, `itl_ms` and `e2el_ms` are vLLM's, computed as it computes them:
latencies of finished requests only, TPOT of those with two tokens or more. Ours are:

| key | what it is |
|---|---|
| `models` | the same keys for each model |
| `slo_attainment` | part of all requests sent that finished within `--goodput`'s limits; failed ones are misses |
| `jain_index` | Jain's index of the models' speeds: 1 where all models are served equally fast, 1/n where one of n is served and the others not. A model's speed is the mean over its requests of output tokens for each second of latency; failed requests have speed 0 |
| `approximate_output_tokens` | requests whose tokens the server did not count, so that their events were counted |
| `interrupted` | requests that Ctrl-C left unfinished; they are in no other number |
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
    """What is reported.

    Attributes:
      metrics: latencies, of `METRICS`.
      percentiles: of them.
      goodput: limits in ms of `ttft`, `tpot` or `e2el`; without one there is no goodput.

    Raises:
      BenchError: a name that is not known, a percentile or limit that is none.
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
                raise BenchError(f"a percentile is from 0 to 100, not {percentile:g}")
        for name, limit in self.goodput.items():
            if name not in GOODPUT_METRICS:
                raise BenchError(f"--goodput takes {', '.join(GOODPUT_METRICS)}, not {name!r}")
            if not (math.isfinite(limit) and limit >= 0):
                raise BenchError(f"--goodput {name} must be 0 ms or more, not {limit}")


def summarize(load: LoadResult, measures: Measures | None = None) -> dict[str, Any]:
    """All keys of the module's table."""
    measures = measures or Measures()
    names = dict.fromkeys(outcome.ask.model for outcome in load.outcomes)
    of_model = {
        name: [outcome for outcome in load.outcomes if outcome.ask.model == name] for name in names
    }
    return {
        "duration": load.duration,
        **_block(load.outcomes, load.duration, measures),
        "max_concurrent_requests": _most_at_once(load.outcomes),
        "jain_index": jain_index([_speed(outcomes) for outcomes in of_model.values()]),
        "interrupted": load.interrupted,
        "models": {
            name: _block(outcomes, load.duration, measures) for name, outcomes in of_model.items()
        },
    }


def _block(
    outcomes: Sequence[RequestResult], duration: float, measures: Measures
) -> dict[str, Any]:
    done = [outcome for outcome in outcomes if outcome.success]
    prompt = sum(outcome.prompt_tokens for outcome in done)
    output = sum(outcome.output_tokens for outcome in done)

    def rate(amount: float) -> float:
        return amount / duration if duration > 0 else 0.0

    good = sum(_good(outcome, measures.goodput) for outcome in done)
    found: dict[str, Any] = {
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": rate(len(done)),
        "request_goodput": rate(good) if measures.goodput else None,
        "slo_attainment": good / len(outcomes) if measures.goodput and outcomes else None,
        "output_throughput": rate(output),
        "total_token_throughput": rate(prompt + output),
        "approximate_output_tokens": sum(not outcome.counted for outcome in done),
    }
    times = {
        "ttft": [outcome.ttft for outcome in done],
        "tpot": [outcome.tpot for outcome in done if outcome.output_tokens > 1],
        "itl": [gap for outcome in done for gap in outcome.itl],
        "e2el": [outcome.latency for outcome in done],
    }
    for name in measures.metrics:
        found.update(_statistics(name, times[name], measures.percentiles))
    return found


def _statistics(
    name: str, seconds: Sequence[float], percentiles: Sequence[float]
) -> dict[str, float | None]:
    values = 1e3 * np.asarray(seconds)
    some = len(values) > 0

    def of(function: Any, *arguments: float) -> float | None:
        return float(function(values, *arguments)) if some else None

    found = {
        f"mean_{name}_ms": of(np.mean),
        f"median_{name}_ms": of(np.median),
        f"std_{name}_ms": of(np.std),
    }
    for percentile in percentiles:
        found[f"p{percentile:g}_{name}_ms"] = of(np.percentile, percentile)
    return found


def _good(outcome: RequestResult, limits: Mapping[str, float]) -> bool:
    found = {"ttft": outcome.ttft, "tpot": outcome.tpot, "e2el": outcome.latency}
    return all(1e3 * found[name] <= limit for name, limit in limits.items())


def _speed(outcomes: Sequence[RequestResult]) -> float:
    speeds = [
        outcome.output_tokens / outcome.latency if outcome.success and outcome.latency else 0.0
        for outcome in outcomes
    ]
    return sum(speeds) / len(speeds)


def _most_at_once(outcomes: Sequence[RequestResult]) -> int:
    changes = []
    for outcome in outcomes:
        if outcome.success and outcome.sent is not None and outcome.end is not None:
            changes += [(outcome.sent, 1), (outcome.end, -1)]
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most
