"""Refusing a request at once that could not be served within its model's targets.

What it would wait is worked out from what is there: the prompts before it have to be prefilled, and
where requests wait for slots or pages, one comes in whenever one of those that run has ended. Who
refuses too much is worse than who refuses too little, so only what counts for sure is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from muxjax.errors import Overloaded
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.requests import Request

if TYPE_CHECKING:
    from muxjax.scheduling.scheduler import Scheduler


def refuse_if_late(unit: Scheduler, state: ModelState, request: Request) -> None:
    """Raises Overloaded for a request that could not meet its target even if all went well."""
    estimates, name = unit.estimates, state.spec.name
    targets = state.spec.targets
    tokens = len(request.prompt)
    prefill = estimates.prefill(name, tokens)
    size = max(1, len(state.running))
    step = estimates.decode(name, size)
    ahead = len(state.waiting) + len(state.prefilling)
    output = max(1.0, state.spec.load.output_tokens)
    # All that wait are prefilled first, several in a step ...
    wait = ahead * estimates.prefill(name, max(1, round(state.spec.load.prompt_tokens)))
    if state.running and ahead:
        # ... and no sooner than those that run make room, one after the other.
        room = len(state.free_slots)
        wait = max(wait, (ahead - room) * output * step / size)
    made = min(float(request.max_new_tokens), output)
    alone = targets.isolated_ttft or prefill
    alone_step = targets.isolated_tpot or estimates.decode(name, 1)
    if targets.ttft is not None:
        expected, allowed, what = wait + prefill, targets.ttft, "its first token"
    else:
        tpot = targets.tpot or targets.scale * alone_step
        allowed = targets.scale * alone + (made - 1) * tpot
        expected, what = wait + prefill + (made - 1) * step, "its whole answer"
    if expected > allowed:
        raise Overloaded(
            f"{name} has {ahead} requests before this one: {what} is expected after "
            f"{expected:.3g} s, and its target is {allowed:.3g} s; try again later",
            retry_after=max(0.1, expected - allowed),
        )
