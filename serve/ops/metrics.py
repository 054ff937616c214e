"""Prometheus metrics of requests and HTTP calls.

Names and buckets are vLLM's where vLLM has the metric, so that its dashboards work; all others
begin with `muxjax:`. Every request metric has the label `model_name`. The metrics of units are in
`unit_metrics.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from muxjax.engine.health import ModelStatus, UnitHealth
from muxjax.scheduling.specs import LatencySlo
from muxjax.serve.access.tracked_stream import StreamSummary
from muxjax.serve.ops.unit_metrics import MODEL_LABELS, UnitCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# fmt: off
_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
)
_TPOT_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0,
)
_E2E_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 480.0, 1920.0,
)
# fmt: on
_TOKEN_COUNT_BUCKETS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


class PrometheusMetrics:
    """Counts requests and HTTP calls, and renders all metrics.

    It observes streams (`StreamObserver`) and calls (`CallObserver`).

    Args:
      models: names of the models. Their metrics exist from the start, with the value zero.
      slo: latency targets by model; a model without targets has no SLO counters.
    """

    def __init__(self, models: Iterable[str], slo: Mapping[str, LatencySlo]) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._slo = dict(slo)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, MODEL_LABELS, registry=self.registry, buckets=buckets)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*MODEL_LABELS, *labels), registry=self.registry)

        self._ttft = histogram(
            "vllm:time_to_first_token_seconds", "Time to first token in seconds.", _TTFT_BUCKETS
        )
        self._itl = histogram(
            "vllm:inter_token_latency_seconds",
            "Time between tokens in seconds; the mean for tokens that arrive together.",
            _TPOT_BUCKETS,
        )
        self._tpot = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per output token after the first of a request, in seconds.",
            _TPOT_BUCKETS,
        )
        self._e2e = histogram(
            "vllm:e2e_request_latency_seconds",
            "End-to-end latency of a request in seconds.",
            _E2E_BUCKETS,
        )
        self._prompt_sizes = histogram(
            "vllm:request_prompt_tokens",
            "Number of prompt tokens of a request.",
            _TOKEN_COUNT_BUCKETS,
        )
        self._output_sizes = histogram(
            "vllm:request_generation_tokens",
            "Number of generated tokens of a request.",
            _TOKEN_COUNT_BUCKETS,
        )
        self._prompt_tokens = counter(
            "vllm:prompt_tokens", "Prompt tokens of requests that reached their first token."
        )
        self._output_tokens = counter("vllm:generation_tokens", "Generated tokens.")
        self._success = counter(
            "vllm:request_success",
            "Requests that finished with the reason stop or length.",
            "finished_reason",
        )
        self._failure = counter(
            "muxjax:request_failure", "Requests that ended for another reason.", "reason"
        )
        self._refused = Counter(
            "muxjax:refused_requests",
            "HTTP calls that got a 4xx or 5xx status.",
            ("status",),
            registry=self.registry,
        )
        self._slo_hits = counter(
            "muxjax:slo_hits", "Finished requests within the latency target.", "target"
        )
        self._slo_misses = counter(
            "muxjax:slo_misses", "Finished requests above the latency target.", "target"
        )
        self._open_calls = Gauge(
            "muxjax:open_calls", "HTTP calls in progress.", registry=self.registry
        )
        for model in models:
            self._initialize(model)

    def _initialize(self, model: str) -> None:
        """Creates the metrics of a model with the value zero."""
        for histogram in (self._ttft, self._itl, self._tpot, self._e2e):
            histogram.labels(model)
        for counter in (self._prompt_tokens, self._output_tokens):
            counter.labels(model)
        for reason in ("stop", "length"):
            self._success.labels(model, reason)
        for target in self._targets(model):
            self._slo_hits.labels(model, target)
            self._slo_misses.labels(model, target)

    def _targets(self, model: str) -> dict[str, float]:
        """Latency targets of a model in seconds, by name (`ttft`, `tpot`)."""
        slo = self._slo.get(model)
        targets = {} if slo is None else {"ttft": slo.ttft, "tpot": slo.tpot}
        return {name: value for name, value in targets.items() if value is not None}

    def set_targets(self, slo: Mapping[str, LatencySlo]) -> None:
        """Replaces the latency targets, by model."""
        self._slo = dict(slo)
        for model in self._slo:
            self._initialize(model)

    # StreamObserver

    def on_first_token(self, model: str, seconds: float, prompt_tokens: int, tokens: int) -> None:
        """See `StreamObserver`."""
        self._ttft.labels(model).observe(seconds)
        self._prompt_tokens.labels(model).inc(prompt_tokens)
        self._output_tokens.labels(model).inc(tokens)

    def on_tokens(self, model: str, seconds: float, tokens: int) -> None:
        """See `StreamObserver`."""
        self._itl.labels(model).observe(seconds / tokens)
        self._output_tokens.labels(model).inc(tokens)

    def on_stream_end(self, summary: StreamSummary) -> None:
        """See `StreamObserver`."""
        model = summary.model
        if summary.reason not in ("stop", "length"):
            self._failure.labels(model, summary.reason).inc()
            return
        self._success.labels(model, summary.reason).inc()
        self._e2e.labels(model).observe(summary.seconds)
        self._prompt_sizes.labels(model).observe(summary.prompt_tokens)
        self._output_sizes.labels(model).observe(summary.output_tokens)
        latencies = {"ttft": summary.ttft, "tpot": summary.tpot}
        if summary.tpot is not None:
            self._tpot.labels(model).observe(summary.tpot)
        for target, limit in self._targets(model).items():
            latency = latencies[target]
            if latency is not None:
                counter = self._slo_hits if latency <= limit else self._slo_misses
                counter.labels(model, target).inc()

    # CallObserver

    def on_call_start(self) -> None:
        """See `CallObserver`."""
        self._open_calls.inc()

    def on_call_end(self, status: int) -> None:
        """See `CallObserver`."""
        self._open_calls.dec()
        if status >= 400:
            self._refused.labels(str(status)).inc()

    def slo_counts(self, model: str) -> dict[str, dict[str, float]]:
        """Returns `seconds`, `hits` and `misses` of each latency target of a model."""
        return {
            target: {
                "seconds": limit,
                "hits": _value(self._slo_hits.labels(model, target)),
                "misses": _value(self._slo_misses.labels(model, target)),
            }
            for target, limit in self._targets(model).items()
        }

    def render(
        self,
        stats: Mapping[str, Any],
        health: Iterable[UnitHealth],
        states: Mapping[str, ModelStatus],
        waiting: Mapping[str, int],
    ) -> bytes:
        """Renders all metrics in the text format of Prometheus.

        Args:
          stats: counters of the fleet, from `StatsCache`.
          health: health of every unit.
          states: states of all models.
          waiting: requests that wait for their first token, by model.
        """
        collector = UnitCollector(stats, list(health), states, waiting)
        self.registry.register(collector)
        try:
            return generate_latest(self.registry)
        finally:
            self.registry.unregister(collector)


def _value(counter: Counter) -> float:
    return next(
        sample.value
        for metric in counter.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    )
