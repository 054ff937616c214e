"""Prometheus metrics of units and models, read from their counters at each scrape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from muxjax.engine.health import ModelStatus, UnitHealth

MODEL_LABELS = ("model_name",)
_GAUGES = {
    "waiting": ("vllm:num_requests_waiting", "Requests that wait in the queue of the scheduler."),
    "running": ("vllm:num_requests_running", "Requests that hold KV cache pages."),
    "kv_pages_used": ("muxjax:kv_pages_used", "KV cache pages in use."),
    "kv_pages_cached": (
        "muxjax:kv_pages_cached",
        "Unused KV cache pages with prefixes that can be reused until the pages are reallocated.",
    ),
    "kv_pages_quota": ("muxjax:kv_pages_quota", "Current quota in KV cache pages."),
    "kv_pages_floor": ("muxjax:kv_pages_floor", "Guaranteed minimum of the quota in pages."),
    "kv_pages_borrowed": ("muxjax:kv_pages_borrowed", "Pages allocated beyond the quota."),
}
_COUNTERS = {
    "preemptions": ("vllm:num_preemptions", "Preempted requests."),
    "prefix_queries": (
        "vllm:prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
    ),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache."),
}
_PHASES = ("prefill", "decode")


class UnitCollector(Collector):
    """Collects the metrics of one scrape.

    Args:
      stats: counters of the fleet.
      health: health of every unit.
      states: states of all models.
      waiting: requests that wait for their first token, by model.
    """

    def __init__(
        self,
        stats: Mapping[str, Any],
        health: list[UnitHealth],
        states: Mapping[str, ModelStatus],
        waiting: Mapping[str, int],
    ) -> None:
        self._models: Mapping[str, Any] = stats.get("models", {})
        self._pool_pages = stats.get("usable_pages") or 0
        self._health = health
        self._states = states
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        """Yields every metric."""
        yield from self._scheduler_metrics()
        yield from self._device_time_metrics()
        yield from self._state_metrics()

    def _scheduler_metrics(self) -> Iterator[Metric]:
        for key, (name, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=MODEL_LABELS)
            for model, stats in self._models.items():
                gauge.add_metric([model], stats.get(key, 0))
            yield gauge
        for key, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=MODEL_LABELS)
            for model, stats in self._models.items():
                counter.add_metric([model], stats.get(key, 0))
            yield counter
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc",
            "Fraction of the KV cache pool in use by the model, from 0 to 1.",
            labels=MODEL_LABELS,
        )
        for model, stats in self._models.items():
            pages = stats.get("kv_pages_used", 0)
            usage.add_metric([model], pages / self._pool_pages if self._pool_pages else 0.0)
        yield usage

    def _device_time_metrics(self) -> Iterator[Metric]:
        labels = (*MODEL_LABELS, "phase")
        seconds = CounterMetricFamily(
            "muxjax:device_seconds", "Device time used, in seconds.", labels=labels
        )
        shares = GaugeMetricFamily(
            "muxjax:time_share", "Share of the device time assigned to the model.", labels=labels
        )
        for model, stats in self._models.items():
            for phase in _PHASES:
                seconds.add_metric([model, phase], stats.get(f"{phase}_seconds", 0.0))
                shares.add_metric([model, phase], stats.get(f"{phase}_share", 0.0))
        yield seconds
        yield shares

    def _state_metrics(self) -> Iterator[Metric]:
        queue = GaugeMetricFamily(
            "muxjax:queue", "Requests that wait for their first token.", labels=MODEL_LABELS
        )
        state = GaugeMetricFamily(
            "muxjax:model_state",
            "1 for the current state of the model, 0 for all others.",
            labels=(*MODEL_LABELS, "state"),
        )
        restarts = CounterMetricFamily(
            "muxjax:unit_restarts", "Restarts of the unit.", labels=("unit",)
        )
        stalled = GaugeMetricFamily(
            "muxjax:unit_stalled_seconds",
            "Seconds since the last step of a unit that has work; 0 when idle.",
            labels=("unit",),
        )
        for unit in self._health:
            restarts.add_metric([unit.unit], unit.restarts)
            stalled.add_metric([unit.unit], unit.stalled_seconds)
        for model, current in self._states.items():
            queue.add_metric([model], self._waiting.get(model, 0))
            for status in get_args(ModelStatus):
                state.add_metric([model, status], int(status == current))
        yield from (queue, state, restarts, stalled)
