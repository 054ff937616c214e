"""Measured steps as the profile file that `muxjax plan --profile` and `muxjax simulate` read.

For planning, each model has a table of whole prefills and of decodes (`placement.profile_table`),
worked out from its steps as the engine would make them: prompts are packed and cut into chunks, a
decode runs for a whole burst. The steps themselves stand under `_steps`, for simulations.
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
      times: of each model.
      limits: the largest steps of each.
      longest: the most tokens of a sequence, of each.
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
    ProfileTable(profile)  # what is written can be read
    return profile


def write_profile(profile: Mapping[str, Any], path: Path) -> None:
    """Writes the file, in place of one that is there.

    Raises:
      BenchError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(profile, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror or error}") from error


def _doubling(last: int, first: int = 1) -> list[int]:
    """From the first, doubling, to the last."""
    found = []
    while first < last:
        found.append(first)
        first *= 2
    return [*found, max(1, last)]


def _decode_seconds(steps: StepTimes, limits: BucketLimits, batch: int, length: int) -> float:
    rounds = limits.max_decode_tokens
    return max(1e-6, steps.decode_seconds(batch, rounds, length) / rounds)


def _prefill_seconds(steps: StepTimes, limits: BucketLimits, batch: int, length: int) -> float:
    """Seconds to prefill `batch` prompts in full steps; a prompt is split if a step is full."""
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
