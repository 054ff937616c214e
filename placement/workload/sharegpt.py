"""Reads the prompt and output lengths of ShareGPT's conversations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from muxjax.errors import WorkloadError
from muxjax.placement.workload.file_fields import read_json

SHAREGPT_LIMITS = (4, 1024, 2048)
"""Limits in tokens, as in the benchmarks of MuxServe and vLLM: minimum of prompt and output,
maximum of the prompt, maximum of their sum."""


def approximate_tokens(text: str) -> int:
    """Estimates the number of tokens of a text: four bytes per token, as in English."""
    return -(-len(text.encode()) // 4)


def sharegpt_lengths(
    path: Path, count_tokens: Callable[[str], int] = approximate_tokens
) -> list[tuple[int, int]]:
    """Reads the lengths of the first prompt and answer of each conversation.

    Conversations outside of `SHAREGPT_LIMITS` are dropped.

    Args:
      path: a JSON file, a list of `{"conversations": [{"from": ..., "value": text}, ...]}`.
      count_tokens: returns the number of tokens of a text.

    Raises:
      WorkloadError: the file has another format, or no conversation is within the limits.
    """
    data = read_json(path)
    if not isinstance(data, list):
        raise WorkloadError(f"{path}: a ShareGPT file must be a list of conversations")
    minimum, max_prompt, max_total = SHAREGPT_LIMITS
    pairs: list[tuple[int, int]] = []
    for index, entry in enumerate(data):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise WorkloadError(f"{path}: [{index}] has no list of conversations")
        if len(turns) < 2:
            continue
        try:
            prompt, output = (count_tokens(turn["value"]) for turn in turns[:2])
        except (KeyError, TypeError, AttributeError) as error:
            raise WorkloadError(f"{path}: [{index}] has a turn without a text value") from error
        if min(prompt, output) < minimum or prompt > max_prompt:
            continue
        if prompt + output <= max_total:
            pairs.append((prompt, output))
    if not pairs:
        raise WorkloadError(f"{path}: no conversation of {minimum} to {max_total} tokens")
    return pairs
