"""How many tokens the next prefill step takes, where others decode.

Two sizes are compiled, the largest and a quarter of it. A prefill that takes the whole of the
larger keeps all decodes waiting for its whole time; cut into quarters, other steps go between them.
Each quarter pays anew what a step costs whatever its size, reading the weights above all, so that
cutting is for when the time is not there: when tokens of others are due before (`slo`), or when
prefills have had what their share of the time gives them (`adbs`).
"""

from __future__ import annotations

from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.specs import ModelSpec

MOST_COST = 1.5
"""How much longer all parts may take than one step of the largest size. Where it is more, a step's
cost is mostly not that of its tokens, so that a part would not be much shorter either."""


def prefill_chunk_tokens(spec: ModelSpec, estimates: StepEstimates, seconds: float) -> int:
    """The most tokens of the model's next prefill step.

    Args:
      spec: the model.
      estimates: how long steps take.
      seconds: that the step may last; infinite where nobody decodes.
    """
    name, most, least = spec.name, spec.limits.max_prefill_tokens, spec.limits.part_prefill_tokens
    whole = estimates.prefill(name, most)
    if whole <= seconds or most / least * estimates.prefill(name, least) > MOST_COST * whole:
        return most
    return least
