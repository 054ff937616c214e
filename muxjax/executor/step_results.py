"""Reads the results of steps from the devices."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from muxjax.executor.sampler import Logprobs
from muxjax.executor.step_functions import StepOutput
from muxjax.executor.step_packing import PackedStep
from muxjax.scheduling.steps import Decode, Prefill, Step, TokenLogprobs


@dataclass(frozen=True)
class JaxStepHandle:
    """A step that runs or has run.

    Attributes:
      step: as scheduled.
      packed: its inputs and where its outputs are.
      output: on the devices.
      submitted: time of submission, on `time.perf_counter`.
    """

    step: Step
    packed: PackedStep
    output: StepOutput
    submitted: float


def read_tokens(handle: JaxStepHandle, tokens: np.ndarray) -> list[list[int]]:
    """Returns the tokens of each chunk or sequence.

    Args:
      handle: the step.
      tokens: of its output, int32 `[k, S]`; -1 for sequences that were done, and for chunks that
        are not their request's last.
    """
    rounds = handle.step.num_tokens if isinstance(handle.step, Decode) else 1
    emitted = tokens[:rounds, handle.packed.rows]
    columns = emitted.T.tolist()
    if columns and emitted.min() < 0:  # a sequence that is done emits nothing more
        counts = (emitted >= 0).sum(axis=0).tolist()
        columns = [column[:count] for column, count in zip(columns, counts, strict=True)]
    return columns


def read_logprobs(
    handle: JaxStepHandle, tokens: list[list[int]]
) -> list[list[TokenLogprobs] | None]:
    """Returns the log-probabilities of each chunk's or sequence's tokens.

    The arrays are copied from the devices only if a request needs them.
    """
    packed = handle.packed
    logprobs: list[list[TokenLogprobs] | None] = [None] * len(tokens)
    if packed.logprobs.count(None) == len(tokens):
        return logprobs
    arrays = jax.tree.map(np.asarray, handle.output.logprobs)
    for index, (row, count) in enumerate(zip(packed.rows.tolist(), packed.logprobs, strict=True)):
        if count is not None:
            logprobs[index] = [
                _token_logprobs(arrays, number, row, count) for number in range(len(tokens[index]))
            ]
    return logprobs


def read_prompt_logprobs(handle: JaxStepHandle) -> list[list[TokenLogprobs]]:
    """Returns the log-probabilities of each chunk's `following` tokens; empty if there are none."""
    if not isinstance(handle.step, Prefill):
        return []
    chunks = handle.step.chunks
    if not any(chunk.following for chunk in chunks):
        return []
    arrays = jax.tree.map(lambda x: np.asarray(x)[None], handle.output.prompt)
    return [
        [
            _token_logprobs(arrays, 0, start + index, chunk.prompt_logprobs)
            for index in range(len(chunk.following))
        ]
        for start, chunk in zip(handle.packed.starts, chunks, strict=True)
    ]


def _token_logprobs(arrays: Logprobs, number: int, row: int, count: int) -> TokenLogprobs:
    """Returns the log-probabilities of a row's token in round `number`."""
    ids, values = arrays.top_ids[number, row, :count], arrays.top[number, row, :count]
    top = [
        (int(token), float(value))
        for token, value in zip(ids, values, strict=True)
        if np.isfinite(value)  # a vocabulary may be smaller than the list
    ]
    return TokenLogprobs(float(arrays.chosen[number, row]), top)
