"""`muxjax plan` and `muxjax import-muxserve`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from muxjax.cli.options import OUTPUT_PANEL, AsJson, register_command
from muxjax.errors import FleetConfigError, PlanError

PLAN_PANEL = "Placement"
Fleet = Annotated[Path | None, typer.Argument(metavar="FLEET", help="The fleet file (YAML).")]
MuxServe = Annotated[
    Path | None,
    typer.Option(
        "--muxserve",
        metavar="FILE",
        help="Plan for MuxServe's models.yaml instead of a fleet file.",
        rich_help_panel=PLAN_PANEL,
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="NxD:DEVICE",
        help="Nodes x devices, for example 4x8:a100-80gb; several are separated by commas. By "
        "default the fleet file's cluster, or this machine's CPU.",
        rich_help_panel=PLAN_PANEL,
    ),
]
Profile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        metavar="FILE",
        help="Measured step times (JSON). By default step times are estimated.",
        rich_help_panel=PLAN_PANEL,
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    register_command(app, plan, panel="Plan and measure")
    register_command(app, import_muxserve, name="import-muxserve", panel="Models and files")


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search for a placement."""

    objective: Annotated[
        Literal["slo", "throughput", "weighted"],
        typer.Option(
            help="Maximize requests per second: those within the latency targets (slo, by "
            "simulation), all served requests, or the same weighted by the models' rates (both by "
            "a steady-state estimate).",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = "slo"
    execution: Annotated[
        Literal["concurrent", "time_sliced"] | None,
        typer.Option(
            help="How the programs of a unit share its devices: concurrent, with shares of the "
            "compute (MuxServe; default for a profile with shares), or time_sliced (MuxJAX; "
            "default otherwise).",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = None
    upstream_compatible: Annotated[
        bool,
        typer.Option(help="Use MuxServe's search, for comparison.", rich_help_panel=PLAN_PANEL),
    ] = False
    effort: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=1000,
            help="Factor on the duration of the search.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = 1.0
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            help="Seed of the search and of the simulated requests.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = 0


def plan(
    *,
    fleet_file: Fleet = None,
    cluster: Cluster = None,
    profile: Profile = None,
    muxserve: MuxServe = None,
    search: SearchOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the plan to this file (JSON).",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    wide: Annotated[
        bool,
        typer.Option(
            "--wide",
            help="Also show shares of time and of the KV pool, and batches.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Plan which models share which devices, and simulate the plan."""
    from muxjax.cli.plan_run import read_fleet, search_plan
    from muxjax.placement.planner.planner import PlannerOptions
    from muxjax.units.plan_inputs import plan_inputs

    config = read_fleet(fleet_file, muxserve)
    inputs = plan_inputs(config, cluster=cluster, profile=profile)
    options = PlannerOptions(
        execution=search.execution or inputs.execution,
        objective=search.objective,
        effort=search.effort,
        seed=search.seed,
        as_upstream=search.upstream_compatible,
    )
    result = search_plan(inputs, options, config.policy)
    if output is not None:
        try:
            result.save(output)
        except OSError as error:
            raise PlanError(f"{output}: cannot be written: {error.strerror or error}") from error
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
        return

    from rich.console import Console

    from muxjax.cli.plan_table import show_plan

    console = Console(width=160 if wide else None if sys.stdout.isatty() else 80)
    show_plan(result, console, wide=wide)
    if output is not None:
        console.print(f"written to {output}", highlight=False)


def import_muxserve(
    models_file: Annotated[Path, typer.Argument(metavar="MODELS", help="MuxServe's models.yaml.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the fleet file here. By default it is printed."),
    ] = None,
) -> None:
    """Convert MuxServe's models.yaml to a fleet file."""
    import yaml

    from muxjax.cli.plan_run import read_fleet
    from muxjax.config.muxserve_yaml import read_muxserve

    fleet = read_muxserve(models_file)
    read_fleet(None, models_file)  # checks that the result is a valid fleet file
    text = f"# Converted by `muxjax import-muxserve {models_file.name}`.\n"
    text += yaml.safe_dump(fleet, sort_keys=False, default_flow_style=None, width=100)
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FleetConfigError(f"{output}: cannot be written: {error.strerror or error}") from error
