"""The results of a fleet: deltas and completions of requests, and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from muxjax.models.tokenizers.tool_call_parser import FunctionCall
from muxjax.scheduling.requests import FinishReason
from muxjax.scheduling.steps import TokenLogprobs

__all__ = [
    "Completion",
    "Delta",
    "FinishReason",
    "FleetStats",
    "FunctionCall",
    "ModelStats",
    "ProgramStats",
    "TokenLogprobs",
    "UnitStats",
]


@dataclass(frozen=True, slots=True)
class Delta:
    """The output of a request since its previous delta.

    Attributes:
      text: may lag behind the tokens: incomplete characters, and text that may begin a stop string,
        are withheld.
      token_ids: new tokens; a stop token that ended the request is the last, and has no text.
      logprobs: one entry for each of `token_ids`, or None if not requested.
      finish_reason: 'stop', 'length', 'cancelled' or 'abort' in the last delta, None before.
      prompt_logprobs: in the first delta, if requested: of the prompt's tokens from the second on.
      stop_reason: in the last delta; see `Completion.stop_reason`.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    prompt_logprobs: list[TokenLogprobs] | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Completion:
    """The output of a model for one prompt.

    Attributes:
      text: without stop tokens, stop strings and tool calls; empty for a model without a tokenizer.
      token_ids: all generated tokens, a stop token that ended the output included.
      finish_reason: 'stop' (a stop token, a stop string or a complete grammar), 'length',
        'cancelled' or 'abort'.
      logprobs: one entry for each of `token_ids`, or None if not requested.
      prompt_token_ids: tokens of the prompt, after the chat template.
      stop_reason: the stop string, or the id of `SamplingParams.stop_token_ids`, that ended the
        output. None otherwise, also for the model's end token (as in vLLM).
      prompt_logprobs: one entry for each token of the prompt from the second on, or None.
      tool_calls: calls of the tools that were given to `Fleet.chat`.
      num_cached_tokens: number of prompt tokens found in the prefix cache.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None
    prompt_token_ids: list[int]
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    tool_calls: list[FunctionCall] = field(default_factory=list)
    num_cached_tokens: int = field(default=0, compare=False)

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @staticmethod
    def from_deltas(
        deltas: Sequence[Delta], prompt_token_ids: Sequence[int], num_cached_tokens: int
    ) -> Completion:
        """Joins all deltas of a request that has ended."""
        logprobs: list[TokenLogprobs] | None = None
        for delta in deltas:
            if delta.logprobs is not None:
                logprobs = (logprobs or []) + delta.logprobs
        last = deltas[-1]
        assert last.finish_reason is not None, "the last delta has the finish reason"
        return Completion(
            text="".join(delta.text for delta in deltas),
            token_ids=[token for delta in deltas for token in delta.token_ids],
            finish_reason=last.finish_reason,
            logprobs=logprobs,
            prompt_token_ids=list(prompt_token_ids),
            stop_reason=last.stop_reason,
            prompt_logprobs=deltas[0].prompt_logprobs,
            num_cached_tokens=num_cached_tokens,
        )


class ModelStats(TypedDict, total=False):
    """Counters and gauges of one model, in tokens, pages and seconds; see `scheduling.stats`.

    For a model with replicas: sums, without values that cannot be added, and `units`.
    """

    waiting: int
    running: int
    finished: int
    preemptions: int
    prompt_tokens: int
    output_tokens: int
    prefix_queries: int
    prefix_hits: int
    kv_pages_used: int
    kv_pages_cached: int
    kv_pages_leased: int
    kv_pages_quota: int
    kv_pages_floor: int
    kv_pages_borrowed: int
    kv_pages_given_back: int
    kv_pages_taken_back: int
    kv_quota_use: float
    kv_normalized_use: float | None
    prefill_seconds: float
    decode_seconds: float
    prefill_share: float
    decode_share: float
    units: list[str]


class ProgramStats(TypedDict):
    """One compiled program: its model, kind and size, its compile time and its memory."""

    model: str
    kind: str
    size: int
    compile_seconds: float
    temp_bytes: int
    argument_bytes: int


class UnitStats(TypedDict, total=False):
    """Counters and gauges of one unit.

    The keys from `steps` on are missing with `block=False`, and if the engine does not run. Only
    a unit in another process has `node` and `pid`.
    """

    policy: str
    requests: int
    pool_pages: int
    usable_pages: int
    free_pages: int
    cached_pages: int
    slab_pages: int
    slab_waste: float
    quota_moves: list[dict[str, Any]]
    kv_reclaims: list[dict[str, Any]]
    kv_fairness: float
    models: dict[str, ModelStats]
    steps: dict[str, int]
    pool_address: int | None
    devices: list[int]
    pool_bytes: int
    page_rows: int
    restarts: int
    programs: list[ProgramStats]
    node: str
    pid: int


class FleetStats(UnitStats, total=False):
    """Counters and gauges of a fleet: those of its only unit, or sums over several units.

    Attributes:
      units: the statistics of each unit by name, if there are several.
    """

    units: dict[str, UnitStats]
