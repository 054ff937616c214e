"""What becomes of the steps' times in the engine.

A run of the engine is compared with what its steps take one by one. In it requests of all models
and of many lengths come and go, so that steps of unlike models follow each other and evict each
other's weights from the caches, and the engine works beside the device, as in service. The time
between the ends of two steps that followed each other without a pause is what a step takes there.

What it takes there is, for prefills and for decodes, a line over what it takes by itself, the same
for all models and buckets. The slope is the median of all slopes between two steps (Theil and Sen),
the constant the mean of what is left without the extremes, so that steps that something else held
up do not count. The requests run twice, under a policy of long decodes and under one of short ones,
since a line needs steps of unlike length.

The same run says how fast the machine is now against when a profile was measured (`speed_now`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import theilslopes

from muxjax.bench.replay import make_requests, replay
from muxjax.bench.rig import Rig
from muxjax.bench.steps import Measured
from muxjax.errors import BenchError
from muxjax.placement.step_times import Engine, StepTimes
from muxjax.placement.trace import TraceRequest
from muxjax.scheduling.steps import Prefill, Step, StepResult
from muxjax.scheduling.unit import Unit

_POLICIES = ("adbs", "slo")
"""Decodes as long as may be, and short ones."""
_EACH = 36
"""Requests of each model."""
_EACH_NOW = 18
"""The same, where only the machine's speed is asked: about two seconds."""
_LONGEST = 96
"""Tokens of the longest prompt, and of the longest output."""
_FEWEST = 10
"""Steps of a phase that say enough about it."""
_EXTREMES = 0.05
"""Part of the steps that is left out at either end."""
_BACK_TO_BACK = 1e-4
"""Seconds between two steps of which the second was submitted before the first ended."""


@dataclass(frozen=True)
class Seen:
    """A step of the engine.

    Attributes:
      phase: prefill or decode.
      expected: seconds that it takes by the step times.
      seconds: what it took.
      waited: whether the device waited for it after the step before.
    """

    phase: str
    expected: float
    seconds: float
    waited: bool


@dataclass
class Watch:
    """An observer of an engine that compares its steps with step times.

    Attributes:
      times: of each model.
      seen: in the order in which they ran.
    """

    times: Mapping[str, StepTimes]
    seen: list[Seen] = field(default_factory=list)
    _held: dict[tuple[str, int], int] = field(default_factory=dict)
    _end: float = float("-inf")

    def observe(self, unit: Unit, step: Step, result: StepResult) -> None:
        """See `engine.Observer`."""
        del unit
        phase = "prefill" if isinstance(step, Prefill) else "decode"
        waited = result.started - self._end > _BACK_TO_BACK
        self._end = result.started + result.seconds
        self.seen.append(Seen(phase, self._expected(step, result), result.seconds, waited))

    def _expected(self, step: Step, result: StepResult) -> float:
        name, held, times = step.model, self._held, self.times[step.model]
        if isinstance(step, Prefill):
            for chunk in step.chunks:
                held[name, chunk.slot] = chunk.end
            return times.prefill_seconds([(len(c.tokens), c.end, c.last) for c in step.chunks])
        longest = 0
        for sequence, made in zip(step.sequences, result.tokens, strict=True):
            held[name, sequence.slot] = held.get((name, sequence.slot), 0) + len(made)
            longest = max(longest, held[name, sequence.slot])
        rounds = max((len(made) for made in result.tokens), default=0)
        return times.decode_seconds(len(step.sequences), rounds, longest - rounds / 2)


def add_host_times(rig: Rig, measured: Measured) -> None:
    """Fills `measured.engine`.

    Raises:
      BenchError: too few steps followed each other.
    """
    measured.engine.clear()
    seen = [step for policy in _POLICIES for step in _back_to_back(rig, measured, policy, _EACH)]
    for phase in ("prefill", "decode"):
        found = [(step.expected, step.seconds) for step in seen if step.phase == phase]
        if len(found) < _FEWEST:
            raise BenchError(
                f"only {len(found)} {phase} steps followed another at once; measure it again"
            )
        measured.engine[phase] = _line(np.array(found))


def speed_now(rig: Rig, measured: Measured) -> float:
    """How long steps take now, as a multiple of what was measured."""
    seen = _back_to_back(rig, measured, _POLICIES[0], _EACH_NOW)
    if len(seen) < _FEWEST:
        raise BenchError(f"only {len(seen)} steps followed another at once; measure it again")
    found = np.array([(step.expected, step.seconds) for step in seen])
    expected, seconds = found[_usual(found[:, 1] / found[:, 0])].sum(axis=0)
    return float(seconds / expected)


def _back_to_back(rig: Rig, measured: Measured, policy: str, each: int) -> list[Seen]:
    """Steps of a mixed run that the device did not have to wait for."""
    step_seconds = sum(step.median for step in measured.steps) / len(measured.steps)
    workload = _mix(rig, step_seconds, each)
    vocab = {name: model.config.vocab_size for name, model in rig.models.items()}
    limits = {name: model.max_model_len for name, model in rig.models.items()}
    watch = Watch({name: measured.times(name) for name in rig.models})
    with rig.engine(rig.unit(policy)) as engine:
        engine.observe(watch.observe)
        done = replay(engine, workload, make_requests(workload, vocab, limits))
    if done.interrupted:
        raise KeyboardInterrupt
    return [step for step in watch.seen if not step.waited]


def _line(found: np.ndarray) -> Engine:
    """Through seconds alone and in the engine, `[N, 2]`."""
    alone, there = found.T
    slope = 1.0
    if np.ptp(alone) > 0:
        slope = float(theilslopes(there, alone).slope)
    if slope <= 0:  # nothing but noise
        slope = 1.0
    rest = there - slope * alone
    return Engine(slope, float(rest[_usual(rest)].mean()))


def _usual(values: np.ndarray) -> np.ndarray:
    """Which of them are not extreme."""
    low, high = np.quantile(values, [_EXTREMES, 1 - _EXTREMES])
    return (values >= low) & (values <= high)


def _mix(rig: Rig, step_seconds: float, each: int) -> list[TraceRequest]:
    """So many requests of each model, about one a step at first, then all that is left at once."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(each):
        for number, (name, model) in enumerate(rig.models.items()):
            most = max(1, min(_LONGEST, (model.max_model_len - 1) // 2))
            prompt, output = (int(tokens) for tokens in rng.integers(1, most + 1, 2))
            arrival = step_seconds * (len(rig.models) * min(index, each // 2) + number)
            found.append(TraceRequest(arrival, name, prompt, output))
    return sorted(found, key=lambda asked: asked.arrival)
