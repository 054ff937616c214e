"""What becomes of steps in service: worked out from steps that were made up."""

from __future__ import annotations

import pytest

from muxjax.bench import step_recorder as in_service
from muxjax.bench.step_recorder import ExecutedStep, StepRecorder
from muxjax.errors import BenchError
from muxjax.placement.costs.step_times import DecodeTimes, PrefillTimes, StepTimes
from muxjax.scheduling.policies.registry import create_policy
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import BucketLimits, ModelSpec
from muxjax.scheduling.steps import Decode, DecodeSequence, Prefill, PrefillChunk, StepResult

TIMES = {
    "m": StepTimes(
        {64: PrefillTimes(0.010, ((64, 0.0),), 0.0)},
        {8: DecodeTimes(0.0, ((1, 0.002), (101, 0.004)))},
    )
}


def prefill(slot: int, tokens: int) -> Prefill:
    chunk = PrefillChunk(slot, slot, (1,) * tokens, 0, tokens, [0], 1, None, 99)
    return Prefill("m", [chunk])


def decode(tokens: int, *slots: int) -> Decode:
    return Decode("m", [DecodeSequence(slot, slot, [0], 1, tokens) for slot in slots], tokens)


def test_an_engines_steps_are_noted() -> None:
    watch = StepRecorder()
    spec = ModelSpec("m", 1, 16, 256, BucketLimits(8, 64, 8, 8))
    unit = Scheduler([spec], 100, create_policy("adbs"))

    def ran(
        step: Prefill | Decode, made: list[int], started: float, seconds: float
    ) -> ExecutedStep:
        tokens = [[0] * count for count in made]
        result = StepResult(tokens, [None] * len(made), started, seconds)
        watch.observe(unit, step, result)
        return watch.ran[-1]

    first = ran(prefill(2, 40), [0], 1.0, 0.02)
    assert first.waited  # nothing was before it
    assert first.expected(TIMES) == 0.010
    assert not ran(prefill(3, 10), [0], 1.02, 0.02).waited
    both = ran(decode(8, 2, 3), [3, 8], 1.5, 0.1)
    assert both.waited
    # The first ended after 3 tokens, at 43; the other is at 18.
    assert (both.sequences, both.rounds, both.context) == (2, 8, 43 - 4)
    assert both.expected(TIMES) == pytest.approx(8 * (0.002 + 0.002 * 38 / 100))


def decoded(seconds: float, rounds: int = 1) -> ExecutedStep:
    return ExecutedStep("m", None, 1, rounds, 1, seconds, waited=False)


def test_a_few_steps_that_were_held_up_do_not_count() -> None:
    steps = [decoded(0.0022) for _ in range(38)]
    assert in_service.slowness([*steps, decoded(0.5), decoded(0.0001)], TIMES) == pytest.approx(1.1)
    with pytest.raises(BenchError, match="only 9 steps"):
        in_service.slowness(steps[:9], TIMES)


def test_each_bucket_has_a_factor_of_its_own() -> None:
    ran = [decoded(0.0018) for _ in range(10)] + [
        ExecutedStep("m", [(9, 9, True)], 0, 0, 0, 0.01, False)
    ]
    assert in_service._factor(("m", "decode", 8), ran, TIMES) == pytest.approx(0.9)
    assert in_service._factor(("m", "decode", 16), ran, TIMES) == pytest.approx(0.9)  # not seen
    with pytest.raises(BenchError, match="only 1 steps"):
        in_service._factor(("m", "prefill", 64), ran, TIMES)
