"""`muxjax bench policy-map`: compares `slo` with every baseline, simulated over a grid."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import typer

from muxjax.cli.options import (
    OUTPUT_PANEL,
    AsJson,
    parse_choices,
    parse_numbers,
    register_command,
)
from muxjax.errors import BenchError

GRID, RUN = "Grid", "Run"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    register_command(app, policy_map, name="policy-map")


@dataclass(frozen=True)
class MapOptions:
    """Options of the grid of `bench policy-map`."""

    hardware: Annotated[
        str,
        typer.Option(help="Devices: a100, h200 or v6e, separated by commas.", rich_help_panel=GRID),
    ] = "a100"
    execution: Annotated[
        str,
        typer.Option(
            help="How programs share a device: time_sliced or concurrent, separated by commas.",
            rich_help_panel=GRID,
        ),
    ] = "time_sliced,concurrent"
    alpha: Annotated[
        str,
        typer.Option(
            help="Exponents of the models' popularity, separated by commas.",
            rich_help_panel=GRID,
        ),
    ] = "0.7,0.9,1.3,1.7,2.1"
    load: Annotated[
        str,
        typer.Option(
            help="Rates of the most popular model, as fractions of 40 requests per second.",
            rich_help_panel=GRID,
        ),
    ] = "0.5,0.75,1,1.25"
    slo_scale: Annotated[
        str,
        typer.Option(
            help="Allowed latencies, as multiples of the isolated latency.", rich_help_panel=GRID
        ),
    ] = "2,4,8,16"
    policies: Annotated[
        str | None,
        typer.Option(
            help="Policies to compare, separated by commas; slo and adbs must be among them. By "
            "default all.",
            rich_help_panel=GRID,
        ),
    ] = None
    seconds: Annotated[
        float, typer.Option(help="Seconds of each workload.", rich_help_panel=GRID)
    ] = 10.0
    seed: Annotated[int, typer.Option(help="Seed of the workload.", rich_help_panel=GRID)] = 0
    ahead: Annotated[
        bool,
        typer.Option(
            help="Choose placements with separate requests, not the scored ones.",
            rich_help_panel=RUN,
        ),
    ] = False
    profile: Annotated[
        Path | None,
        typer.Option(
            help="MuxServe's step times of the A100. By default muxserve_a100_profile.json in "
            "MUXJAX_SHARED_DATA.",
            rich_help_panel=RUN,
        ),
    ] = None
    processes: Annotated[
        int, typer.Option(help="Number of worker processes.", rich_help_panel=RUN)
    ] = 2


def policy_map(
    options: MapOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write cells to this file (JSON). Cells that are already in it are not run again.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the maps (SVG).", rich_help_panel=OUTPUT_PANEL),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare `slo` with every baseline in simulation, over popularity, load and SLO scale.

    Ctrl-C keeps finished cells.
    """
    from muxjax.bench.policy_map.cells import POLICIES
    from muxjax.bench.policy_map.picture import draw_map
    from muxjax.bench.policy_map.run import MapGrid, read_map, run_jobs, select_cells
    from muxjax.bench.policy_map.scenario import Hardware, default_profile
    from muxjax.bench.policy_map.summary import print_summary, report
    from muxjax.placement.planner.plan import Execution

    if options.processes < 1:
        raise BenchError(f"--processes must be at least 1, not {options.processes}")
    names = ",".join(POLICIES) if options.policies is None else options.policies
    grid = MapGrid(
        profile=options.profile or default_profile(),
        executions=parse_choices(  # type: ignore[arg-type]  # checked
            options.execution, "--execution", get_args(Execution)
        ),
        hardware=parse_choices(  # type: ignore[arg-type]  # checked
            options.hardware, "--hardware", get_args(Hardware)
        ),
        alphas=parse_numbers(options.alpha, "--alpha") or (),
        loads=parse_numbers(options.load, "--load") or (),
        scales=parse_numbers(options.slo_scale, "--slo-scale") or (),
        policies=parse_choices(names, "--policies", POLICIES),
        seconds=options.seconds,
        seed=options.seed,
        ahead=options.ahead,
    )
    jobs = grid.jobs()
    cells = read_map(output)
    interrupted = False
    try:
        run_jobs(jobs, options.processes, cells, output)
    except KeyboardInterrupt:
        interrupted = True
        print("muxjax: interrupted; finished cells are kept", file=sys.stderr)
    selected = select_cells(cells, jobs)
    if selected:
        print_summary(selected)
        if plot is not None:
            draw_map(selected, plot)
    if as_json:
        print(json.dumps(report(selected), indent=1))
    if interrupted:
        raise typer.Exit(130)
