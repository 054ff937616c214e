"""What becomes of the steps' times in the engine.

A run of the engine is compared with what its steps take one by one. In it requests of all models
and of many lengths come and go, so that steps of unlike models follow each other and evict each
other's weights from the caches, and the engine works beside the device, as in service. The time
between the ends of two steps that followed each other without a pause is what a step takes there.

What it takes there is, for prefills and for decodes, a line over what it takes by itself, the same
for all models and buckets. The slope is the median of all slopes between two steps (Theil and Sen),
the constant the mean of what is left without the extremes, so that steps that something else held
up do not count. The requests run twice, under a policy of long decodes and under one of short ones,
since a line needs steps of unlike length. The constant may be negative: in the engine a step is
submitted while the one before it runs, and timed one by one each waits for its own submission.
"""

from __future__ import annotations

import itertools

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
_LONGEST = 96
"""Tokens of the longest prompt, and of the longest output."""
_FEWEST = 10
"""Steps of a phase that say enough about it."""
_EXTREMES = 0.05
"""Part of the steps that is left out at either end."""
_BACK_TO_BACK = 1e-4
"""Seconds between two steps of which the second was submitted before the first ended."""


def add_host_times(rig: Rig, measured: Measured) -> None:
    """Fills `measured.engine`.

    Raises:
      BenchError: too few steps followed each other.
    """
    times = {name: measured.times(name) for name in rig.models}
    pairs: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
    for policy in _POLICIES:
        seen = _run(rig, policy, times, measured)
        for (_, before, _), (phase, after, alone) in itertools.pairwise(seen):
            end = before.started + before.seconds
            if after.started - end < _BACK_TO_BACK:
                pairs[phase].append((alone, after.started + after.seconds - end))
    for phase, found in pairs.items():
        if len(found) < _FEWEST:
            raise BenchError(
                f"only {len(found)} {phase} steps followed another at once; measure it again"
            )
        measured.engine[phase] = _line(np.array(found))


def _run(
    rig: Rig, policy: str, times: dict[str, StepTimes], measured: Measured
) -> list[tuple[str, StepResult, float]]:
    """Steps in the order in which they ran: the phase, the result, and what it takes alone."""
    held: dict[tuple[str, int], int] = {}
    seen: list[tuple[str, StepResult, float]] = []

    def observe(unit: Unit, step: Step, result: StepResult) -> None:
        del unit
        phase = "prefill" if isinstance(step, Prefill) else "decode"
        seen.append((phase, result, _alone(times[step.model], held, step, result)))

    workload = _mix(rig, sum(step.median for step in measured.steps) / len(measured.steps))
    vocab = {name: model.config.vocab_size for name, model in rig.models.items()}
    limits = {name: model.max_model_len for name, model in rig.models.items()}
    with rig.engine(rig.unit(policy)) as engine:
        engine.observe(observe)
        done = replay(engine, workload, make_requests(workload, vocab, limits))
    if done.interrupted:
        raise KeyboardInterrupt
    return seen


def _line(found: np.ndarray) -> Engine:
    """Through seconds alone and in the engine, `[N, 2]`."""
    alone, there = found.T
    slope = 1.0
    if np.ptp(alone) > 0:
        slope = float(theilslopes(there, alone).slope)
    if slope <= 0:  # nothing but noise
        slope = 1.0
    rest = there - slope * alone
    low, high = np.quantile(rest, [_EXTREMES, 1 - _EXTREMES])
    return Engine(slope, float(rest[(rest >= low) & (rest <= high)].mean()))


def _mix(rig: Rig, step_seconds: float) -> list[TraceRequest]:
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


def _alone(
    times: StepTimes, held: dict[tuple[str, int], int], step: Step, result: StepResult
) -> float:
    """What the step takes one by one."""
    name = step.model
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
