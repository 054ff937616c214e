"""Metrics of a simulation: throughput, latencies and SLO attainment.

| key | meaning |
|---|---|
| `offered_rate` | requests/s: all requests divided by the time of the last arrival |
| `total_throughput` | requests/s: sum of the models' throughputs; a model's throughput is its finished requests divided by the time from the start to its last completion (as in MuxServe's runs) |
| `rate_weighted_throughput` | the models' throughputs weighted by their fraction of the offered requests (MuxServe's measure) |
| `tokens_per_s` | prompt and output tokens of finished requests divided by the time of the last completion |
| `slo_attainment` | fraction of all offered requests that met the attainment criterion; rejected and failed requests count as misses |
| `request_goodput` | requests/s that met the criterion, over the time of the last completion |

`max_rate_at_99` is computed over several runs: see `simulation.sweep_rates`.

Latencies are stored as a histogram with bins of 0.1 %; memory does not grow with the number of
requests.
"""  # noqa: E501  a table

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from muxjax.errors import PlanError
from muxjax.placement.costs.cost_model import CostModel
from muxjax.placement.simulator.records import RequestRecord
from muxjax.scheduling.expected_load import ExpectedLoad
from muxjax.scheduling.specs import LatencySlo

_BIN_WIDTH = math.log(1.001)
"""Width of a bin on a logarithmic scale: 0.1 %."""
_SHORTEST = 1e-9
"""Seconds at the lower edge of the histogram; shorter times count as 0."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class LatencyHistogram:
    """Mean and quantiles of times in seconds, in bins of 0.1 %; zeros are exact."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._bins: dict[int, int] = {}

    def add(self, seconds: float) -> None:
        """Adds a time of 0 or more."""
        self.count += 1
        self._sum += seconds
        index = round(math.log(seconds / _SHORTEST) / _BIN_WIDTH) if seconds > _SHORTEST else -1
        self._bins[index] = self._bins.get(index, 0) + 1

    @property
    def mean(self) -> float | None:
        """The mean in seconds; None if empty."""
        return self._sum / self.count if self.count else None

    def quantile(self, fraction: float) -> float | None:
        """A quantile in seconds, for example the median for 0.5; None if empty."""
        target = fraction * self.count
        cumulative = 0
        for index in sorted(self._bins):
            cumulative += self._bins[index]
            if cumulative >= target - 1e-9:
                return 0.0 if index < 0 else _SHORTEST * math.exp(index * _BIN_WIDTH)
        return None

    def summary(self) -> dict[str, float | None]:
        """Mean and `QUANTILES`, in seconds."""
        return {
            "mean": self.mean,
            **{name: self.quantile(fraction) for name, fraction in QUANTILES.items()},
        }


@dataclass(frozen=True)
class AttainmentCriterion:
    """Decides whether a finished request of one model met its latency SLO.

    Attributes:
      slo: explicit `ttft` and `tpot` targets are always checked.
      end_to_end: whether the latency of a request is also limited, to `slo.scale` times its
        isolated latency.
      kind: the model's name in the cost model, for isolated latencies.
      tp: devices that the model is sharded over in isolation.
    """

    slo: LatencySlo = field(default_factory=LatencySlo)
    end_to_end: bool = False
    kind: str = ""
    tp: int = 1

    @classmethod
    def from_targets(
        cls,
        ttft: float | None = None,
        tpot: float | None = None,
        scale: float | None = None,
        *,
        kind: str = "",
        tp: int = 1,
    ) -> Self:
        """Builds a criterion from the targets that are not None.

        Args:
          ttft: seconds to the first token.
          tpot: seconds per output token after it.
          scale: maximum end-to-end latency, as a multiple of the isolated latency.
          kind: the model's name in the cost model.
          tp: devices that the model is sharded over in isolation.

        Raises:
          PlanError: a target that is not above 0.
        """
        for name, value in (("ttft", ttft), ("tpot", tpot), ("scale", scale)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise PlanError(f"the target for {name} must be above 0, not {value}")
        slo = LatencySlo(ttft, tpot) if scale is None else LatencySlo(ttft, tpot, scale)
        return cls(slo, scale is not None, kind, tp)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as in the report of a simulation; None for unchecked targets."""
        return {
            "ttft": self.slo.ttft,
            "tpot": self.slo.tpot,
            "scale": self.slo.scale if self.end_to_end else None,
            "kind": self.kind,
            "tp": self.tp,
        }

    def met(self, record: RequestRecord, costs: CostModel) -> bool:
        """Whether the request finished within the targets."""
        ttft, latency = record.ttft, record.latency
        if record.status != "finished" or ttft is None or latency is None:
            return False
        if not self.slo.met_by(ttft, record.tpot):
            return False
        return not self.end_to_end or latency <= self.slo.scale * self.isolated_latency(
            record, costs
        )

    def scheduler_slo(self, load: ExpectedLoad, costs: CostModel) -> LatencySlo:
        """The scheduler's SLO, with the isolated latency of a mean request of `load`."""
        if not self.end_to_end:
            return self.slo
        prompt = max(1.0, load.prompt_tokens)
        return replace(
            self.slo,
            isolated_ttft=costs.prefill_seconds(self.kind, prompt, prompt, tp=self.tp),
            isolated_tpot=costs.decode_seconds(self.kind, 1, load.decode_context, tp=self.tp),
        )

    def isolated_latency(self, record: RequestRecord, costs: CostModel) -> float:
        """Seconds from arrival to the last token of the request without other load."""
        prompt, output = record.prompt_tokens, record.made_tokens
        prefill = costs.prefill_seconds(self.kind, prompt, prompt, tp=self.tp)
        context = prompt + output / 2
        return prefill + (output - 1) * costs.decode_seconds(self.kind, 1, context, tp=self.tp)


@dataclass
class _RequestCounts:
    """Counts and latencies of the requests of one model, or of all models."""

    requests: int = 0
    finished: int = 0
    rejected: int = 0
    failed: int = 0
    truncated: int = 0
    preemptions: int = 0
    met: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    last_arrival: float = 0.0
    last_end: float = 0.0
    ttft: LatencyHistogram = field(default_factory=LatencyHistogram)
    tpot: LatencyHistogram = field(default_factory=LatencyHistogram)
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)

    def add(self, record: RequestRecord, met: bool) -> None:
        self.requests += 1
        self.last_arrival = max(self.last_arrival, record.arrival)
        self.preemptions += record.preemptions
        if record.status == "rejected":
            self.rejected += 1
        elif record.status == "failed":
            self.failed += 1
        else:
            self.finished += 1
            self.met += met
            self.truncated += record.made_tokens < record.output_tokens
            self.prompt_tokens += record.prompt_tokens
            self.output_tokens += record.made_tokens
            self.last_end = max(self.last_end, record.end or 0.0)
            for histogram, value in (
                (self.ttft, record.ttft),
                (self.tpot, record.tpot),
                (self.latency, record.latency),
            ):
                if value is not None:
                    histogram.add(value)

    def summary(self) -> dict[str, Any]:
        seconds = self.last_end

        def per_second(amount: float) -> float:
            return amount / seconds if seconds else 0.0

        return {
            "requests": self.requests,
            "offered_rate": self.requests / self.last_arrival if self.last_arrival else None,
            "finished": self.finished,
            "rejected": self.rejected,
            "failed": self.failed,
            "truncated": self.truncated,
            "preemptions": self.preemptions,
            "seconds": seconds,
            "tokens_per_s": per_second(self.prompt_tokens + self.output_tokens),
            "output_tokens_per_s": per_second(self.output_tokens),
            "slo_attainment": self.met / self.requests if self.requests else None,
            "request_goodput": per_second(self.met),
            "ttft_s": self.ttft.summary(),
            "tpot_s": self.tpot.summary(),
            "latency_s": self.latency.summary(),
        }


class SimulationMetrics:
    """Aggregates the records of one run.

    Args:
      criteria: attainment criterion of each model.
      costs: costs for criteria that are multiples of the isolated latency.
    """

    def __init__(self, criteria: Mapping[str, AttainmentCriterion], costs: CostModel) -> None:
        self._criteria = criteria
        self._costs = costs
        self._all = _RequestCounts()
        self._models = {name: _RequestCounts() for name in criteria}

    def add(self, record: RequestRecord) -> bool:
        """Adds a record.

        Returns:
          Whether the request met its criterion.
        """
        met = self._criteria[record.model].met(record, self._costs)
        self._all.add(record, met)
        self._models[record.model].add(record, met)
        return met

    def attainment(self, model: str) -> float:
        """Fraction of a model's requests that met the criterion; 1 without requests."""
        counts = self._models[model]
        return counts.met / counts.requests if counts.requests else 1.0

    @property
    def slo_attainment(self) -> float:
        """Fraction of the requests that met their criterion; 1 without requests."""
        return self._all.met / self._all.requests if self._all.requests else 1.0

    def summary(self) -> dict[str, Any]:
        """The metrics of the module's table for all models, and for each under `models`."""
        throughputs = {
            name: counts.finished / counts.last_end if counts.last_end else 0.0
            for name, counts in self._models.items()
        }
        weighted = sum(throughputs[name] * c.requests for name, c in self._models.items())
        models = {
            name: {"throughput": throughputs[name], **counts.summary()}
            for name, counts in self._models.items()
        }
        return {
            "total_throughput": sum(throughputs.values()),
            "rate_weighted_throughput": weighted / max(1, self._all.requests),
            **self._all.summary(),
            "models": models,
        }
