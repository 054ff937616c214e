"""`muxjax bench serve`: runs policies in turn on the real engine, in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

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
from muxjax.errors import BenchError


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
        typer.Option(
            help="Policies, separated by commas. By default the policy of the fleet file."
        ),
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

    from muxjax.bench.serve_run import build_report, run_policies
    from muxjax.bench.session import BenchSession
    from muxjax.bench.workloads import KINDS, build_workload, fleet_rates
    from muxjax.placement.simulator.metrics import AttainmentCriterion
    from muxjax.scheduling.timeline import recorded_timeline

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
            runs, isolated = run_policies(
                session, source, rates, policies, targets, rounds, seed, output, timeline
            )
    report = build_report(fleet_file, policies, rounds, options, targets, source, isolated, runs)
    if output is not None:
        from muxjax.bench.report.saved import save

        save(report, output / "serve.json")
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        from muxjax.bench.report.tables import show_serve

        show_serve(report)


def _parse_policies(text: str | None, default: str) -> list[str]:
    """Returns the policies of `--policy`, or the default."""
    from muxjax.scheduling.policies.registry import policy_names

    if text is None:
        return [default]
    return list(parse_choices(text, "--policy", policy_names()))
