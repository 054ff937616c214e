"""What becomes of steps in service: worked out from steps that were made up."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest

from muxjax.bench import step_recorder as in_service
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

    def measure(*arguments: object, after_round: Callable[[], None], **more: object) -> None:
        after_round()

    monkeypatch.setattr(in_service, "replay", run_steps)
    monkeypatch.setattr(in_service, "measure", measure)
    return session


def test_each_bucket_has_a_factor_of_its_own(ten_decodes: BenchSession) -> None:
    seen, unseen = ("m", "decode", 8), ("m", "decode", 16)
    found = in_service.measure_in_service(ten_decodes, into=in_buckets(seen, unseen))
    assert found.in_service == pytest.approx({seen: 0.9, unseen: 0.9})


def test_a_phase_with_few_steps_has_no_factor(ten_decodes: BenchSession) -> None:
    with pytest.raises(BenchError, match="only 0 steps"):  # a step that waited does not count
        in_service.measure_in_service(ten_decodes, into=in_buckets(("m", "prefill", 64)))
