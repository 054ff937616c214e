"""`muxjax bench serve`: runs policies in turn on the real engine, in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muxjax.cli.options import (
    WORKLOAD_PANEL,
    ArrivalOptions,
    AsJson,
    FleetFile,
    ModelMap,
    OutputFolder,
    SloOptions,
    Trace,
    parse_choices,
    parse_model_map,
    parse_numbers,
    register_command,
)
from muxjax.cli.trace import recorded_timeline
from muxjax.errors import BenchError

if TYPE_CHECKING:
    from muxjax.bench.compare import PolicyRun
    from muxjax.bench.isolated import IsolatedLatency
    from muxjax.bench.session import BenchSession
    from muxjax.bench.workloads import WorkloadOptions
    from muxjax.placement.simulator.metrics import AttainmentCriterion
    from muxjax.placement.workload.trace import TraceRequest
    from muxjax.scheduling.timeline import Timeline


@dataclass(frozen=True)
class ServeLengthOptions:
    """Length and token counts of a workload, for `bench serve`."""

    duration: Annotated[
        float | None,
        typer.Option(
            help="Length of the workload in seconds; 30 if it has no other end.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    prompt_tokens: Annotated[
        float | None,
        typer.Option(
            help="Mean prompt tokens of all models. By default as in the fleet file.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    output_tokens: Annotated[
        float | None,
        typer.Option(
            help="Mean output tokens of all models. By default as in the fleet file.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    sigma: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the logarithms of the lengths; 0 makes all lengths equal. "
            "By default as in ShareGPT.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None


def register(app: typer.Typer) -> None:
    """Adds the command."""
    register_command(app, serve)


def serve(
    fleet_file: FleetFile,
    workload: ArrivalOptions,
    lengths: ServeLengthOptions,
    slo: SloOptions,
    policy: Annotated[
        str | None,
        typer.Option(help="Policies, separated by commas. By default the fleet file's policy."),
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Runs of each policy; policies take turns: A B A B.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the workload and of the prompts.")] = 0,
    rename: ModelMap = None,
    trace: Trace = None,
    output: OutputFolder = None,
    as_json: AsJson = False,
) -> None:
    """Replay a workload on the real engine with each policy in turn, on one pool.

    Models are loaded and compiled once. Ctrl-C keeps complete runs, and the finished requests of
    the current one.
    """
    from muxjax.bench.workloads import WorkloadOptions
    from muxjax.config.fleet_file import load_fleet_config
    from muxjax.scheduling.specs import DEFAULT_SCALE

    config = load_fleet_config(fleet_file)
    policies = _parse_policies(policy, config.policy)
    if rounds < 1:
        raise BenchError(f"--rounds must be at least 1, not {rounds}")
    for option, value in (
        ("--slo-scale", slo.scale),
        ("--slo-ttft", slo.ttft),
        ("--slo-tpot", slo.tpot),
    ):
        if value is not None and not value > 0:
            raise BenchError(f"{option} must be above 0, not {value}")
    options = WorkloadOptions(
        kind=workload.workload,
        seconds=lengths.duration,
        requests=workload.requests,
        alpha=workload.alpha,
        rate=workload.rate,
        cv=workload.cv,
        on_off=workload.parsed_on_off(),
        change_points=parse_numbers(workload.change_points, "--change-points"),
        prompt_tokens=lengths.prompt_tokens,
        output_tokens=lengths.output_tokens,
        sigma=lengths.sigma,
        seed=seed,
    )
    scale = DEFAULT_SCALE if slo.is_default else slo.scale

    from muxjax.bench.session import BenchSession
    from muxjax.bench.workloads import KINDS, build_workload, fleet_rates
    from muxjax.placement.simulator.metrics import AttainmentCriterion

    with BenchSession.load(config) as session:
        limits = {name: model.max_model_len for name, model in session.models.items()}
        source = build_workload(session.config, limits, options, parse_model_map(rename))
        # The rates of a trace are unknown in advance; the scheduler uses those of the fleet file.
        rates = fleet_rates(session.config, options) if options.kind in KINDS else None
        targets = {
            name: AttainmentCriterion.from_targets(slo.ttft, slo.tpot, scale, kind=name)
            for name in session.models
        }
        with recorded_timeline(trace) as timeline:
            runs, isolated = _run(
                session, source, rates, policies, targets, rounds, seed, output, timeline
            )
    report = _report(fleet_file, policies, rounds, options, targets, source, isolated, runs)
    if output is not None:
        from muxjax.bench.report.saved import save

        save(report, output / "serve.json")
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        from muxjax.bench.report.tables import show_serve

        show_serve(report)


def _run(
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
    from muxjax.bench.compare import OnRecord, compare
    from muxjax.bench.isolated import measure_isolated
    from muxjax.progress import Bars

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
        print(
            f"muxjax: interrupted in round {last.round + 1} of {last.policy}, with "
            f"{last.replay.interrupted} requests unfinished; medians are of complete runs",
            file=sys.stderr,
        )
    return runs, isolated


def _report(
    fleet_file: Path,
    policies: Sequence[str],
    rounds: int,
    options: WorkloadOptions,
    targets: Mapping[str, AttainmentCriterion],
    workload: Sequence[TraceRequest],
    isolated: IsolatedLatency,
    runs: Sequence[PolicyRun],
) -> dict[str, Any]:
    from dataclasses import asdict

    from muxjax.bench.compare import medians
    from muxjax.bench.machine import describe_machine

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


def _parse_policies(text: str | None, default: str) -> list[str]:
    """The policies of `--policy`, or the default."""
    from muxjax.scheduling.policies.registry import policy_names

    if text is None:
        return [default]
    return list(parse_choices(text, "--policy", policy_names()))
