"""What the engine adds to its steps: its own work, as far as it does not run beside the device.

A run of the engine is compared with what its steps take one by one. In it requests of all models
and of many lengths come and go, so that steps of unlike models follow each other and evict each
other's weights from the caches, as they do in service. The time between the ends of two steps that
followed each other without a pause is what a step takes there; the difference is kept for each
bucket, as the mean of the middle half. On a CPU the engine's thread takes time from the
device's, and more of it from a prefill, which keeps all cores busy, than from a decode.

It may be negative: in the engine a step is submitted while the one before it runs, and timed one by
one each waits for its own submission.
"""

from __future__ import annotations

import itertools

import numpy as np

from muxjax.bench.replay import make_requests, replay
from muxjax.bench.rig import Rig
from muxjax.bench.steps import Measured
from muxjax.errors import BenchError
from muxjax.placement.step_times import StepTimes, bucket_of
from muxjax.placement.trace import TraceRequest
from muxjax.scheduling.steps import Prefill, Step, StepResult
from muxjax.scheduling.unit import Unit

_EACH = 36
"""Requests of each model."""
_LONGEST = 96
"""Tokens of the longest prompt, and of the longest output."""
_FEWEST = 5
"""Steps of a bucket that say enough about it."""
_EXTREMES = 0.25
"""Part of the differences that is left out at either end: one step that something else held up
would make a bucket slow for good."""
_Key = tuple[str, str, int]
"""Model, phase, bucket."""


def add_host_times(rig: Rig, measured: Measured) -> None:
    """Fills `measured.host`.

    Raises:
      BenchError: of a model no two steps followed each other.
    """
    times = {name: measured.times(name) for name in rig.models}
    held: dict[tuple[str, int], int] = {}
    seen: list[tuple[_Key, StepResult, float]] = []

    def observe(unit: Unit, step: Step, result: StepResult) -> None:
        del unit
        own = times[step.model]
        seen.append((_key(own, step), result, _alone(own, held, step, result)))

    workload = _mix(rig, sum(step.median for step in measured.steps) / len(measured.steps))
    vocab = {name: model.config.vocab_size for name, model in rig.models.items()}
    limits = {name: model.max_model_len for name, model in rig.models.items()}
    with rig.engine(rig.unit(rig.config.policy)) as engine:
        engine.observe(observe)
        done = replay(engine, workload, make_requests(workload, vocab, limits))
    if done.interrupted:
        raise KeyboardInterrupt
    extra: dict[_Key, list[float]] = {}
    for (_, before, _), (key, after, alone) in itertools.pairwise(seen):
        end = before.started + before.seconds
        if after.started - end < 1e-4:  # it was submitted before the other ended
            extra.setdefault(key, []).append(after.started + after.seconds - end - alone)
    for name, own in times.items():
        for phase, sizes in (("prefill", own.prefill), ("decode", own.decode)):
            for size in sizes:
                measured.host[name, phase, size] = _added(extra, (name, phase, size))


def _key(times: StepTimes, step: Step) -> _Key:
    if isinstance(step, Prefill):
        return step.model, "prefill", bucket_of(times.prefill, step.num_tokens)
    return step.model, "decode", bucket_of(times.decode, len(step.sequences))


def _added(extra: dict[_Key, list[float]], wanted: _Key) -> float:
    """The mean of the middle half; of the same phase, where the bucket was hardly used."""
    found = extra.get(wanted, [])
    if len(found) < _FEWEST:
        found = [v for key, values in extra.items() if key[:2] == wanted[:2] for v in values]
    if not found:
        raise BenchError(f"{wanted[0]}: no two steps followed each other; measure it again")
    low, high = np.quantile(found, [_EXTREMES, 1 - _EXTREMES])
    return float(np.mean([value for value in found if low <= value <= high]))


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
