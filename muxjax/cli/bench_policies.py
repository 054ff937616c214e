"""`muxjax bench policies` and `muxjax bench predict`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from muxjax.cli.options import (
    OUTPUT_PANEL,
    WORKLOAD_PANEL,
    AsJson,
    FleetFile,
    parse_choices,
    parse_numbers,
    register_command,
)
from muxjax.errors import BenchError

RUN = "Run"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    register_command(app, policies)
    register_command(app, predict)


@dataclass(frozen=True)
class GridOptions:
    """Options of the grid of `bench policies`."""

    policies: Annotated[
        str, typer.Option(help="Policies to compare, separated by commas.", rich_help_panel=RUN)
    ] = "slo,static,temporal,mutex,adbs"
    against: Annotated[
        str,
        typer.Option(
            help="Baselines: the first policy is compared with the best of them.",
            rich_help_panel=RUN,
        ),
    ] = "static,temporal"
    reference: Annotated[
        str,
        typer.Option(help="Policy that measures the saturating rate.", rich_help_panel=RUN),
    ] = "adbs"
    rounds: Annotated[int, typer.Option(help="Runs of the grid.", rich_help_panel=RUN)] = 5
    simulated: Annotated[
        bool,
        typer.Option(help="Measure steps once and simulate the rest.", rich_help_panel=RUN),
    ] = False
    alpha: Annotated[
        str,
        typer.Option(
            help="Exponents of the models' popularity, separated by commas.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = "2.1,0.7"
    load: Annotated[
        str,
        typer.Option(
            help="Rates, as fractions of the saturating rate.", rich_help_panel=WORKLOAD_PANEL
        ),
    ] = "0.5,0.75,1,1.25"
    slo_scale: Annotated[
        float,
        typer.Option(
            help="Allowed latency, as a multiple of the isolated latency.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = 8.0
    duration: Annotated[
        float,
        typer.Option(help="Seconds of each workload.", rich_help_panel=WORKLOAD_PANEL),
    ] = 10.0
    seed: Annotated[
        int, typer.Option(help="Seed of the first round.", rich_help_panel=WORKLOAD_PANEL)
    ] = 0


def policies(
    fleet_file: FleetFile,
    grid: GridOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Add rounds to this file (JSON lines), and report all rounds in it.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare policies on the real engine over popularity skews and loads.

    Ctrl-C keeps complete rounds.
    """
    from muxjax.bench.policies import (
        PolicyGrid,
        read_rounds,
        run_rounds,
        summarize_rounds,
        table_rows,
    )
    from muxjax.bench.session import BenchSession
    from muxjax.config.fleet_file import load_fleet_config
    from muxjax.scheduling.policies.registry import policy_names

    config = load_fleet_config(fleet_file)
    known = policy_names()
    settings = PolicyGrid(
        policies=parse_choices(grid.policies, "--policies", known),
        against=parse_choices(grid.against, "--against", known),
        reference=grid.reference,
        alphas=parse_numbers(grid.alpha, "--alpha") or (),
        loads=parse_numbers(grid.load, "--load") or (),
        slo_scale=grid.slo_scale,
        seconds=grid.duration,
        rounds=grid.rounds,
        seed=grid.seed,
        simulated=grid.simulated,
    )
    rounds = read_rounds(output, settings)
    if settings.rounds:
        with BenchSession.load(config) as session:
            try:
                for completed in run_rounds(session, settings):
                    rounds.append(completed)
                    if output is not None:
                        with output.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(completed) + "\n")
            except KeyboardInterrupt:
                print("muxjax: interrupted; complete rounds are reported", file=sys.stderr)
    rows, ratios = summarize_rounds(rounds, settings)
    from muxjax.bench.machine import describe_machine
    from muxjax.bench.script_output import print_json, print_table

    if as_json:
        print_json({**describe_machine(), "rounds": rounds, "rows": rows, "ratios": ratios})
    elif rows:
        baselines = ", ".join(settings.against)
        title = f"{len(rounds)} rounds; {settings.policies[0]} against the best of {baselines}"
        title += ", simulated" * settings.simulated
        cells = table_rows(rows)
        print_table(title, tuple(cells[0]), cells, slo_scale=settings.slo_scale)


@dataclass(frozen=True)
class PredictOptions:
    """Options of the runs of `bench predict`."""

    policy: Annotated[str, typer.Option(help="The scheduling policy.", rich_help_panel=RUN)] = (
        "adbs"
    )
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a workload of the benchmark. May be repeated; by default all.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    duration: Annotated[
        float,
        typer.Option(help="Seconds of each workload.", rich_help_panel=WORKLOAD_PANEL),
    ] = 12.0
    seed: Annotated[
        int, typer.Option(help="Seed of the first replay.", rich_help_panel=WORKLOAD_PANEL)
    ] = 1
    rounds: Annotated[
        int,
        typer.Option(help="Runs of all workloads, each with a new profile.", rich_help_panel=RUN),
    ] = 1
    replays: Annotated[int, typer.Option(help="Replays of each workload.", rich_help_panel=RUN)] = 3
    repeats: Annotated[
        int, typer.Option(help="Measurements of each kind of step.", rich_help_panel=RUN)
    ] = 7
    fixed: Annotated[
        bool,
        typer.Option(
            help="Do not scale step times by the machine's current speed.", rich_help_panel=RUN
        ),
    ] = False


def predict(fleet_file: FleetFile, options: PredictOptions, as_json: AsJson = False) -> None:
    """Compare the simulator with the real engine on the same workloads.

    The exit status is 1 if a prediction is outside the limits. Ctrl-C keeps finished workloads.
    """
    from muxjax.bench.predict import (
        TOLERANCES,
        WORKLOADS,
        PredictionOptions,
        median_ratios,
        run_round,
        table_rows,
    )
    from muxjax.bench.session import BenchSession, check_policies
    from muxjax.config.fleet_file import load_fleet_config

    config = load_fleet_config(fleet_file)
    check_policies([options.policy])
    for name in options.workload or ():
        if name not in WORKLOADS:
            raise BenchError(f"--workload: no {name!r}; there are {'; '.join(WORKLOADS)}")
    settings = PredictionOptions(
        policy=options.policy,
        workloads=tuple(options.workload or WORKLOADS),
        seconds=options.duration,
        rounds=options.rounds,
        replays=options.replays,
        repeats=options.repeats,
        fixed_speed=options.fixed,
        seed=options.seed,
    )
    rows = []
    with BenchSession.load(config) as session:
        try:
            for number in range(settings.rounds):
                for row in run_round(session, settings, number):
                    rows.append(row)
        except KeyboardInterrupt:
            print("muxjax: interrupted; finished workloads are reported", file=sys.stderr)
    from muxjax.bench.machine import describe_machine
    from muxjax.bench.script_output import print_json, print_table

    if as_json:
        medians = median_ratios(rows)
        print_json({**describe_machine(), "limits": TOLERANCES, "rows": rows, "medians": medians})
    elif rows:
        cells = table_rows(rows)
        print_table("simulated / real", tuple(cells[0]), cells, policy=settings.policy)
    if any(not row["within"] for row in rows):
        raise typer.Exit(1)
