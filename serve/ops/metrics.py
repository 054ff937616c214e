"""Prometheus metrics: vLLM's names, so that its dashboards work, and `muxjax:` for the rest.

What requests do is counted as it happens (`PrometheusMetrics` is an observer of `Admission`); what
the units do is read from their counters when somebody asks. Every metric has `model_name`, for
models are what MuxJAX divides a device between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from muxjax.engine.health import ModelStatus, UnitHealth
from muxjax.scheduling.specs import LatencySlo
from muxjax.serve.access.admission import Admission
from muxjax.serve.access.tracked_stream import Ending

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# vLLM's buckets.
_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
)
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0)
_WHOLE = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    60.0,
    120.0,
    480.0,
    1920.0,
)
_COUNTS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_MODEL = ("model_name",)


class PrometheusMetrics:
    """Counts what requests do, and tells all of it.

    Args:
      models: names, so that every metric is there from the start.
      slo: latency targets by model; those without any count no hits.
    """

    def __init__(self, models: Iterable[str], slo: Mapping[str, LatencySlo]) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._slo = dict(slo)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, _MODEL, registry=self.registry, buckets=buckets)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*_MODEL, *labels), registry=self.registry)

        self._ttft = histogram(
            "vllm:time_to_first_token_seconds", "Seconds to the first token.", _TTFT
        )
        self._between = histogram(
            "vllm:inter_token_latency_seconds",
            "Seconds between tokens; of several that come at once, their mean.",
            _TOKEN,
        )
        self._tpot = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean seconds of a request for each token after the first.",
            _TOKEN,
        )
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Seconds of a request.", _WHOLE)
        self._prompt_sizes = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", _COUNTS
        )
        self._output_sizes = histogram(
            "vllm:request_generation_tokens", "Output tokens of a request.", _COUNTS
        )
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens of requests that got a token.")
        self._output = counter("vllm:generation_tokens", "Output tokens.")
        self._success = counter(
            "vllm:request_success", "Requests that ended well.", "finished_reason"
        )
        self._failed = counter("muxjax:request_failure", "Requests that did not.", "reason")
        self._refused = Counter(
            "muxjax:refused_requests",
            "Calls that were answered with 4xx or 5xx before any token.",
            ("status",),
            registry=self.registry,
        )
        self._hits = counter(
            "muxjax:slo_hits", "Requests within a latency target of their model.", "target"
        )
        self._misses = counter("muxjax:slo_misses", "Requests beyond one.", "target")
        self._open = Gauge(
            "muxjax:open_calls", "HTTP calls that are being answered.", registry=self.registry
        )
        for model in models:
            self._prepare(model)

    def _prepare(self, model: str) -> None:
        """Shows a model's metrics before anything has happened."""
        for histogram in (self._ttft, self._between, self._tpot, self._e2e):
            histogram.labels(model)
        for counter in (self._prompt, self._output):
            counter.labels(model)
        for reason in ("stop", "length"):
            self._success.labels(model, reason)
        for target in self._targets(model):
            self._hits.labels(model, target)
            self._misses.labels(model, target)

    def _targets(self, model: str) -> dict[str, float]:
        slo = self._slo.get(model)
        found = {} if slo is None else {"ttft": slo.ttft, "tpot": slo.tpot}
        return {name: value for name, value in found.items() if value is not None}

    def set_targets(self, slo: Mapping[str, LatencySlo]) -> None:
        """Takes other latency targets by model."""
        self._slo = dict(slo)
        for model in self._slo:
            self._prepare(model)

    # Told by Admission

    def first(self, model: str, seconds: float, prompt_tokens: int, tokens: int) -> None:
        """See `watched.Observer`."""
        self._ttft.labels(model).observe(seconds)
        self._prompt.labels(model).inc(prompt_tokens)
        self._output.labels(model).inc(tokens)

    def more(self, model: str, seconds: float, tokens: int) -> None:
        """See `watched.Observer`."""
        self._between.labels(model).observe(seconds / tokens)
        self._output.labels(model).inc(tokens)

    def ended(self, ending: Ending) -> None:
        """See `watched.Observer`."""
        model = ending.model
        if ending.reason not in ("stop", "length"):
            self._failed.labels(model, ending.reason).inc()
            return
        self._success.labels(model, ending.reason).inc()
        self._e2e.labels(model).observe(ending.seconds)
        self._prompt_sizes.labels(model).observe(ending.prompt_tokens)
        self._output_sizes.labels(model).observe(ending.output_tokens)
        measured = {"ttft": ending.ttft, "tpot": ending.tpot}
        if ending.tpot is not None:
            self._tpot.labels(model).observe(ending.tpot)
        for target, limit in self._targets(model).items():
            value = measured[target]
            if value is not None:
                (self._hits if value <= limit else self._misses).labels(model, target).inc()

    # Told by the front

    def entered(self) -> None:
        """A call began."""
        self._open.inc()

    def left(self, status: int) -> None:
        """A call was answered."""
        self._open.dec()
        if status >= 400:
            self._refused.labels(str(status)).inc()

    def slo_counts(self, model: str) -> dict[str, dict[str, float]]:
        """Hits, misses and the target in seconds, for each target of a model."""
        return {
            target: {
                "seconds": limit,
                "hits": _value(self._hits.labels(model, target)),
                "misses": _value(self._misses.labels(model, target)),
            }
            for target, limit in self._targets(model).items()
        }

    def text(
        self,
        stats: Mapping[str, Any],
        health: Iterable[UnitHealth],
        admission: Admission,
        states: Mapping[str, ModelStatus],
    ) -> bytes:
        """All metrics in Prometheus' text format.

        Args:
          stats: from `Snapshots`.
          health: of the units.
          admission: where requests wait.
          states: of all models.
        """
        collector = _Units(stats, list(health), admission, states)
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


_GAUGES = {
    "waiting": ("vllm:num_requests_waiting", "Requests that wait in the unit."),
    "running": ("vllm:num_requests_running", "Requests that hold pages."),
    "kv_pages_used": ("muxjax:kv_pages_used", "Pages in use."),
    "kv_pages_cached": (
        "muxjax:kv_pages_cached",
        "Pages not in use that the prefix cache keeps until they are wanted.",
    ),
    "kv_pages_quota": ("muxjax:kv_pages_quota", "Pages of the quota as it is now."),
    "kv_pages_floor": ("muxjax:kv_pages_floor", "Pages that are always the model's."),
    "kv_pages_borrowed": ("muxjax:kv_pages_borrowed", "Pages leased beyond the quota."),
}
_COUNTERS = {
    "preemptions": ("vllm:num_preemptions", "Requests that lost their pages for a time."),
    "prefix_queries": (
        "vllm:prefix_cache_queries",
        "Prompt tokens that were looked for in the prefix cache.",
    ),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens that were found there."),
}
_PHASES = ("prefill", "decode")


class _Units(Collector):
    """The units' counters at one moment."""

    def __init__(
        self,
        stats: Mapping[str, Any],
        health: list[UnitHealth],
        admission: Admission,
        states: Mapping[str, ModelStatus],
    ) -> None:
        self._models: Mapping[str, Any] = stats.get("models", {})
        self._pages = stats.get("usable_pages") or 0
        self._health = health
        self._admission = admission
        self._states = states

    def collect(self) -> Iterator[Metric]:
        for key, (name, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=_MODEL)
            for model, found in self._models.items():
                gauge.add_metric([model], found.get(key, 0))
            yield gauge
        for key, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=_MODEL)
            for model, found in self._models.items():
                counter.add_metric([model], found.get(key, 0))
            yield counter
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Part of the unit's pool in use; 1 is all.", labels=_MODEL
        )
        for model, found in self._models.items():
            pages = found.get("kv_pages_used", 0)
            usage.add_metric([model], pages / self._pages if self._pages else 0.0)
        yield usage
        seconds = CounterMetricFamily(
            "muxjax:device_seconds", "Device time used.", labels=(*_MODEL, "phase")
        )
        shares = GaugeMetricFamily(
            "muxjax:time_share",
            "Share of device time that is the model's.",
            labels=(*_MODEL, "phase"),
        )
        for model, found in self._models.items():
            for phase in _PHASES:
                seconds.add_metric([model, phase], found.get(f"{phase}_seconds", 0.0))
                shares.add_metric([model, phase], found.get(f"{phase}_share", 0.0))
        yield seconds
        yield shares
        queue = GaugeMetricFamily(
            "muxjax:queue", "Requests that wait for their first token.", labels=_MODEL
        )
        state = GaugeMetricFamily(
            "muxjax:model_state", "1 for the state that the model is in.", labels=(*_MODEL, "state")
        )
        restarts = CounterMetricFamily(
            "muxjax:unit_restarts", "How often a unit was started anew.", labels=("unit",)
        )
        stalled = GaugeMetricFamily(
            "muxjax:unit_stalled_seconds",
            "How long a unit has had work and made no step.",
            labels=("unit",),
        )
        for unit in self._health:
            restarts.add_metric([unit.unit], unit.restarts)
            stalled.add_metric([unit.unit], unit.stalled_seconds)
        for model, found in self._states.items():
            queue.add_metric([model], self._admission.waiting(model))
            for status in get_args(ModelStatus):
                state.add_metric([model, status], int(status == found))
        yield from (queue, state, restarts, stalled)
