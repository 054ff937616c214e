"""How long the engine's compiled steps take, as measured: with buckets, chunks and contexts.

A compiled prefill costs what its bucket of tokens costs, padding included; each chunk of a prompt
adds attention over its context, and sampling after a prompt's last chunk adds the output head:

    prefill = tokens[bucket] + sum over chunks of attention[bucket](context) + sample if any is last

A compiled decode costs what its bucket of sequences costs, and its attention walks the longest
context of all:

    decode = step[bucket] + rounds x token[bucket](longest context)

These are times in service, where steps of all models alternate. `muxjax bench steps` measures all
of this on the engine itself; a profile keeps it under `_steps`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from muxjax.errors import ProfileError

Curve = tuple[tuple[float, float], ...]
"""Points (context in tokens, seconds), ascending, one at least."""
_LEAST = 1e-6
"""Seconds of any step."""


@dataclass(frozen=True)
class PrefillTimes:
    """Of one bucket of tokens, in seconds.

    Attributes:
      base: the bucket without any chunk.
      chunk: one chunk, by the context at its end.
      sample: sampling after last chunks, however many there are.
    """

    base: float
    chunk: Curve
    sample: float

    def slower(self, factor: float) -> PrefillTimes:
        """All of it so many times as long."""
        return PrefillTimes(factor * self.base, _scaled(self.chunk, factor), factor * self.sample)


@dataclass(frozen=True)
class DecodeTimes:
    """Of one bucket of sequences, in seconds.

    Attributes:
      base: a step, however many tokens it makes for each sequence.
      token: one token for every sequence, by the longest context.
    """

    base: float
    token: Curve

    def slower(self, factor: float) -> DecodeTimes:
        """All of it so many times as long."""
        return DecodeTimes(factor * self.base, _scaled(self.token, factor))


@dataclass(frozen=True)
class StepTimes:
    """One model's steps.

    Attributes:
      prefill: by bucket of tokens, ascending.
      decode: by bucket of sequences, ascending.
    """

    prefill: Mapping[int, PrefillTimes]
    decode: Mapping[int, DecodeTimes]

    def prefill_seconds(self, chunks: Sequence[tuple[int, int, bool]]) -> float:
        """Seconds of a prefill.

        Args:
          chunks: of each, its tokens, the context at its end, and whether it is a prompt's last.
        """
        total = sum(tokens for tokens, _, _ in chunks)
        times = self.prefill[bucket_of(self.prefill, total)]
        seconds = times.base + sum(at(times.chunk, end) for _, end, _ in chunks)
        if any(last for _, _, last in chunks):
            seconds += times.sample
        return max(_LEAST, seconds)

    def decode_seconds(self, sequences: int, rounds: int, context: float) -> float:
        """Seconds of a decode.

        Args:
          sequences: how many.
          rounds: tokens made for the one that makes most.
          context: the longest, on average over the rounds.
        """
        times = self.decode[bucket_of(self.decode, sequences)]
        return max(_LEAST, times.base + rounds * at(times.token, context))

    def slower(self, factor: float) -> StepTimes:
        """On a machine on which all takes so many times as long."""
        return StepTimes(
            {size: times.slower(factor) for size, times in self.prefill.items()},
            {size: times.slower(factor) for size, times in self.decode.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """As it is kept in a profile; milliseconds."""

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
        """What `to_json` made.

        Raises:
          ProfileError: it is not of that form.
        """

        def curve(points: Any) -> Curve:
            found = tuple((float(context), float(ms) / 1e3) for context, ms in points)
            if not found or list(found) != sorted(found):
                raise ValueError("contexts must ascend")
            return found

        try:
            if unknown := set(data) - {"prefill", "decode"}:
                # Until 26 November 2026 the engine's own part stood beside them.
                raise ValueError(f"what is {', '.join(sorted(unknown))}?")
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
                raise ValueError("there must be prefills and decodes")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProfileError(
                f"profile of {where}: the measured steps are not as `muxjax bench steps` writes "
                f"them ({type(error).__name__}: {error}); measure them again"
            ) from error
        return cls(dict(sorted(prefill.items())), dict(sorted(decode.items())))


def _scaled(curve: Curve, factor: float) -> Curve:
    return tuple((context, factor * seconds) for context, seconds in curve)


def at(curve: Curve, context: float) -> float:
    """Seconds at any context: linear between points, level below the first, and on along the last
    two points beyond the last (never below it).
    """
    if context <= curve[0][0] or len(curve) == 1:
        return curve[0][1]
    index = min(bisect_left(curve, (context, 0.0)), len(curve) - 1)
    (left, low), (right, high) = curve[index - 1], curve[index]
    slope = (high - low) / (right - left)
    if context > right:
        return high + max(0.0, slope) * (context - right)
    return low + slope * (context - left)


def bucket_of(buckets: Mapping[int, Any], size: int) -> int:
    """The least of ascending buckets that holds so many.

    Raises:
      ValueError: the largest does not.
    """
    for bucket in buckets:
        if size <= bucket:
            return bucket
    raise ValueError(f"{size} is beyond the largest bucket that was measured, {list(buckets)[-1]}")
