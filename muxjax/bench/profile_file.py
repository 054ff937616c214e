"""Measured steps as the profile file that `muxjax plan --profile` and `muxjax simulate` read.

For planning, each model has a table of prefill and decode times (`placement.costs.profile_table`).
It is computed from steps as the engine builds them: prompts are packed and split into chunks, and a
decode runs for a full burst. For simulations, the step times are stored under `_steps`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from muxjax.errors import BenchError
from muxjax.placement.costs.profile_table import STEPS, ProfileTable
from muxjax.placement.costs.step_times import StepTimes
from muxjax.scheduling.specs import BucketLimits


def build_profile(
    times: Mapping[str, StepTimes], limits: Mapping[str, BucketLimits], longest: Mapping[str, int]
) -> dict[str, Any]:
    """The contents of a profile.

    Args:
      times: step times of each model.
      limits: largest steps of each model.
      longest: maximum tokens of a sequence of each model.
    """
    profile: dict[str, Any] = {}
    for name, steps in times.items():
        batches = _doubling(limits[name].max_seqs)
        lengths = _doubling(longest[name] - 1, first=16)
        cells = {
            str(batch): {
                str(length): {
                    "prefill": 1e3 * _prefill_seconds(steps, limits[name], batch, length),
                    "decoding": 1e3 * _decode_seconds(steps, limits[name], batch, length),
                }
                for length in lengths
            }
            for batch in batches
        }
        profile[name] = {"1": {"100": cells}}
    profile[STEPS] = {name: steps.to_json() for name, steps in times.items()}
    ProfileTable(profile)  # raises if the profile is invalid
    return profile


def write_profile(profile: Mapping[str, Any], path: Path) -> None:
    """Writes the file; replaces an existing one.

    Raises:
      BenchError: the file cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(profile, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror or error}") from error


def _doubling(last: int, first: int = 1) -> list[int]:
    """`first` and its doublings below `last`, then `last`."""
    values = []
    while first < last:
        values.append(first)
        first *= 2
    return [*values, max(1, last)]


def _decode_seconds(steps: StepTimes, limits: BucketLimits, batch: int, length: int) -> float:
    rounds = limits.max_decode_tokens
    return max(1e-6, steps.decode_seconds(batch, rounds, length) / rounds)


def _prefill_seconds(steps: StepTimes, limits: BucketLimits, batch: int, length: int) -> float:
    """Seconds to prefill `batch` prompts; a prompt that exceeds a step is split into chunks."""
    seconds = 0.0
    chunks: list[tuple[int, int, bool]] = []
    room = limits.max_prefill_tokens

    def flush(chunks: Sequence[tuple[int, int, bool]]) -> float:
        return steps.prefill_seconds(chunks) if chunks else 0.0

    for _ in range(batch):
        end = 0
        while end < length:
            if not room or len(chunks) == limits.max_prefill_seqs:
                seconds += flush(chunks)
                chunks, room = [], limits.max_prefill_tokens
            tokens = min(room, length - end)
            end += tokens
            room -= tokens
            chunks.append((tokens, end, end == length))
    return max(1e-6, seconds + flush(chunks))
