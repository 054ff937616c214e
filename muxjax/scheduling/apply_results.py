"""Applies the results of steps to their requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from muxjax.errors import InvalidRequest
from muxjax.scheduling.constraint import Constraint
from muxjax.scheduling.requests import FinishReason, Request, RequestState, RequestUpdate
from muxjax.scheduling.steps import Prefill, StepResult, TokenLogprobs


def apply_tokens(
    requests: Sequence[Request], result: StepResult, now: float
) -> tuple[list[RequestUpdate], int]:
    """Adds a step's tokens to its requests; tokens of requests that have ended are dropped.

    Args:
      requests: the requests in the step, in its order.
      result: the step's result.
      now: time in seconds at which the tokens count as emitted.

    Returns:
      One update for each request that got tokens, and the number of tokens. An update has the
      finish reason if the request ends with it; the caller has to end the request.

    Raises:
      ValueError: tokens after a request's end, which no executor may return.
    """
    updates: list[RequestUpdate] = []
    finished, num_tokens = RequestState.FINISHED, 0
    new = tuple.__new__  # faster than `RequestUpdate(...)`; called hundreds of times a step
    for request, tokens, logprobs in zip(requests, result.tokens, result.logprobs, strict=True):
        if not tokens or request.state is finished:
            continue
        output, count = request.output, len(tokens)
        num_tokens += count
        if (
            output
            and request.constraint is None
            and len(output) + count < request.max_new_tokens
            and request.stop_set.isdisjoint(tokens)
        ):
            output += tokens
            update = new(RequestUpdate, (request, tokens, logprobs, None))
        else:
            update = _apply_checked(request, tokens, logprobs, now)
        updates.append(update)
    return updates, num_tokens


def apply_prompt_logprobs(
    requests: Mapping[int, Request], step: Prefill, result: StepResult
) -> None:
    """Adds the log-probabilities of prompt tokens to the requests that have not ended.

    Args:
      requests: the requests that have not ended, by id.
      step: a prefill.
      result: its result.
    """
    for chunk, logprobs in zip(step.chunks, result.prompt_logprobs, strict=True):
        request = requests.get(chunk.request_id)
        if request is not None and chunk.following:
            # A request that was preempted during its prefill starts again from position 0.
            request.prompt_logprobs[chunk.start :] = logprobs


def _apply_checked(
    request: Request, tokens: list[int], logprobs: list[TokenLogprobs] | None, now: float
) -> RequestUpdate:
    """Adds tokens that are a request's first, that may end it, or that must follow a grammar."""
    if request.first_token_at is None:
        request.first_token_at = now
    reason: FinishReason | None = None
    left = request.max_new_tokens - len(request.output)
    for count, token in enumerate(tokens, start=1):
        if token in request.stop_set:
            reason = "stop"
        elif count == left:
            reason = "length"
        else:
            continue
        if count < len(tokens):
            extra = len(tokens) - count
            raise ValueError(f"request {request.id} got {extra} tokens after its end")
    if request.constraint is not None and reason != "stop":
        reason = _advance(request.constraint, request, tokens[-1]) or reason
    request.output += tokens
    return RequestUpdate(request, tokens, logprobs, reason)


def _advance(constraint: Constraint, request: Request, token: int) -> FinishReason | None:
    """Advances a constraint; returns the finish reason if the request ends."""
    try:
        return "stop" if constraint.advance(token) else None
    except InvalidRequest as error:
        request.error = error
        return "error"
