"""Chunk size of prefills that run beside decodes.

Prefills are compiled for two sizes: the largest and a quarter of it. A prefill of the largest size
delays all decodes for its whole duration; between chunks other steps can run. But each chunk pays
the fixed cost of a step again, mainly reading the weights. Prompts are therefore chunked only if
time is short: if tokens of other models are due earlier (`slo`), or if prefills have used up their
share of the time (`adbs`).
"""

from __future__ import annotations

from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.specs import ModelSpec

MAX_CHUNKED_COST = 1.5
"""Maximum duration of all chunks, relative to one step of the largest size. Above it the fixed cost
of a step dominates, so a chunk would not be much shorter; see docs/measurements/slo-tuning.md."""


def prefill_chunk_tokens(spec: ModelSpec, estimates: StepEstimates, seconds: float) -> int:
    """Maximum number of tokens of the model's next prefill step.

    Args:
      spec: the model.
      estimates: expected durations of steps.
      seconds: maximum duration of the step; infinite without decodes.
    """
    name = spec.name
    largest, chunk = spec.limits.max_prefill_tokens, spec.limits.part_prefill_tokens
    unchunked = estimates.prefill(name, largest)
    if unchunked <= seconds:
        return largest
    if largest / chunk * estimates.prefill(name, chunk) > MAX_CHUNKED_COST * unchunked:
        return largest
    return chunk
