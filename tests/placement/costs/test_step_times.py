"""Measured step times: buckets, contexts, and the format in a profile."""

from __future__ import annotations

from typing import Any

import pytest

from muxjax.errors import ProfileError
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.costs.step_times import DecodeTimes, PrefillTimes, StepTimes, interpolate
from muxjax.placement.simulator.simulated_executor import SimulatedExecutor, SimulatedModel
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.steps import Decode, DecodeSequence, Prefill, PrefillChunk
from tests.placement.simple_costs import SimpleCosts

TIMES = StepTimes(
    prefill={
        16: PrefillTimes(0.010, ((16, 0.001), (100, 0.002)), 0.003),
        64: PrefillTimes(0.030, ((64, 0.004),), 0.003),
    },
    decode={
        1: DecodeTimes(0.001, ((10, 0.010),)),
        8: DecodeTimes(0.001, ((10, 0.020), (110, 0.030))),
    },
)


def test_a_prefill_is_padded_to_its_bucket() -> None:
    last = TIMES.prefill_seconds([(3, 3, True)])
    assert last == pytest.approx(0.010 + 0.001 + 0.003)
    assert TIMES.prefill_seconds([(16, 16, True)]) == last
    two = TIMES.prefill_seconds([(16, 16, True), (1, 500, False)])
    assert two == pytest.approx(0.030 + 2 * 0.004 + 0.003)
    with pytest.raises(ValueError, match="65 is larger than the largest measured bucket"):
        TIMES.prefill_seconds([(65, 65, True)])


def test_a_decode_depends_on_its_bucket_and_the_longest_context() -> None:
    assert TIMES.decode_seconds(1, 4, 500) == pytest.approx(0.041)
    assert TIMES.decode_seconds(2, 1, 60) == pytest.approx(0.026)


def test_scaling_multiplies_all_times() -> None:
    slow = TIMES.scaled(2.0)
    chunks = [(3, 3, True)]
    assert slow.prefill_seconds(chunks) == pytest.approx(2 * TIMES.prefill_seconds(chunks))
    assert slow.decode_seconds(2, 4, 60) == pytest.approx(2 * TIMES.decode_seconds(2, 4, 60))


def test_interpolation_between_and_beyond_points() -> None:
    curve = ((10.0, 2.0), (20.0, 3.0))
    assert [interpolate(curve, x) for x in (1, 10, 15, 20, 30)] == [2.0, 2.0, 2.5, 3.0, 4.0]
    falling = ((10.0, 3.0), (20.0, 2.0))
    assert interpolate(falling, 40) == pytest.approx(2.0)  # never below the last point


def test_a_profile_stores_step_times() -> None:
    cells = {"1": {"16": {"prefill": 5, "decoding": 1}}}
    table = ProfileTable(
        {"m": {"1": {"100": cells}}, "_steps": {"m": TIMES.to_json()}},
    )
    loaded = table.step_times["m"]
    assert loaded.prefill_seconds([(20, 90, True)]) == pytest.approx(
        TIMES.prefill_seconds([(20, 90, True)])
    )
    assert loaded.decode_seconds(2, 3, 60) == pytest.approx(TIMES.decode_seconds(2, 3, 60))
    assert "_steps" not in table.raw
    assert ProfileTable({"m": {"1": {"100": cells}}}).step_times == {}


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {"m": {}},
        {"m": {**TIMES.to_json(), "decode": {}}},
        {"m": {**TIMES.to_json(), "prefill": {"16": {"base_ms": "fast"}}}},
        {"m": {**TIMES.to_json(), "decode": None}},
        {
            "m": {
                **TIMES.to_json(),
                "decode": {"1": {"base_ms": 1, "token_ms": [[9, 1], [2, 1]]}},
            }
        },
    ],
)
def test_invalid_step_times_raise(broken: Any) -> None:
    cells = {"1": {"16": {"prefill": 5, "decoding": 1}}}
    with pytest.raises(ProfileError, match=r"_steps|bench steps"):
        ProfileTable({"m": {"1": {"100": cells}}, "_steps": broken})


def test_the_simulated_executor_uses_step_times() -> None:
    models = {"m": SimulatedModel("m", max_seqs=4, times=TIMES)}
    executor = SimulatedExecutor(models, SimpleCosts(), "time_sliced")
    chunk = PrefillChunk(0, 2, (1,) * 12, 0, 12, [0], 1, SamplingParams(), 9)
    result = executor.result(executor.submit(Prefill("m", [chunk])))
    assert result.seconds == pytest.approx(TIMES.prefill_seconds([(12, 12, True)]))
    step = Decode("m", [DecodeSequence(0, 2, [0], 1, 4)], 4)
    result = executor.result(executor.submit(step))
    assert result.seconds == pytest.approx(TIMES.decode_seconds(1, 4, 14))
    assert [len(tokens) for tokens in result.tokens] == [4]


def test_a_step_has_a_minimum_duration() -> None:
    times = StepTimes(
        {16: PrefillTimes(0.0, ((16, 0.0),), 0.0)}, {1: DecodeTimes(0.0, ((1, 0.0),))}
    )
    assert times.prefill_seconds([(1, 1, True)]) > 0
    assert times.decode_seconds(1, 2, 5) > 0


def test_unknown_keys_raise() -> None:
    entry = {**TIMES.to_json(), "engine": {"prefill": {"stretch": 1.1, "host_ms": 2.0}}}
    with pytest.raises(ProfileError, match=r"unknown keys engine.*measure them again"):
        StepTimes.from_json(entry, "chat")
