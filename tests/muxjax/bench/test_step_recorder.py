"""Factors of steps in service, from prescribed steps."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest

from muxjax.bench import step_recorder
from muxjax.bench.replay import Replay
from muxjax.bench.session import BenchSession
from muxjax.bench.step_recorder import ExecutedStep, StepRecorder
from muxjax.bench.steps import Bucket, StepMeasurement, Timed
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


def test_steps_of_an_engine_are_recorded() -> None:
    recorder = StepRecorder()
    spec = ModelSpec("m", 1, 16, 256, BucketLimits(8, 64, 8, 8))
    unit = Scheduler([spec], 100, create_policy("adbs"))

    def record(
        step: Prefill | Decode, counts: list[int], started: float, seconds: float
    ) -> ExecutedStep:
        tokens = [[0] * count for count in counts]
        result = StepResult(tokens, [None] * len(counts), started, seconds)
        recorder.observe(unit, step, result)
        return recorder.ran[-1]

    first = record(prefill(2, 40), [0], 1.0, 0.02)
    assert first.waited  # no step precedes it
    assert first.expected(TIMES) == 0.010
    assert not record(prefill(3, 10), [0], 1.02, 0.02).waited
    both = record(decode(8, 2, 3), [3, 8], 1.5, 0.1)
    assert both.waited
    # The first sequence ends after 3 tokens, at 43; the other one is at 18.
    assert (both.sequences, both.rounds, both.context) == (2, 8, 43 - 4)
    assert both.expected(TIMES) == pytest.approx(8 * (0.002 + 0.002 * 38 / 100))


def decoded(seconds: float, rounds: int = 1) -> ExecutedStep:
    return ExecutedStep("m", None, 1, rounds, 1, seconds, waited=False)


def test_outliers_are_discarded() -> None:
    steps = [decoded(0.0022) for _ in range(38)]
    assert step_recorder.slowness([*steps, decoded(0.5), decoded(0.0001)], TIMES) == pytest.approx(
        1.1
    )
    with pytest.raises(BenchError, match="only 9 steps"):
        step_recorder.slowness(steps[:9], TIMES)


class MeasuredSteps(StepMeasurement):
    """A measurement with the step times `TIMES`."""

    def times(self, model: str) -> StepTimes:
        return TIMES[model]


def in_buckets(*buckets: Bucket) -> MeasuredSteps:
    return MeasuredSteps([Timed(*bucket, 1, 1, True, (0.002,)) for bucket in buckets])


@pytest.fixture
def ten_decodes(monkeypatch: pytest.MonkeyPatch) -> BenchSession:
    """A session whose mixed runs are a prefill and ten decodes, at 0.9 of their expected time."""
    session = Mock(spec=BenchSession)
    session.models = {"m": SimpleNamespace(config=SimpleNamespace(vocab_size=9), max_model_len=64)}
    session.engine = MagicMock()
    engine = session.engine.return_value.__enter__.return_value
    unit = Scheduler(
        [ModelSpec("m", 1, 16, 256, BucketLimits(8, 64, 8, 8))], 100, create_policy("adbs")
    )

    def run_steps(*arguments: object) -> Replay:
        (observe,), _ = engine.observe.call_args
        observe(unit, prefill(0, 9), StepResult([[0]], [None], 0.0, 0.009))
        for index in range(10):
            started = 0.009 + index * 0.0036
            result = StepResult([[0, 0]], [None], started, 0.0036)
            observe(unit, decode(2, 1 + index), result)
        return Replay([], 1.0)

    def measure(*arguments: object, after_round: Callable[[], None], **kwargs: object) -> None:
        after_round()

    monkeypatch.setattr(step_recorder, "replay", run_steps)
    monkeypatch.setattr(step_recorder, "measure", measure)
    return session


def test_buckets_without_steps_have_the_factor_of_the_phase(ten_decodes: BenchSession) -> None:
    seen, unseen = ("m", "decode", 8), ("m", "decode", 16)
    measured = step_recorder.measure_in_service(ten_decodes, into=in_buckets(seen, unseen))
    assert measured.in_service == pytest.approx({seen: 0.9, unseen: 0.9})


def test_a_phase_with_few_steps_is_an_error(ten_decodes: BenchSession) -> None:
    # Steps after an idle time are not counted.
    with pytest.raises(BenchError, match="only 0 steps"):
        step_recorder.measure_in_service(ten_decodes, into=in_buckets(("m", "prefill", 64)))
