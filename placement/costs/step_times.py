"""Measured times of the engine's compiled steps, by bucket, chunk and context.

A compiled prefill takes the time of its token bucket, padding included. Each chunk of a prompt adds
attention over its context. Sampling after the last chunk of a prompt adds the output head:

    prefill = base[bucket] + sum over chunks of chunk[bucket](context) + sample, if any is last

A compiled decode takes the time of its sequence bucket, and its attention covers the longest
context of the batch:

    decode = base[bucket] + rounds x token[bucket](longest context)

`muxjax bench steps` measures the times under load, while the engine alternates between the steps of
all models. It writes them into a profile under `_steps`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from muxjax.errors import ProfileError

Curve = tuple[tuple[float, float], ...]
"""Points (context in tokens, seconds), ascending, at least one."""
_MIN_SECONDS = 1e-6
"""Minimum duration of a step."""


@dataclass(frozen=True)
class PrefillTimes:
    """Times of one token bucket, in seconds.

    Attributes:
      base: a step, without its chunks.
      chunk: one chunk, by the context at its end.
      sample: sampling after the last chunks of any number of prompts.
    """

    base: float
    chunk: Curve
    sample: float

    def scaled(self, factor: float) -> PrefillTimes:
        """All times multiplied by a factor."""
        return PrefillTimes(factor * self.base, _scaled(self.chunk, factor), factor * self.sample)


@dataclass(frozen=True)
class DecodeTimes:
    """Times of one sequence bucket, in seconds.

    Attributes:
      base: a step, for any number of rounds.
      token: one round (a token for every sequence), by the longest context.
    """

    base: float
    token: Curve

    def scaled(self, factor: float) -> DecodeTimes:
        """All times multiplied by a factor."""
        return DecodeTimes(factor * self.base, _scaled(self.token, factor))


@dataclass(frozen=True)
class StepTimes:
    """Step times of one model.

    Attributes:
      prefill: by token bucket, ascending.
      decode: by sequence bucket, ascending.
    """

    prefill: Mapping[int, PrefillTimes]
    decode: Mapping[int, DecodeTimes]

    def prefill_seconds(self, chunks: Sequence[tuple[int, int, bool]]) -> float:
        """Seconds of a prefill step.

        Args:
          chunks: for each chunk its tokens, the context at its end, and whether it is the last
            chunk of its prompt.
        """
        total = sum(tokens for tokens, _, _ in chunks)
        times = self.prefill[find_bucket(self.prefill, total)]
        seconds = times.base + sum(interpolate(times.chunk, end) for _, end, _ in chunks)
        if any(last for _, _, last in chunks):
            seconds += times.sample
        return max(_MIN_SECONDS, seconds)

    def decode_seconds(self, sequences: int, rounds: int, context: float) -> float:
        """Seconds of a decode step.

        Args:
          sequences: number of sequences.
          rounds: maximum number of tokens generated for a sequence.
          context: the longest context in tokens, averaged over the rounds.
        """
        times = self.decode[find_bucket(self.decode, sequences)]
        return max(_MIN_SECONDS, times.base + rounds * interpolate(times.token, context))

    def scaled(self, factor: float) -> StepTimes:
        """All times multiplied by a factor."""
        return StepTimes(
            {size: times.scaled(factor) for size, times in self.prefill.items()},
            {size: times.scaled(factor) for size, times in self.decode.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Converts to the entry of a profile, in milliseconds."""

        def curve(points: Curve) -> list[list[float]]:
            return [[context, 1e3 * seconds] for context, seconds in points]

        return {
            "prefill": {
                str(size): {
                    "base_ms": 1e3 * times.base,
                    "chunk_ms": curve(times.chunk),
                    "sample_ms": 1e3 * times.sample,
                }
                for size, times in self.prefill.items()
            },
            "decode": {
                str(size): {
                    "base_ms": 1e3 * times.base,
                    "token_ms": curve(times.token),
                }
                for size, times in self.decode.items()
            },
        }

    @classmethod
    def from_json(cls, data: Any, where: str) -> StepTimes:
        """Parses the output of `to_json`.

        Args:
          data: the entry of a profile.
          where: name of the model, for error messages.

        Raises:
          ProfileError: the entry has another format.
        """

        def curve(points: Any) -> Curve:
            parsed = tuple((float(context), float(ms) / 1e3) for context, ms in points)
            if not parsed or list(parsed) != sorted(parsed):
                raise ValueError("contexts must ascend")
            return parsed

        try:
            if unknown := set(data) - {"prefill", "decode"}:
                raise ValueError(f"unknown keys {', '.join(sorted(unknown))}")
            prefill = {
                int(size): PrefillTimes(
                    float(times["base_ms"]) / 1e3,
                    curve(times["chunk_ms"]),
                    float(times["sample_ms"]) / 1e3,
                )
                for size, times in data["prefill"].items()
            }
            decode = {
                int(size): DecodeTimes(float(times["base_ms"]) / 1e3, curve(times["token_ms"]))
                for size, times in data["decode"].items()
            }
            if not prefill or not decode:
                raise ValueError("prefill and decode must not be empty")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProfileError(
                f"profile of {where}: the step times are not in the format of `muxjax bench steps` "
                f"({type(error).__name__}: {error}); measure them again"
            ) from error
        return cls(dict(sorted(prefill.items())), dict(sorted(decode.items())))


def _scaled(curve: Curve, factor: float) -> Curve:
    return tuple((context, factor * seconds) for context, seconds in curve)


def interpolate(curve: Curve, context: float) -> float:
    """Seconds at any context, linear between points.

    Below the first point the time is constant. Beyond the last point it continues along the last
    two points, but never falls.
    """
    if context <= curve[0][0] or len(curve) == 1:
        return curve[0][1]
    index = min(bisect_left(curve, (context, 0.0)), len(curve) - 1)
    (left, low), (right, high) = curve[index - 1], curve[index]
    slope = (high - low) / (right - left)
    if context > right:
        return high + max(0.0, slope) * (context - right)
    return low + slope * (context - left)


def find_bucket(buckets: Mapping[int, Any], size: int) -> int:
    """Finds the smallest bucket of at least `size`; the buckets ascend.

    Raises:
      ValueError: the largest bucket is too small.
    """
    for bucket in buckets:
        if size <= bucket:
            return bucket
    raise ValueError(f"{size} is larger than the largest measured bucket, {list(buckets)[-1]}")
