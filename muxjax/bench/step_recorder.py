"""Steps in service: what becomes of their times where steps of all models alternate.

Timed one by one (`bench.steps`), each step follows one of another model. In a mixed run of the
engine, requests of all models and of many lengths come and go, a model's steps follow its own as
well, and the engine works beside the device. What steps of a bucket take there over what they take
one by one is a factor on all of its times (on two cores 0.95 to 1 for prefills, 0.9 for most
decodes, as a burst behind one of its own model takes a tenth less, and 1.2 for decodes of one
sequence of a larger model). Of a tiny model a step is
mostly the engine's own work on it, which is in the factor.

A shared machine is half as fast at one time as at another, so a part of the mixed run follows each
round of steps, under a policy of long decodes and one of short ones in turn: both meet the same
machine. A shorter run says later how fast the machine is then (`speed_now`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from muxjax.bench.replay import make_requests, replay
from muxjax.bench.session import BenchSession
from muxjax.bench.steps import Bucket, Kind, StepMeasurement, measure
from muxjax.errors import BenchError
from muxjax.placement.costs.step_times import StepTimes, find_bucket
from muxjax.placement.workload.trace import TraceRequest
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Prefill, Step, StepResult

_POLICIES = ("adbs", "slo")
"""Decodes as long as may be, and short ones."""
_EACH = 18
"""Requests of each model in a mixed run: about two seconds for three models of 15M."""
_LONGEST = 96
"""Tokens of the longest prompt, and of the longest output."""
FEWEST = 10
"""Steps that say enough about their kind."""
_EXTREMES = 0.05
"""Part of the steps that is left out at either end, as something else may have held them up."""
_BACK_TO_BACK = 1e-4
"""Seconds between two steps of which the second was submitted before the first ended."""


@dataclass(frozen=True)
class ExecutedStep:
    """A step that the engine ran.

    Attributes:
      model: whose.
      chunks: of a prefill, as `StepTimes.prefill_seconds` takes them; None for a decode.
      sequences, rounds, context: of a decode, as `StepTimes.decode_seconds` takes them.
      seconds: what it took.
      waited: whether the device had waited for it.
    """

    model: str
    chunks: list[tuple[int, int, bool]] | None
    sequences: int
    rounds: int
    context: float
    seconds: float
    waited: bool

    def bucket(self, times: Mapping[str, StepTimes]) -> Bucket:
        """Which compiled step it was."""
        own = times[self.model]
        if self.chunks is not None:
            tokens = sum(count for count, _, _ in self.chunks)
            return self.model, "prefill", find_bucket(own.prefill, tokens)
        return self.model, "decode", find_bucket(own.decode, self.sequences)

    def expected(self, times: Mapping[str, StepTimes]) -> float:
        """Seconds that it takes by the step times of all models."""
        own = times[self.model]
        if self.chunks is not None:
            return own.prefill_seconds(self.chunks)
        return own.decode_seconds(self.sequences, self.rounds, self.context)


@dataclass
class StepRecorder:
    """Notes an engine's steps.

    Attributes:
      ran: in order.
    """

    ran: list[ExecutedStep] = field(default_factory=list)
    _held: dict[tuple[str, int], int] = field(default_factory=dict)
    _end: float = float("-inf")

    def observe(self, unit: Scheduler, step: Step, result: StepResult) -> None:
        """See `engine.Observer`."""
        del unit
        name, held, seconds = step.model, self._held, result.seconds
        waited = result.started - self._end > _BACK_TO_BACK
        self._end = result.started + seconds
        if isinstance(step, Prefill):
            for chunk in step.chunks:
                held[name, chunk.slot] = chunk.end
            chunks = [(len(c.tokens), c.end, c.last) for c in step.chunks]
            self.ran.append(ExecutedStep(name, chunks, 0, 0, 0.0, seconds, waited))
            return
        longest = 0
        for sequence, made in zip(step.sequences, result.tokens, strict=True):
            held[name, sequence.slot] = held.get((name, sequence.slot), 0) + len(made)
            longest = max(longest, held[name, sequence.slot])
        rounds = max((len(made) for made in result.tokens), default=0)
        context = longest - rounds / 2
        self.ran.append(
            ExecutedStep(name, None, len(step.sequences), rounds, context, seconds, waited)
        )


def measure_in_service(
    rig: BenchSession,
    *,
    repeats: int = 5,
    contexts: Sequence[int] | None = None,
    done: Callable[[Kind], None] | None = None,
    into: StepMeasurement | None = None,
) -> StepMeasurement:
    """Times all kinds of steps, and what becomes of them in service; see `steps.measure`.

    Raises:
      BenchError: as `steps.measure`, or too few steps followed each other.
    """
    found = StepMeasurement() if into is None else into
    ran: list[ExecutedStep] = []
    policies = itertools.cycle(_POLICIES)

    def mixed() -> None:
        for _ in _POLICIES:
            ran.extend(_mixed_run(rig, found, next(policies)))

    measure(rig, repeats=repeats, contexts=contexts, done=done, into=found, after_round=mixed)
    times = {name: found.times(name) for name in rig.models}
    for bucket in sorted({(step.model, step.phase, step.size) for step in found.steps}):
        found.in_service[bucket] = _factor(bucket, ran, times)
    return found


def speed_now(rig: BenchSession, measured: StepMeasurement) -> float:
    """How long steps take now, as a multiple of what was measured.

    Raises:
      BenchError: too few steps followed each other.
    """
    times = {name: measured.times(name) for name in rig.models}
    return slowness(_mixed_run(rig, measured, _POLICIES[0]), times)


def slowness(ran: Sequence[ExecutedStep], times: Mapping[str, StepTimes]) -> float:
    """What steps took over what they were expected to, without the extremes.

    Raises:
      BenchError: too few steps.
    """
    if len(ran) < FEWEST:
        raise BenchError(f"only {len(ran)} steps, which say too little; measure it again")
    expected = np.array([step.expected(times) for step in ran])
    seconds = np.array([step.seconds for step in ran])
    ratios = seconds / expected
    low, high = np.quantile(ratios, [_EXTREMES, 1 - _EXTREMES])
    usual = (ratios >= low) & (ratios <= high)
    return float(seconds[usual].sum() / expected[usual].sum())


def _mixed_run(rig: BenchSession, measured: StepMeasurement, policy: str) -> list[ExecutedStep]:
    """Steps of a run that the device did not have to wait for."""
    step_seconds = sum(step.median for step in measured.steps) / len(measured.steps)
    workload = _mix(rig, step_seconds)
    vocab = {name: model.config.vocab_size for name, model in rig.models.items()}
    limits = {name: model.max_model_len for name, model in rig.models.items()}
    watch = StepRecorder()
    with rig.engine(rig.unit(policy)) as engine:
        engine.observe(watch.observe)
        done = replay(engine, workload, make_requests(workload, vocab, limits))
    if done.interrupted:
        raise KeyboardInterrupt
    return [step for step in watch.ran if not step.waited]


def _factor(bucket: Bucket, ran: Sequence[ExecutedStep], times: Mapping[str, StepTimes]) -> float:
    """What steps of a bucket take over what they take alone; of the phase, where there were few."""
    own = [step for step in ran if step.bucket(times) == bucket]
    if len(own) < FEWEST:
        own = [step for step in ran if step.bucket(times)[1] == bucket[1]]
    return slowness(own, times)


def _mix(rig: BenchSession, step_seconds: float) -> list[TraceRequest]:
    """Requests of all models, about one a step at first, then all that is left at once."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(_EACH):
        for number, (name, model) in enumerate(rig.models.items()):
            most = max(1, min(_LONGEST, (model.max_model_len - 1) // 2))
            prompt, output = (int(tokens) for tokens in rng.integers(1, most + 1, 2))
            arrival = step_seconds * (len(rig.models) * min(index, _EACH // 2) + number)
            found.append(TraceRequest(arrival, name, prompt, output))
    return sorted(found, key=lambda asked: asked.arrival)
