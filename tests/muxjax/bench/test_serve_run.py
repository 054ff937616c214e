"""Runs of `muxjax bench serve` on a session of tiny models, and their report."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from muxjax.bench import serve_run
from muxjax.bench.compare import PolicyRun
from muxjax.bench.replay import Replay
from muxjax.bench.serve_run import build_report, run_policies
from muxjax.bench.session import BenchSession
from muxjax.bench.workloads import WorkloadOptions
from muxjax.placement.simulator.metrics import AttainmentCriterion
from muxjax.placement.workload.trace import TraceRequest

WORKLOAD = [TraceRequest(0.0, "llama", 3, 2), TraceRequest(0.01, "qwen3", 4, 3)]
TARGETS = {
    name: AttainmentCriterion.from_targets(scale=1000.0, kind=name) for name in ("llama", "qwen3")
}


def run(session: BenchSession, output: Path | None) -> Any:
    return run_policies(
        session, WORKLOAD, None, ["adbs", "fcfs"], TARGETS, 2, seed=0, output=output, timeline=None
    )


def test_runs_are_reported_and_their_records_are_written(
    session: BenchSession, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "out"
    runs, isolated = run(session, folder)
    assert [(result.policy, result.round) for result in runs] == [
        ("adbs", 0),
        ("fcfs", 0),
        ("adbs", 1),
        ("fcfs", 1),
    ]
    assert {path.name for path in folder.iterdir()} == {
        f"requests-{policy}-r{number}.csv" for policy in ("adbs", "fcfs") for number in (1, 2)
    }
    with (folder / "requests-adbs-r1.csv").open(newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["llama", "qwen3"]

    options = WorkloadOptions(rate=40.0, seed=5)
    report = build_report(
        Path("fleet.yaml"), ["adbs", "fcfs"], 2, options, TARGETS, WORKLOAD, isolated, runs
    )
    assert (report["kind"], report["fleet"], report["rounds"]) == ("serve", "fleet.yaml", 2)
    assert report["workload"]["offered"] == len(WORKLOAD)
    assert (report["workload"]["rate"], report["workload"]["seed"]) == (40.0, 5)
    assert [(result["policy"], result["round"]) for result in report["runs"]] == [
        ("adbs", 1),
        ("fcfs", 1),
        ("adbs", 2),
        ("fcfs", 2),
    ]
    assert report["medians"].keys() == {"adbs", "fcfs"}
    assert report["isolated"] == isolated.rows


def test_an_interrupted_run_is_reported_on_standard_error(
    session: BenchSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted = PolicyRun("fcfs", 1, {}, Replay([], 1.0, interrupted=3))
    monkeypatch.setattr(serve_run, "compare", lambda *_, **__: [interrupted])
    runs, _ = run(session, None)
    assert runs == [interrupted]
    message = "interrupted in round 2 of fcfs, with 3 requests unfinished"
    assert message in capsys.readouterr().err
