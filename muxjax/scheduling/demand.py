"""Expected demand of a model for KV pages and device time, from its rate and lengths.

- KV: `rate x tokens per request x pages per token` (MuxServe, Duan et al., ICML 2024, section 3.3),
  in pages of KV written per second. Initial KV quotas are in proportion to it.
- Device time: seconds of prefill and of decode for each second of load, for programs that run one
  at a time. Time shares are in proportion to it.
"""

from __future__ import annotations

from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.specs import Demand, ModelSpec

BATCH_ROUNDS = 8
"""Rounds of the fixed-point iteration for the batch; the step time grows slowly with the batch."""


def kv_demand(spec: ModelSpec) -> float:
    """Pages of KV that the model's load writes per second."""
    tokens = spec.load.rate * spec.load.request_tokens
    return tokens * spec.num_layers / spec.tokens_per_page / spec.replicas


def prefill_demand(spec: ModelSpec, estimates: StepEstimates) -> float:
    """Device seconds of prefill per second; prompts longer than a step are split into chunks."""
    load = spec.load
    chunk = max(1, min(round(load.prompt_tokens), spec.limits.max_prefill_tokens))
    return load.rate * load.prompt_tokens / chunk * estimates.prefill(spec.name, chunk)


def decode_batch(spec: ModelSpec, estimates: StepEstimates) -> float:
    """Mean decode batch of the model without other load on the device.

    By Little's law the batch is `rate x output tokens x seconds per token`. The seconds depend on
    the batch. The result is at least 1 and at most the model's slots. Other models make the batch
    larger and a token cheaper, so this overestimates the time for decodes.
    """
    batch = 1.0
    for _ in range(BATCH_ROUNDS):
        seconds = estimates.decode(spec.name, max(1, round(batch)))
        batch = spec.load.rate * spec.load.output_tokens * seconds
        batch = min(max(1.0, batch), float(spec.limits.max_seqs))
    return batch


def decode_demand(spec: ModelSpec, estimates: StepEstimates) -> float:
    """Device seconds of decode per second."""
    batch = decode_batch(spec, estimates)
    seconds = estimates.decode(spec.name, max(1, round(batch)))
    return spec.load.rate * spec.load.output_tokens * seconds / batch


def expected_demand(spec: ModelSpec, estimates: StepEstimates) -> Demand:
    """Expected demand of a model: the `demand` argument of `Scheduler`."""
    return Demand(
        kv=kv_demand(spec),
        prefill_seconds=prefill_demand(spec, estimates),
        decode_seconds=decode_demand(spec, estimates),
    )
