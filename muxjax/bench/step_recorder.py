"""Measures factors on step times in service, where steps of all models alternate.

`bench.steps` measures each step behind a step of another model. In a mixed run of the engine,
requests of all models and many lengths arrive and finish, consecutive steps may be of the same
model, and the host works while the device computes. The factor of a bucket is the duration of its
steps in such a run over their isolated duration. For a tiny model, most of a step is host work,
which the factor includes.

The speed of a shared machine varies, so mixed runs follow each round of measured steps: one under a
policy with long decodes and one under a policy with short decodes. `speed_now` measures the current
speed in a shorter run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from muxjax.bench.replay import build_requests, replay
from muxjax.bench.session import BenchSession
from muxjax.bench.steps import Bucket, Kind, StepMeasurement, measure
from muxjax.errors import BenchError
from muxjax.placement.costs.step_times import StepTimes, find_bucket
from muxjax.placement.workload.trace import TraceRequest
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Prefill, Step, StepResult

_POLICIES = ("adbs", "slo")
"""One policy with long decodes and one with short decodes."""
_REQUESTS_PER_MODEL = 18
"""Requests of each model in a mixed run."""
_LONGEST = 96
"""Maximum tokens of a prompt and of an output in a mixed run."""
FEWEST = 10
"""Minimum number of steps for a factor."""
_EXTREMES = 0.05
"""Fraction of the steps at either end that is discarded as outliers."""
_BACK_TO_BACK = 1e-4
"""Maximum seconds between two steps that ran back to back."""


@dataclass(frozen=True)
class ExecutedStep:
    """A step that the engine executed.

    Attributes:
      model: the model.
      chunks: the chunks of a prefill, as in `StepTimes.prefill_seconds`; None for a decode.
      sequences, rounds, context: size of a decode, as in `StepTimes.decode_seconds`.
      seconds: duration of the step.
      waited: whether the device was idle before it.
    """

    model: str
    chunks: list[tuple[int, int, bool]] | None
    sequences: int
    rounds: int
    context: float
    seconds: float
    waited: bool

    def bucket(self, times: Mapping[str, StepTimes]) -> Bucket:
        """The bucket of the step."""
        model_times = times[self.model]
        if self.chunks is not None:
            tokens = sum(count for count, _, _ in self.chunks)
            return self.model, "prefill", find_bucket(model_times.prefill, tokens)
        return self.model, "decode", find_bucket(model_times.decode, self.sequences)

    def expected(self, times: Mapping[str, StepTimes]) -> float:
        """Expected duration in seconds, from the step times of all models."""
        model_times = times[self.model]
        if self.chunks is not None:
            return model_times.prefill_seconds(self.chunks)
        return model_times.decode_seconds(self.sequences, self.rounds, self.context)


@dataclass
class StepRecorder:
    """Records the steps of an engine.

    Attributes:
      ran: executed steps in order.
    """

    ran: list[ExecutedStep] = field(default_factory=list)
    _lengths: dict[tuple[str, int], int] = field(default_factory=dict)
    _end: float = float("-inf")

    def observe(self, unit: Scheduler, step: Step, result: StepResult) -> None:
        """See `engine.Observer`."""
        del unit
        name, lengths, seconds = step.model, self._lengths, result.seconds
        waited = result.started - self._end > _BACK_TO_BACK
        self._end = result.started + seconds
        if isinstance(step, Prefill):
            for chunk in step.chunks:
                lengths[name, chunk.slot] = chunk.end
            chunks = [(len(c.tokens), c.end, c.last) for c in step.chunks]
            self.ran.append(ExecutedStep(name, chunks, 0, 0, 0.0, seconds, waited))
            return
        longest = 0
        for sequence, tokens in zip(step.sequences, result.tokens, strict=True):
            lengths[name, sequence.slot] = lengths.get((name, sequence.slot), 0) + len(tokens)
            longest = max(longest, lengths[name, sequence.slot])
        rounds = max((len(tokens) for tokens in result.tokens), default=0)
        context = longest - rounds / 2
        self.ran.append(
            ExecutedStep(name, None, len(step.sequences), rounds, context, seconds, waited)
        )


def measure_in_service(
    session: BenchSession,
    *,
    repeats: int = 5,
    contexts: Sequence[int] | None = None,
    done: Callable[[Kind], None] | None = None,
    into: StepMeasurement | None = None,
) -> StepMeasurement:
    """Measures all kinds of steps and their factors in service; see `steps.measure`.

    Raises:
      BenchError: as in `steps.measure`, or too few steps ran back to back.
    """
    measured = StepMeasurement() if into is None else into
    ran: list[ExecutedStep] = []
    policies = itertools.cycle(_POLICIES)

    def mixed() -> None:
        for _ in _POLICIES:
            ran.extend(_mixed_run(session, measured, next(policies)))

    measure(
        session, repeats=repeats, contexts=contexts, done=done, into=measured, after_round=mixed
    )
    times = {name: measured.times(name) for name in session.models}
    for bucket in sorted({(step.model, step.phase, step.size) for step in measured.steps}):
        measured.in_service[bucket] = _factor(bucket, ran, times)
    return measured


def speed_now(session: BenchSession, measured: StepMeasurement) -> float:
    """The current duration of steps, as a multiple of the measured one.

    Raises:
      BenchError: too few steps ran back to back.
    """
    times = {name: measured.times(name) for name in session.models}
    return slowness(_mixed_run(session, measured, _POLICIES[0]), times)


def slowness(ran: Sequence[ExecutedStep], times: Mapping[str, StepTimes]) -> float:
    """The duration of steps over their expected duration, without outliers.

    Raises:
      BenchError: too few steps.
    """
    if len(ran) < FEWEST:
        raise BenchError(f"only {len(ran)} steps ran, which is too few; repeat the measurement")
    expected = np.array([step.expected(times) for step in ran])
    seconds = np.array([step.seconds for step in ran])
    ratios = seconds / expected
    low, high = np.quantile(ratios, [_EXTREMES, 1 - _EXTREMES])
    usual = (ratios >= low) & (ratios <= high)
    return float(seconds[usual].sum() / expected[usual].sum())


def _mixed_run(session: BenchSession, measured: StepMeasurement, policy: str) -> list[ExecutedStep]:
    """The steps of a mixed run that ran back to back."""
    step_seconds = sum(step.median for step in measured.steps) / len(measured.steps)
    workload = _mix(session, step_seconds)
    vocab = {name: model.config.vocab_size for name, model in session.models.items()}
    limits = {name: model.max_model_len for name, model in session.models.items()}
    recorder = StepRecorder()
    with session.engine(session.new_scheduler(policy)) as engine:
        engine.observe(recorder.observe)
        result = replay(engine, workload, build_requests(workload, vocab, limits))
    if result.interrupted:
        raise KeyboardInterrupt
    return [step for step in recorder.ran if not step.waited]


def _factor(bucket: Bucket, ran: Sequence[ExecutedStep], times: Mapping[str, StepTimes]) -> float:
    """The factor of a bucket, or of its phase if the bucket has too few steps."""
    steps = [step for step in ran if step.bucket(times) == bucket]
    if len(steps) < FEWEST:
        steps = [step for step in ran if step.bucket(times)[1] == bucket[1]]
    return slowness(steps, times)


def _mix(session: BenchSession, step_seconds: float) -> list[TraceRequest]:
    """Requests of all models: at first about one per step, then the rest at once."""
    rng = np.random.default_rng(0)
    requests = []
    for index in range(_REQUESTS_PER_MODEL):
        for number, (name, model) in enumerate(session.models.items()):
            longest = max(1, min(_LONGEST, (model.max_model_len - 1) // 2))
            prompt, output = (int(tokens) for tokens in rng.integers(1, longest + 1, 2))
            arrival = step_seconds * (
                len(session.models) * min(index, _REQUESTS_PER_MODEL // 2) + number
            )
            requests.append(TraceRequest(arrival, name, prompt, output))
    return sorted(requests, key=lambda request: request.arrival)
