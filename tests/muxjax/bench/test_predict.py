"""Summaries of replays and their simulations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from muxjax.bench import predict
from muxjax.bench.predict import (
    PredictionOptions,
    ReplayPair,
    run_statistics,
    split_quarters,
    summary_row,
)
from muxjax.bench.session import BenchSession
from muxjax.bench.step_recorder import ExecutedStep
from muxjax.placement.simulator.records import RequestRecord


def records(*ttfts: float) -> list[RequestRecord]:
    """Requests that arrive at the start and end after 10 s."""
    return [
        RequestRecord(index, "m", "unit", "finished", 0.0, 1, 2, 2, ttft, 10.0)
        for index, ttft in enumerate(ttfts)
    ]


def pair(before: float, after: float, *, simulated: float = 1.0, real: float = 1.0) -> ReplayPair:
    quarters = [before] * 4
    return ReplayPair(
        records(real), records(simulated), before, after, quarters, expected=3.0, measured=2.0
    )


def test_a_replay_is_steady_if_its_speeds_are_close() -> None:
    assert pair(1.0, 1.1).steady
    assert not pair(1.0, 1.2).steady
    assert not replace(pair(1.0, 1.0), quarters=[1.0, 1.0, 1.2, 1.0]).steady


def test_quarters_have_similar_durations() -> None:
    ran = [
        ExecutedStep("m", None, 1, 1, 1.0, seconds, waited=False)
        for seconds in (4, 1, 1, 1, 1, 4, 4)
    ]
    assert [[step.seconds for step in part] for part in split_quarters(ran)] == [
        [],
        [4, 1, 1, 1],
        [1],
        [4, 4],
    ]


def test_percentiles_are_over_all_replays() -> None:
    statistics = run_statistics([records(0.1, 0.2), records(0.3)])
    assert statistics["ttft_p50"] == pytest.approx(0.2)
    assert statistics["throughput"] == pytest.approx((0.2 + 0.1) / 2)
    assert statistics["latency_p99"] == 10.0


def test_a_row_reports_whether_the_limits_are_met() -> None:
    row = summary_row(0, "w", [pair(1.0, 1.0, simulated=1.2), pair(1.0, 1.1, simulated=1.2)], 1)
    assert row["ratio"]["ttft_p99"] == pytest.approx(1.2)
    assert row["within"]
    assert (row["unsteady"], row["requests"], row["steps"]) == (1, 2, 1.5)
    assert row["slowdown"] == pytest.approx([1.0, 1.05])
    assert not summary_row(0, "w", [pair(1.0, 1.0, simulated=1.3)], 0)["within"]


class FakeBench:
    """Has prescribed speeds; records the arguments of each run."""

    def __init__(self, speeds: list[float]) -> None:
        self._speeds = iter(speeds)
        self.before: list[float] = []
        self.seeds: list[int] = []

    def speed(self) -> float:
        return next(self._speeds)

    def run(self, workload: dict[str, Any], seed: int, before: float) -> ReplayPair:
        self.before.append(before)
        self.seeds.append(seed)
        return pair(before, self.speed())


@pytest.mark.parametrize(
    ("speeds", "kept", "unsteady"),
    [
        ([1.0, 1.0, 1.05], 2, 0),
        ([1.0, 1.5, 1.5, 1.5], 2, 1),  # slows down in the first replay
        ([1.0, 1.5, 1.0, 1.5, 1.0], 2, 2),  # never steady: the number of repeats is limited
    ],
)
def test_an_unsteady_replay_is_repeated(
    session: BenchSession,
    monkeypatch: pytest.MonkeyPatch,
    speeds: list[float],
    kept: int,
    unsteady: int,
) -> None:
    bench = FakeBench(speeds)
    monkeypatch.setattr(predict, "PredictionBench", lambda session, options: bench)
    options = PredictionOptions(workloads=("overload",), replays=2, seed=7)
    (row,) = predict.run_round(session, options, 1)
    assert (len(row["replays"]), row["unsteady"]) == (kept, unsteady)
    assert bench.before == speeds[:-1]
    assert bench.seeds[0] == 107
    assert bench.seeds[-1] == 108
