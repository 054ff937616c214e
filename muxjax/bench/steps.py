"""Times the compiled steps of a fleet on its own executor: what `placement.step_times` says.

Each time is the median of several steps, from submitting a step to having its tokens (which a step
gives when all of its results are ready). All kinds of steps are timed once in each round, after a
round that is not counted: a shared machine may be half as fast for some seconds, and one kind after
the other would then be measured on unlike machines (on two virtual cores a decode of 16 took 17 ms
at a context of 165 and, half a minute later, 9 ms at 210). Before each step that is timed another
model makes a token, so that weights are not in a processor's caches that would not be there in
service: on two cores with 60 MB models a prefill of 128 tokens takes 16 ms after its own like and
20 ms after another model. Prompts are arbitrary, contexts are pages of zeros: no step's time
depends on values.

What cannot be timed on its own follows from differences:

- one chunk of attention, from one chunk of a bucket against several that fill it together;
- sampling, from a last chunk against one that is not;
- a decode's fixed part, from a long burst against one of a single token.

What becomes of these times in service is measured beside them (`bench.in_service`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from muxjax.bench.session import BenchSession
from muxjax.bench.step_batches import StepBatches
from muxjax.errors import BenchError
from muxjax.placement.costs.step_times import Curve, DecodeTimes, PrefillTimes, StepTimes
from muxjax.scheduling.steps import Step

Bucket = tuple[str, str, int]
"""Model, phase (prefill or decode), and tokens of a prefill or sequences of a decode."""


@dataclass(frozen=True)
class Timed:
    """One kind of step, measured.

    Attributes:
      model, phase: whose.
      size: the bucket: tokens of a prefill, sequences of a decode.
      parts: chunks of the prefill, tokens that the decode makes for each sequence.
      context: tokens at the end of each chunk; of a decode, halfway through.
      last: whether the prefill samples.
      seconds: of each repetition.
    """

    model: str
    phase: str
    size: int
    parts: int
    context: int
    last: bool
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Highest less lowest, as a part of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


@dataclass
class StepMeasurement:
    """All of a fleet's steps.

    Attributes:
      steps: in the order of measuring.
      in_service: factors on them by model, phase and bucket; filled by `bench.in_service`.
    """

    steps: list[Timed] = field(default_factory=list)
    in_service: dict[Bucket, float] = field(default_factory=dict)

    def times(self, model: str) -> StepTimes:
        """One model's steps as a cost model takes them.

        Raises:
          BenchError: the model was not measured to the end.
        """
        own = [step for step in self.steps if step.model == model]
        prefill: dict[int, PrefillTimes] = {}
        decode: dict[int, DecodeTimes] = {}
        for phase, size in sorted({(step.phase, step.size) for step in own}):
            steps = [step for step in own if (step.phase, step.size) == (phase, size)]
            factor = self.in_service.get((model, phase, size), 1.0)
            if phase == "prefill":
                prefill[size] = _prefill_times(steps).scaled(factor)
            else:
                decode[size] = _decode_times(steps).scaled(factor)
        if not prefill or not decode:
            raise BenchError(f"{model} was not measured to the end")
        return StepTimes(prefill, decode)


@dataclass(frozen=True)
class Kind:
    """A kind of step to measure; see `Timed`."""

    model: str
    phase: str
    size: int
    parts: int
    context: int
    last: bool = True


def contexts_of(longest: int, count: int = 8) -> list[int]:
    """Contexts to measure: spread evenly from an eighth of the longest to the longest. Attention
    may walk them in blocks, so that its time grows in stairs: a few points do not show them.
    """
    first = max(1, longest // 8)
    if count < 2 or longest < 4:
        return [longest]
    step = (longest - first) / (count - 1)
    return sorted({round(first + index * step) for index in range(count)})


def kinds_of(rig: BenchSession, contexts: Sequence[int] | None = None) -> list[Kind]:
    """Every kind of step to measure.

    Args:
      rig: the fleet.
      contexts: tokens to measure decodes and long prompts at; by default eight for each model,
        up to its longest sequence.

    Raises:
      BenchError: a context that no model can hold.
    """
    found = []
    for name, model in rig.models.items():
        buckets, limit = rig.buckets[name], model.max_model_len
        burst = rig.config.engine.decode_tokens
        asked = contexts_of(limit - 1) if contexts is None else sorted(set(contexts))
        usable = [context for context in asked if 1 <= context < limit]
        if not usable:
            raise BenchError(
                f"--context {', '.join(map(str, asked))}: {name} holds sequences of 1 to "
                f"{limit - 1} tokens"
            )
        for size in buckets.prefill_tokens:
            size_end = min(size, limit - 1)
            chunks = min(buckets.prefill_seqs, size)
            found.append(Kind(name, "prefill", size, 1, size_end))
            found.append(Kind(name, "prefill", size, 1, size_end, last=False))
            if chunks > 1:
                found.append(Kind(name, "prefill", size, chunks, max(1, size // chunks)))
            for context in usable:
                if context > size_end:
                    found.append(Kind(name, "prefill", size, 1, context))
        for size in buckets.decode_seqs:
            bursts = sorted({max(context, burst) for context in usable})
            found += [Kind(name, "decode", size, burst, context) for context in bursts]
            if burst > 1:  # what a step costs besides its tokens is the same at any context
                found.append(Kind(name, "decode", size, 1, bursts[0]))
    return found


def measure(
    rig: BenchSession,
    *,
    repeats: int = 5,
    contexts: Sequence[int] | None = None,
    done: Callable[[Kind], None] | None = None,
    into: StepMeasurement | None = None,
    after_round: Callable[[], None] | None = None,
) -> StepMeasurement:
    """Times all kinds of steps.

    Args:
      rig: whose; nothing else may use its executor.
      repeats: rounds that count.
      contexts: see `kinds_of`.
      done: told of each step, those of the first round included.
      into: filled after each round that counts, so that an interrupt leaves those before it.
      after_round: called after each round that counts.

    Raises:
      BenchError: no repeats, or a context that no model can hold.
    """
    if repeats < 1:
        raise BenchError(f"--repeats must be at least 1, not {repeats}")
    found = StepMeasurement() if into is None else into
    kinds = kinds_of(rig, contexts)
    seconds: list[list[float]] = [[] for _ in kinds]
    for number in range(repeats + 1):
        for kind, own in zip(kinds, seconds, strict=True):
            taken = _time(rig, kind)
            if number:
                own.append(taken)
            if done is not None:
                done(kind)
        if number:
            found.steps[:] = [
                Timed(k.model, k.phase, k.size, k.parts, k.context, k.last, tuple(own))
                for k, own in zip(kinds, seconds, strict=True)
            ]
            if after_round is not None:
                after_round()
    return found


def _time(rig: BenchSession, kind: Kind) -> float:
    """Seconds of one such step, submitted behind another."""
    steps = StepBatches(rig, kind.model)
    names = list(rig.models)
    other = names[(names.index(kind.model) + 1) % len(names)]
    between = StepBatches(rig, other)
    before = between.prefill(1, 1, 1, last=True)
    step: Step
    if kind.phase == "prefill":
        step = steps.prefill(kind.size, kind.parts, kind.context, kind.last)
    else:
        # Sequences go on where the burst before left them: back to where they were.
        # The context is in the burst's middle, where the longest sequence has room for it.
        longest = rig.models[kind.model].max_model_len
        start = max(1, min(kind.context - kind.parts // 2, longest - kind.parts))
        arming = steps.arm(kind.size, start)
        if other == kind.model:  # a token of its own would move a sequence
            before = arming.pop()
        for prefill in arming:
            steps.run(prefill)
        step = steps.decode(kind.size, kind.parts, min(longest, start + kind.parts))
    return steps.run(step, behind=before)


def _prefill_times(steps: Sequence[Timed]) -> PrefillTimes:
    single = {step.context: step.median for step in steps if step.parts == 1 and step.last}
    shortest = min(single)
    several = [step for step in steps if step.parts > 1]
    unsampled = [step.median for step in steps if not step.last]
    sample = max(0.0, single[shortest] - unsampled[0]) if unsampled else 0.0
    chunk = 0.0
    if several:
        chunk = max(0.0, (several[0].median - single[shortest]) / (several[0].parts - 1))
    base = max(0.0, single[shortest] - sample - chunk)
    curve: Curve = tuple(
        (context, max(0.0, seconds - base - sample)) for context, seconds in sorted(single.items())
    )
    return PrefillTimes(base, curve, sample)


def _decode_times(steps: Sequence[Timed]) -> DecodeTimes:
    longest = max(step.parts for step in steps)
    long = {step.context: step.median for step in steps if step.parts == longest}
    short = {step.context: step.median for step in steps if step.parts == 1}
    if longest == 1:
        return DecodeTimes(0.0, tuple(sorted(long.items())))
    ((context, one),) = short.items()
    base = max(0.0, one - (long[context] - one) / (longest - 1))
    return DecodeTimes(
        base, tuple(sorted((context, (t - base) / longest) for context, t in long.items()))
    )


def rows_of(measured: StepMeasurement) -> list[dict[str, Any]]:
    """A row for each kind of step, for tables and files."""
    return [
        {
            "model": step.model,
            "phase": step.phase,
            "bucket": step.size,
            "chunks" if step.phase == "prefill" else "tokens": step.parts,
            "context": step.context,
            "samples": step.last,
            "median_ms": 1e3 * step.median,
            "lowest_ms": 1e3 * min(step.seconds),
            "highest_ms": 1e3 * max(step.seconds),
            "repeats": len(step.seconds),
            "in_service": measured.in_service.get((step.model, step.phase, step.size)),
        }
        for step in measured.steps
    ]
