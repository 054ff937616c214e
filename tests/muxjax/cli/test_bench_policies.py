"""`muxjax bench policies` and `muxjax bench predict`, with given measurements."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from muxjax.bench import policies, predict
from muxjax.bench.policies import KEYS, PolicyGrid
from muxjax.bench.predict import TOLERANCES, PredictionOptions, ReplayPair, summary_row
from muxjax.bench.session import BenchSession
from muxjax.placement.simulator.records import RequestRecord
from tests.muxjax.cli.bench_cli import BenchCli

GRID = ["--policies", "slo,adbs", "--against", "adbs", "--alpha", "0.7", "--load", "1"]


def completed_round(seed: int, slo: float) -> dict[str, Any]:
    """A round in which `slo` has this value of every metric, and `adbs` has 1."""
    metrics = {"slo": dict.fromkeys(KEYS, slo), "adbs": dict.fromkeys(KEYS, 1.0)}
    cell = {"alpha": 0.7, "load": 1.0, "rate": 5.0, "requests": 9, "policies": metrics}
    return {"seed": seed, "slo_scale": 8.0, "simulated": False, "cells": [cell]}


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[PolicyGrid]:
    """The grids that are run; `slo` has 2 in the first round, and 1 more in each further round."""
    seen: list[PolicyGrid] = []

    def run_rounds(session: BenchSession, grid: PolicyGrid) -> Iterator[dict[str, Any]]:
        seen.append(grid)
        for number in range(grid.rounds):
            yield completed_round(grid.seed + number, 2.0 + number)

    monkeypatch.setattr(policies, "run_rounds", run_rounds)
    return seen


def test_policies_reports_ratios_over_all_rounds(run: BenchCli, grids: list[PolicyGrid]) -> None:
    options = ["--rounds", 3, "--seed", 4, "--duration", 2, "--slo-scale", 5, "--json"]
    report = json.loads(run.succeed("bench", "policies", run.fleet, *GRID, *options))
    assert report["ratios"] == {"alpha 0.7, load 1": 3.0}
    assert [row["policy"] for row in report["rows"]] == ["slo", "adbs"]
    assert [completed["seed"] for completed in report["rounds"]] == [4, 5, 6]
    assert grids == [
        PolicyGrid(
            ("slo", "adbs"),
            ("adbs",),
            alphas=(0.7,),
            loads=(1.0,),
            slo_scale=5.0,
            seconds=2.0,
            rounds=3,
            seed=4,
        )
    ]


def test_policies_adds_rounds_to_a_file(run: BenchCli, grids: list[PolicyGrid]) -> None:
    rounds = run.folder / "rounds.jsonl"
    arguments = ["bench", "policies", run.fleet, *GRID, "-o", rounds, "--json"]
    run.succeed(*arguments, "--rounds", 2)
    report = json.loads(run.succeed(*arguments, "--rounds", 1, "--seed", 7))
    assert len(rounds.read_text().splitlines()) == 3
    assert [completed["seed"] for completed in report["rounds"]] == [0, 1, 7]
    report = json.loads(run.succeed(*arguments, "--rounds", 0))
    assert len(report["rounds"]) == 3
    assert len(grids) == 2


def test_policies_keeps_complete_rounds_after_an_interrupt(
    run: BenchCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_rounds(session: BenchSession, grid: PolicyGrid) -> Iterator[dict[str, Any]]:
        yield completed_round(0, 2.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(policies, "run_rounds", run_rounds)
    status, out, err = run("bench", "policies", run.fleet, *GRID)
    assert status == 0
    assert "1 rounds; slo against the best of adbs" in out
    assert "interrupted; complete rounds are reported" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "best"], "--policies: no 'best'"),
        (["--against", "fcfs"], "--against fcfs is not in --policies"),
        (["--alpha", "x"], "--alpha takes comma-separated numbers"),
        (["--reference", "best"], "no policy 'best'"),
    ],
)
def test_policies_rejects_invalid_options(
    run: BenchCli, arguments: list[str], message: str
) -> None:
    assert message in run.fail("bench", "policies", run.fleet, *arguments)


def replay_pair(simulated_ttft: float) -> ReplayPair:
    """A replay with a time to first token of 1 s, and its simulation."""

    def records(ttft: float) -> list[RequestRecord]:
        return [RequestRecord(0, "llama", "unit", "finished", 0.0, 1, 2, 2, ttft, 10.0)]

    return ReplayPair(records(1.0), records(simulated_ttft), 1.0, 1.0, [1.0] * 4, 3.0, 3.0)


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[PredictionOptions]]:
    """Sets the simulated times to first token; returns the options of the rounds that are run."""

    def set_ttft(simulated_ttft: float) -> list[PredictionOptions]:
        seen: list[PredictionOptions] = []

        def run_round(
            session: BenchSession, options: PredictionOptions, number: int
        ) -> Iterator[dict[str, Any]]:
            seen.append(options)
            for name in options.workloads:
                yield summary_row(number, name, [replay_pair(simulated_ttft)], 0)

        monkeypatch.setattr(predict, "run_round", run_round)
        return seen

    return set_ttft


def test_predict_succeeds_within_the_limits(
    run: BenchCli, predicted: Callable[[float], list[PredictionOptions]]
) -> None:
    seen = predicted(1.2)
    options = ["--workload", "overload", "--rounds", 2, "--fixed", "--seed", 3, "--json"]
    report = json.loads(run.succeed("bench", "predict", run.fleet, *options))
    assert report["limits"] == TOLERANCES
    assert [(row["round"], row["workload"]) for row in report["rows"]] == [
        (1, "overload"),
        (2, "overload"),
    ]
    assert report["medians"]["overload"]["ttft_p50"] == pytest.approx(1.2)
    assert (
        seen == [PredictionOptions(workloads=("overload",), rounds=2, fixed_speed=True, seed=3)] * 2
    )


def test_predict_exits_with_1_outside_the_limits(
    run: BenchCli, predicted: Callable[[float], list[PredictionOptions]]
) -> None:
    seen = predicted(1.5)
    status, out, _ = run("bench", "predict", run.fleet)
    assert status == 1
    assert "simulated / real" in out
    assert seen[0].workloads == tuple(predict.WORKLOADS)


def test_predict_rejects_unknown_names(run: BenchCli) -> None:
    assert "--workload: no 'lull'" in run.fail("bench", "predict", run.fleet, "--workload", "lull")
    assert "no policy 'best'" in run.fail("bench", "predict", run.fleet, "--policy", "best")
