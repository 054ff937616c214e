"""Expected demand of a unit's models for KV pages and device time, from their rates and lengths.

- KV: `rate x tokens per request x pages per token` (MuxServe, Duan et al., ICML 2024, section 3.3),
  in pages of KV written per second. Initial KV quotas are in proportion to it.
- Device time: seconds of prefill and of decode for each second of load, for programs that run one
  at a time. Time shares are in proportion to it.

The time for decodes depends on the batch: a step costs nearly the same for one sequence as for
many. So the models are considered together. The batch of a model is the number of its tokens that
are due between two of its decode steps (a cycle). The cycle is chosen so that prefills and decodes
of all models fit the device, with half of the spare time that the longest cycle would leave. Shares
from shorter cycles would give decodes time that prefills need, and prompts would queue although the
device could serve them.

"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.specs import Demand, ModelSpec

type DemandFunction = Callable[[Sequence[ModelSpec], StepEstimates], Mapping[str, Demand]]
"""Demand of each model of a unit, by name, for the current estimates of step times."""

SPARE_PART = 0.5
"""Part of the spare time that is a margin for bursts of prompts."""
_BISECTIONS = 20
"""Bisections of the cycle: the result is within a millionth of the longest cycle."""


def equal_demand(specs: Sequence[ModelSpec], estimates: StepEstimates) -> dict[str, Demand]:
    """Returns the same demand for every model, whatever its rate and lengths."""
    del estimates
    return {spec.name: Demand(1.0, 1.0, 1.0) for spec in specs}


def expected_demand(specs: Sequence[ModelSpec], estimates: StepEstimates) -> dict[str, Demand]:
    """Expected demand of the models of a unit: the `demand` argument of `Scheduler`."""
    cycle = decode_cycle(specs, estimates)
    return {
        spec.name: Demand(
            kv=kv_demand(spec),
            prefill_seconds=prefill_demand(spec, estimates),
            decode_seconds=decode_demand(spec, estimates, cycle),
        )
        for spec in specs
    }


def kv_demand(spec: ModelSpec) -> float:
    """Pages of KV that the model's load writes per second."""
    tokens = spec.load.rate * spec.load.request_tokens
    return tokens * spec.num_layers / spec.tokens_per_page / spec.replicas


def prefill_demand(spec: ModelSpec, estimates: StepEstimates) -> float:
    """Device seconds of prefill per second; prompts longer than a step are split into chunks."""
    load = spec.load
    chunk = max(1, min(round(load.prompt_tokens), spec.limits.max_prefill_tokens))
    return load.rate * load.prompt_tokens / chunk * estimates.prefill(spec.name, chunk)


def decode_cycle(specs: Sequence[ModelSpec], estimates: StepEstimates) -> float:
    """Time in seconds between decode steps of a model that the time shares are computed for.

    The longest cycle, at which the slots limit all batches, if the device cannot serve the load.
    """
    prefill = sum([prefill_demand(spec, estimates) for spec in specs])
    rates = [(spec.limits.max_seqs, spec.load.rate * spec.load.output_tokens) for spec in specs]
    high = max([slots / tokens for slots, tokens in rates if tokens > 0], default=0.0)
    low = 0.0

    def total(cycle: float) -> float:
        return prefill + sum([decode_demand(spec, estimates, cycle) for spec in specs])

    least = total(high)
    if least > 1.0:
        return high
    target = 1.0 - SPARE_PART * (1.0 - least)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if total(middle) > target:
            low = middle
        else:
            high = middle
    return high


def decode_batch(spec: ModelSpec, cycle: float) -> float:
    """Mean decode batch of a model: its tokens that are due in `cycle` seconds (Little's law).

    At least 1 and at most the model's slots.
    """
    tokens_per_second = spec.load.rate * spec.load.output_tokens
    return min(max(1.0, tokens_per_second * cycle), float(spec.limits.max_seqs))


def decode_demand(spec: ModelSpec, estimates: StepEstimates, cycle: float) -> float:
    """Device seconds of decode per second, with the batches of a cycle of `cycle` seconds."""
    batch = decode_batch(spec, cycle)
    seconds = estimates.decode(spec.name, max(1, round(batch)))
    return spec.load.rate * spec.load.output_tokens * seconds / batch
