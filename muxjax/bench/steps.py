"""Measures the compiled steps of a fleet on its executor, for `placement.costs.step_times`.

Each time is the median of several steps, from submitting a step to its result. Every round measures
all kinds of steps once, after an uncounted round: the speed of a shared machine varies over
seconds, so kinds that are measured one after the other would not be comparable. Before each timed
step another model generates a token, so that caches are as in service. Prompts are
arbitrary and contexts are pages of zeros, since step times do not depend on values.

Times that cannot be measured directly follow from differences:

- attention of one chunk: one chunk that fills a bucket, compared with several chunks;
- sampling: a last chunk, compared with a chunk that is not the last;
- the fixed cost of a decode: a long burst, compared with a single token.

`bench.step_recorder` measures factors on these times in service.
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
    """The measurements of one kind of step.

    Attributes:
      model, phase: model and phase of the step.
      size: the bucket: tokens of a prefill, sequences of a decode.
      parts: chunks of a prefill, tokens that a decode generates for each sequence.
      context: tokens at the end of each chunk; for a decode, halfway through.
      last: whether the prefill samples.
      seconds: duration of each repetition.
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
        """Maximum minus minimum, as a fraction of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


@dataclass
class StepMeasurement:
    """The measured steps of a fleet.

    Attributes:
      steps: in order of measurement.
      in_service: factors on the times by bucket; filled by `bench.step_recorder`.
    """

    steps: list[Timed] = field(default_factory=list)
    in_service: dict[Bucket, float] = field(default_factory=dict)

    def times(self, model: str) -> StepTimes:
        """The step times of one model, for cost models.

        Raises:
          BenchError: the measurement of the model is incomplete.
        """
        model_steps = [step for step in self.steps if step.model == model]
        prefill: dict[int, PrefillTimes] = {}
        decode: dict[int, DecodeTimes] = {}
        for phase, size in sorted({(step.phase, step.size) for step in model_steps}):
            steps = [step for step in model_steps if (step.phase, step.size) == (phase, size)]
            factor = self.in_service.get((model, phase, size), 1.0)
            if phase == "prefill":
                prefill[size] = _prefill_times(steps).scaled(factor)
            else:
                decode[size] = _decode_times(steps).scaled(factor)
        if not prefill or not decode:
            raise BenchError(f"the measurement of {model} is incomplete")
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


def default_contexts(longest: int, count: int = 8) -> list[int]:
    """Evenly spaced contexts to measure, from an eighth of the longest to the longest.

    Attention may process contexts in blocks, so its time grows in steps that few points would miss.
    """
    first = max(1, longest // 8)
    if count < 2 or longest < 4:
        return [longest]
    step = (longest - first) / (count - 1)
    return sorted({round(first + index * step) for index in range(count)})


def step_kinds(session: BenchSession, contexts: Sequence[int] | None = None) -> list[Kind]:
    """Every kind of step to measure.

    Args:
      session: the fleet.
      contexts: tokens to measure decodes and long prompts at; by default eight for each model,
        up to its longest sequence.

    Raises:
      BenchError: no context fits a model.
    """
    kinds = []
    for name, model in session.models.items():
        buckets, limit = session.buckets[name], model.max_model_len
        burst = session.config.engine.decode_tokens
        requested = default_contexts(limit - 1) if contexts is None else sorted(set(contexts))
        usable = [context for context in requested if 1 <= context < limit]
        if not usable:
            raise BenchError(
                f"--context {', '.join(map(str, requested))}: {name} accepts sequences of 1 to "
                f"{limit - 1} tokens"
            )
        for size in buckets.prefill_tokens:
            size_end = min(size, limit - 1)
            chunks = min(buckets.prefill_seqs, size)
            kinds.append(Kind(name, "prefill", size, 1, size_end))
            kinds.append(Kind(name, "prefill", size, 1, size_end, last=False))
            if chunks > 1:
                kinds.append(Kind(name, "prefill", size, chunks, max(1, size // chunks)))
            for context in usable:
                if context > size_end:
                    kinds.append(Kind(name, "prefill", size, 1, context))
        for size in buckets.decode_seqs:
            bursts = sorted({max(context, burst) for context in usable})
            kinds += [Kind(name, "decode", size, burst, context) for context in bursts]
            if burst > 1:  # the fixed cost of a step does not depend on the context
                kinds.append(Kind(name, "decode", size, 1, bursts[0]))
    return kinds


def measure(
    session: BenchSession,
    *,
    repeats: int = 5,
    contexts: Sequence[int] | None = None,
    done: Callable[[Kind], None] | None = None,
    into: StepMeasurement | None = None,
    after_round: Callable[[], None] | None = None,
) -> StepMeasurement:
    """Times all kinds of steps.

    Args:
      session: the fleet; nothing else may use its executor.
      repeats: number of counted rounds.
      contexts: see `step_kinds`.
      done: called after each step, including the first round.
      into: filled after each counted round, so that an interrupt keeps earlier rounds.
      after_round: called after each counted round.

    Raises:
      BenchError: `repeats` is 0, or no context fits a model.
    """
    if repeats < 1:
        raise BenchError(f"--repeats must be at least 1, not {repeats}")
    measured = StepMeasurement() if into is None else into
    kinds = step_kinds(session, contexts)
    seconds: list[list[float]] = [[] for _ in kinds]
    for number in range(repeats + 1):
        for kind, samples in zip(kinds, seconds, strict=True):
            duration = _time(session, kind)
            if number:
                samples.append(duration)
            if done is not None:
                done(kind)
        if number:
            measured.steps[:] = [
                Timed(k.model, k.phase, k.size, k.parts, k.context, k.last, tuple(samples))
                for k, samples in zip(kinds, seconds, strict=True)
            ]
            if after_round is not None:
                after_round()
    return measured


def _time(session: BenchSession, kind: Kind) -> float:
    """Seconds of one step of a kind, submitted behind another step."""
    steps = StepBatches(session, kind.model)
    names = list(session.models)
    other = names[(names.index(kind.model) + 1) % len(names)]
    between = StepBatches(session, other)
    before = between.prefill(1, 1, 1, last=True)
    step: Step
    if kind.phase == "prefill":
        step = steps.prefill(kind.size, kind.parts, kind.context, kind.last)
    else:
        # Sequences continue where the previous burst ended, so they are reset first. The context
        # is in the middle of the burst if the longest sequence has room for it.
        longest = session.models[kind.model].max_model_len
        start = max(1, min(kind.context - kind.parts // 2, longest - kind.parts))
        preparation = steps.prepare_slots(kind.size, start)
        if other == kind.model:  # a token of this model would advance a sequence
            before = preparation.pop()
        for prefill in preparation:
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
    ((context, single_token),) = short.items()
    base = max(0.0, single_token - (long[context] - single_token) / (longest - 1))
    return DecodeTimes(
        base, tuple(sorted((context, (t - base) / longest) for context, t in long.items()))
    )


def step_rows(measured: StepMeasurement) -> list[dict[str, Any]]:
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
