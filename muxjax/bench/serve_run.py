"""Runs of `muxjax bench serve`: every policy on one workload, with progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from muxjax.bench.compare import OnRecord, PolicyRun, compare, medians
from muxjax.bench.isolated import IsolatedLatency, measure_isolated
from muxjax.bench.machine import describe_machine
from muxjax.bench.session import BenchSession
from muxjax.bench.workloads import WorkloadOptions
from muxjax.placement.simulator.metrics import AttainmentCriterion
from muxjax.placement.workload.trace import TraceRequest
from muxjax.progress import Bars
from muxjax.scheduling.timeline import Timeline


def run_policies(
    session: BenchSession,
    workload: Sequence[TraceRequest],
    rates: Mapping[str, float] | None,
    policies: Sequence[str],
    targets: Mapping[str, AttainmentCriterion],
    rounds: int,
    seed: int,
    output: Path | None,
    timeline: Timeline | None,
) -> tuple[list[PolicyRun], IsolatedLatency]:
    """Measures isolated latencies, then runs all policies, with a progress bar for each."""
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    with Bars({"isolated requests": 1}, show=True) as bars:
        isolated = measure_isolated(session, workload)
        bars.advance("isolated requests", 1, "")

    @contextmanager
    def records(policy: str, number: int) -> Iterator[OnRecord | None]:
        if output is None:
            yield None
            return
        from muxjax.bench.report.saved import record_file

        with record_file(output / f"requests-{policy}-r{number + 1}.csv") as write:
            yield write

    totals = {policy: rounds * len(workload) for policy in policies}
    with Bars(totals, show=True) as bars:
        runs = compare(
            session,
            workload,
            policies,
            targets,
            isolated,
            rates=rates,
            rounds=rounds,
            seed=seed,
            on_record=records,
            progress=lambda policy, number, ended: bars.advance(
                policy, ended, f"round {number + 1}"
            ),
            timeline=timeline,
        )
    if runs and runs[-1].replay.interrupted:
        last = runs[-1]
        sys.stderr.write(
            f"muxjax: interrupted in round {last.round + 1} of {last.policy}, with "
            f"{last.replay.interrupted} requests unfinished; medians are of complete runs\n"
        )
    return runs, isolated


def build_report(
    fleet_file: Path,
    policies: Sequence[str],
    rounds: int,
    options: WorkloadOptions,
    targets: Mapping[str, AttainmentCriterion],
    workload: Sequence[TraceRequest],
    isolated: IsolatedLatency,
    runs: Sequence[PolicyRun],
) -> dict[str, Any]:
    """Returns the result of `bench serve`: settings, medians over the runs, and all runs."""
    return {
        "kind": "serve",
        **describe_machine(),
        "fleet": str(fleet_file),
        "policies": list(policies),
        "rounds": rounds,
        "workload": {**asdict(options), "offered": len(workload)},
        "targets": {name: target.to_json() for name, target in targets.items()},
        "isolated": isolated.rows,
        "medians": medians(runs, policies),
        "runs": [{"policy": run.policy, "round": run.round + 1, **run.metrics} for run in runs],
    }
