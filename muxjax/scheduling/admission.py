"""Admission control: checks of a request before it is queued."""

from __future__ import annotations

from muxjax.errors import InvalidRequest, Overloaded
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.requests import Request


def check_length(request: Request, max_model_len: int) -> None:
    """Checks that a prompt is not empty and leaves room for an output token.

    Raises:
      InvalidRequest: it is empty or too long.
    """
    length = len(request.prompt)
    if length == 0:
        raise InvalidRequest("the prompt is empty", field="prompt")
    if length >= max_model_len:
        raise InvalidRequest(
            f"the prompt has {length} tokens; {request.model} accepts at most "
            f"{max_model_len - 1}, which leaves one for the output",
            field="prompt",
        )


def refuse_if_late(estimates: StepEstimates, state: ModelState, request: Request) -> None:
    """Refuses a request that cannot meet its model's SLO even under good conditions.

    The estimated wait is a lower bound, since a wrong refusal costs more than a late request. All
    earlier prompts of the model are prefilled first. If they wait for slots, each running sequence
    that ends frees one. Other models are ignored.

    Args:
      estimates: expected durations of steps.
      state: the request's model.
      request: the request, with `max_new_tokens` set; not queued yet.

    Raises:
      Overloaded: the request would be late. `retry_after` is set.
    """
    spec, name = state.spec, state.spec.name
    targets = spec.targets
    prefill = estimates.prefill(name, len(request.prompt))
    batch = max(1, len(state.running))
    step = estimates.decode(name, batch)
    num_ahead = len(state.waiting) + len(state.prefilling)
    mean_output = max(1.0, spec.load.output_tokens)
    wait = num_ahead * estimates.prefill(name, max(1, round(spec.load.prompt_tokens)))
    if state.running and num_ahead:
        needs_slot = num_ahead - len(state.free_slots)
        wait = max(wait, needs_slot * mean_output * step / batch)
    if targets.ttft is not None:
        expected, allowed, token = wait + prefill, targets.ttft, "its first token"
    else:
        output = min(float(request.max_new_tokens), mean_output)
        isolated_ttft = targets.isolated_ttft or prefill
        isolated_tpot = targets.isolated_tpot or estimates.decode(name, 1)
        tpot = targets.tpot or targets.scale * isolated_tpot
        allowed = targets.scale * isolated_ttft + (output - 1) * tpot
        expected, token = wait + prefill + (output - 1) * step, "its last token"
    if expected > allowed:
        raise Overloaded(
            f"{name} has {num_ahead} requests before this one: {token} is expected after "
            f"{expected:.3g} s, and its target is {allowed:.3g} s; try again later",
            retry_after=max(0.1, expected - allowed),
        )
