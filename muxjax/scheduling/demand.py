"""What a model is expected to need of a unit, from its rate and lengths.

- KV: `rate x tokens per request x pages per token` (MuxServe, Duan et al., ICML 2024, section 3.3),
  in pages of KV made per second. Initial KV quotas are in proportion to it.
- Device time: seconds of prefill and of decode for each second of load, with programs that run one
  after the other. Time shares are in proportion to it.
"""

from __future__ import annotations

from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.specs import Demand, ModelSpec

BATCH_ROUNDS = 8
"""Rounds of the fixed point for the batch; few are needed, as steps grow slowly with the batch."""


def kv_demand(spec: ModelSpec) -> float:
    """Pages of KV that the model's load makes per second."""
    tokens = spec.load.rate * spec.load.request_tokens
    return tokens * spec.num_layers / spec.tokens_per_page / spec.replicas


def prefill_demand(spec: ModelSpec, estimates: StepEstimates) -> float:
    """Device seconds of prefill per second, prompts longer than a step taken in chunks."""
    load = spec.load
    chunk = max(1, min(round(load.prompt_tokens), spec.limits.max_prefill_tokens))
    return load.rate * load.prompt_tokens / chunk * estimates.prefill(spec.name, chunk)


def decode_batch(spec: ModelSpec, estimates: StepEstimates) -> float:
    """Sequences that decode together, if decodes had the device to themselves.

    By Little's law there are `rate x output tokens x seconds a token` of them, and the seconds
    depend on how many there are; at least 1 and at most the model's slots. The fewer, the more
    time a token costs, so that this errs towards more time for decode.
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
    """All of the above: what `Unit(demand=...)` takes."""
    return Demand(
        kv=kv_demand(spec),
        prefill_seconds=prefill_demand(spec, estimates),
        decode_seconds=decode_demand(spec, estimates),
    )
