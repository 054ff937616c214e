"""What a simulation shows: throughput, latencies, attainment of targets. Each has one name.

| key | what it is |
|---|---|
| `offered_rate` | requests/s: all requests over the time to the last arrival |
| `total_throughput` | requests/s: the models' throughputs added up, each its finished requests over the time from the start to its own last one (as MuxServe's runs count) |
| `rate_weighted_throughput` | the same, weighted by each model's part of the requests offered (MuxServe's measure in its figures) |
| `tokens_per_s` | prompt and output tokens of finished requests, over the time to the last one |
| `slo_attainment` | part of all requests offered that finished within their target; rejected and failed ones are misses |
| `request_goodput` | requests/s that finished within their target, over the time to the last one |

`max_rate_at_99` is a property of several runs: see `simulation.sweep`.

Latencies are kept as counts in bins 0.1 % wide, so memory does not grow with the requests.
"""  # noqa: E501  a table

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from muxjax.placement.costs.cost_model import CostModel
from muxjax.placement.simulator.records import RequestRecord
from muxjax.scheduling.specs import LatencySlo

_BIN = math.log(1.001)
_SHORTEST = 1e-9
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Distribution:
    """Mean and quantiles of times, in bins of 0.1 %; exact zeros are kept."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._bins: dict[int, int] = {}

    def add(self, seconds: float) -> None:
        """Counts a time, 0 or more."""
        self.count += 1
        self._sum += seconds
        index = round(math.log(seconds / _SHORTEST) / _BIN) if seconds > _SHORTEST else -1
        self._bins[index] = self._bins.get(index, 0) + 1

    @property
    def mean(self) -> float | None:
        """The mean; None of nothing."""
        return self._sum / self.count if self.count else None

    def quantile(self, part: float) -> float | None:
        """The least time that this part of all does not exceed; None of nothing."""
        wanted = part * self.count
        seen = 0
        for index in sorted(self._bins):
            seen += self._bins[index]
            if seen >= wanted - 1e-9:
                return 0.0 if index < 0 else _SHORTEST * math.exp(index * _BIN)
        return None

    def summary(self) -> dict[str, float | None]:
        """Mean and `QUANTILES`."""
        return {
            "mean": self.mean,
            **{name: self.quantile(part) for name, part in QUANTILES.items()},
        }


@dataclass(frozen=True)
class AttainmentTarget:
    """The latency that a request of one model may have. What is None is not asked for.

    Attributes:
      ttft: seconds to the first token.
      tpot: seconds for each token after it.
      scale: whole latency, in multiples of what the request takes alone.
      kind, tp: for `scale`: the model's name in the cost model, and on how many devices it is
        alone.
    """

    ttft: float | None = None
    tpot: float | None = None
    scale: float | None = None
    kind: str = ""
    tp: int = 1

    def met(self, record: RequestRecord, costs: CostModel) -> bool:
        """Whether the request finished within the target."""
        ttft, tpot, latency = record.ttft, record.tpot, record.latency
        if record.status != "finished" or ttft is None or latency is None:
            return False
        if self.ttft is not None and ttft > self.ttft:
            return False
        if self.tpot is not None and tpot is not None and tpot > self.tpot:
            return False
        if self.scale is None:
            return True
        return latency <= self.scale * self.alone(record, costs)

    def for_scheduler(
        self, prompt_tokens: float, output_tokens: float, costs: CostModel
    ) -> LatencySlo:
        """The same target as the scheduler takes it, for requests of these mean lengths."""
        if self.scale is None:
            return LatencySlo(self.ttft, self.tpot)
        prompt, context = max(1.0, prompt_tokens), prompt_tokens + output_tokens / 2
        return LatencySlo(
            self.ttft,
            self.tpot,
            self.scale,
            costs.prefill_seconds(self.kind, prompt, prompt, tp=self.tp),
            costs.decode_seconds(self.kind, 1, context, tp=self.tp),
        )

    def alone(self, record: RequestRecord, costs: CostModel) -> float:
        """Seconds that the request takes with nothing beside it."""
        prompt, output = record.prompt_tokens, record.made_tokens
        prefill = costs.prefill_seconds(self.kind, prompt, prompt, tp=self.tp)
        context = prompt + output / 2
        return prefill + (output - 1) * costs.decode_seconds(self.kind, 1, context, tp=self.tp)


@dataclass
class _Counts:
    """Of one model, or of all."""

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
    ttft: Distribution = field(default_factory=Distribution)
    tpot: Distribution = field(default_factory=Distribution)
    latency: Distribution = field(default_factory=Distribution)

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
            for distribution, value in (
                (self.ttft, record.ttft),
                (self.tpot, record.tpot),
                (self.latency, record.latency),
            ):
                if value is not None:
                    distribution.add(value)

    def summary(self) -> dict[str, Any]:
        seconds = self.last_end

        def rate(amount: float) -> float:
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
            "tokens_per_s": rate(self.prompt_tokens + self.output_tokens),
            "output_tokens_per_s": rate(self.output_tokens),
            "slo_attainment": self.met / self.requests if self.requests else None,
            "request_goodput": rate(self.met),
            "ttft_s": self.ttft.summary(),
            "tpot_s": self.tpot.summary(),
            "latency_s": self.latency.summary(),
        }


class SimulationMetrics:
    """Collects the records of one run.

    Args:
      targets: of each model.
      costs: for targets that are multiples of a request's time alone.
    """

    def __init__(self, targets: Mapping[str, AttainmentTarget], costs: CostModel) -> None:
        self._targets = targets
        self._costs = costs
        self._all = _Counts()
        self._models = {name: _Counts() for name in targets}

    def add(self, record: RequestRecord) -> bool:
        """Takes in a record.

        Returns:
          Whether the request met its target.
        """
        met = self._targets[record.model].met(record, self._costs)
        self._all.add(record, met)
        self._models[record.model].add(record, met)
        return met

    @property
    def slo_attainment(self) -> float:
        """Part of the requests that met their targets; 1 of none."""
        return self._all.met / self._all.requests if self._all.requests else 1.0

    def summary(self) -> dict[str, Any]:
        """All keys of the module's table, for the whole run and under `models` for each model."""
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
