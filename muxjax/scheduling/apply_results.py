"""What a step's tokens mean for the requests in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from muxjax.errors import InvalidRequest
from muxjax.scheduling.constraint import Constraint
from muxjax.scheduling.requests import FinishReason, Request, RequestState, RequestUpdate
from muxjax.scheduling.steps import Prefill, StepResult, TokenLogprobs


def apply_tokens(
    requests: Sequence[Request], result: StepResult, now: float
) -> tuple[list[RequestUpdate], int]:
    """Gives each request its tokens; those of requests that have ended are dropped.

    Args:
      requests: who was in the step, in its order.
      result: what it gave.
      now: seconds; when the tokens count as emitted.

    Returns:
      One update for each request that got tokens, with the reason where it ends with them, which is
      for the caller to do; and how many tokens there were.
    """
    updates: list[RequestUpdate] = []
    finished, made = RequestState.FINISHED, 0
    new = tuple.__new__  # half the time of `RequestUpdate(...)`, of which there are hundreds
    for request, tokens, logprobs in zip(requests, result.tokens, result.logprobs, strict=True):
        if not tokens or request.state is finished:
            continue
        output, count = request.output, len(tokens)
        made += count
        if (
            output
            and request.constraint is None
            and len(output) + count < request.max_new_tokens
            and request.stop_set.isdisjoint(tokens)
        ):
            output += tokens
            update = new(RequestUpdate, (request, tokens, logprobs, None))
        else:
            update = _take_first_or_last(request, tokens, logprobs, now)
        updates.append(update)
    return updates, made


def apply_prompt_logprobs(
    requests: Mapping[int, Request], step: Prefill, result: StepResult
) -> None:
    """Gives requests that have not ended the log probabilities of their prompts' tokens.

    Args:
      requests: those that have not ended, by id.
      step: a prefill.
      result: what it gave.
    """
    for chunk, found in zip(step.chunks, result.prompt_logprobs, strict=True):
        request = requests.get(chunk.request_id)
        if request is not None and chunk.following:
            # A request that was preempted on the way begins anew.
            request.prompt_logprobs[chunk.start :] = found


def _take_first_or_last(
    request: Request, tokens: list[int], logprobs: list[TokenLogprobs] | None, now: float
) -> RequestUpdate:
    """Takes tokens in that are a request's first, may end it, or must follow a grammar."""
    if request.first_token_at is None:
        request.first_token_at = now
    reason: FinishReason | None = None
    room = request.max_new_tokens - len(request.output)
    for index, token in enumerate(tokens, start=1):
        if token in request.stop_set:
            reason = "stop"
        elif index == room:
            reason = "length"
        else:
            continue
        if index < len(tokens):
            after = len(tokens) - index
            raise ValueError(f"request {request.id} got {after} tokens after its end")
    if request.constraint is not None and reason != "stop":
        reason = _follow(request.constraint, request, tokens[-1]) or reason
    request.output += tokens
    return RequestUpdate(request, tokens, logprobs, reason)


def _follow(constraint: Constraint, request: Request, token: int) -> FinishReason | None:
    """Advances a constraint; how the request ends, if it does."""
    try:
        return "stop" if constraint.advance(token) else None
    except InvalidRequest as error:
        request.error = error
        return "error"
