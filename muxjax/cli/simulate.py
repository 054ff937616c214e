"""`muxjax simulate`: simulates a plan under several policies and rates."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from muxjax.cli.options import (
    ArrivalOptions,
    AsJson,
    ModelMap,
    OutputFolder,
    SloOptions,
    Trace,
    register_command,
)
from muxjax.cli.simulate_options import PlanOptions, SimulateLengthOptions
from muxjax.errors import WorkloadError


def register(app: typer.Typer) -> None:
    """Adds the command."""
    register_command(app, simulate, panel="Plan and measure")


def simulate(
    plan_options: PlanOptions,
    workload: ArrivalOptions,
    lengths: SimulateLengthOptions,
    slo: SloOptions,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="PLAN|FLEET", help="A plan (JSON), or a fleet to plan first."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Policies, separated by commas: slo, adbs, fcfs, round_robin, static, temporal, "
            "spatial, mutex. By default the plan's policy."
        ),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of waiting requests of a model; more are rejected. By default "
            "there is no limit."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the workload. By default the plan's, as in its promise."),
    ] = None,
    rename: ModelMap = None,
    trace: Trace = None,
    output: OutputFolder = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a plan with the real scheduler on a simulated clock."""
    from rich.console import Console

    from muxjax.cli.plan_table import show_runs
    from muxjax.cli.simulate_run import (
        build_workload,
        check_limits,
        load_or_search_plan,
        parse_scales,
        parse_systems,
        run_policies,
        write_report,
    )
    from muxjax.placement.simulator.metrics import AttainmentCriterion
    from muxjax.placement.simulator.plan_costs import plan_costs, plan_criteria
    from muxjax.placement.simulator.simulated_units import SystemConfig
    from muxjax.placement.simulator.simulation import SimulationSetup, validate_scales
    from muxjax.scheduling.timeline import recorded_timeline

    scales = validate_scales(parse_scales(lengths.rate_scales, "--rate-scales"))
    execution = plan_options.execution
    if execution is not None:
        parse_systems(policy or SystemConfig.policy, execution)  # checked before a long search
    plan = load_or_search_plan(file, plan_options, seed or 0)
    seed = plan.seed if seed is None else seed
    promised = SystemConfig.policy if plan.simulation is None else plan.simulation.policy
    systems = parse_systems(policy or promised, execution or plan.execution)
    costs = plan_costs(plan)
    criterion = None
    if not slo.is_default:
        criterion = AttainmentCriterion.from_targets(slo.ttft, slo.tpot, slo.scale)
    targets = plan_criteria(plan, costs, criterion)
    check_limits(workload, lengths, max_waiting)
    settings: dict[str, Any] = {
        "workload": workload.workload,
        "seconds": lengths.seconds,
        "requests": workload.requests,
        "cv": workload.cv,
        "on_off": workload.on_off,
        "change_points": workload.change_points,
        "alpha": workload.alpha,
        "rate": workload.rate,
        "lengths": None if lengths.lengths is None else str(lengths.lengths),
        "map": rename,
    }
    source, trace_file = build_workload(plan, workload, lengths, rename, seed)
    last_arrival: float | None = None
    for request in source:  # reports a trace that is out of order before the first run
        last_arrival = request.arrival
    if last_arrival is None:
        raise WorkloadError("the workload has no requests: make it longer, or raise its rate")
    if trace_file is not None and trace_file.left_out:
        settings["left_out"] = trace_file.left_out
        print(
            f"muxjax: {trace_file.left_out} failed requests of {workload.workload} left out",
            file=sys.stderr,
        )
    setup = SimulationSetup(plan, costs, targets, max_waiting, seed, settings)
    # Without a limit on requests, a synthetic workload has the same length at any rate.
    fixed_length = trace_file is None and workload.requests is None
    with recorded_timeline(trace) as timeline:
        policies = run_policies(
            setup, systems, source, last_arrival, fixed_length, scales, output, timeline
        )
    report = {
        "seed": seed,
        "config_hash": policies[0]["config_hash"],
        "version": policies[0]["version"],
        "workload": settings,
        "targets": {name: target.to_json() for name, target in targets.items()},
        "policies": policies,
    }
    if output is not None:
        write_report(report, output)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    show_runs(policies, Console(width=None if sys.stdout.isatty() else 80))
