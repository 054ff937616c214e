"""`muxjax plan` and `muxjax import-muxserve`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from muxjax.errors import FleetConfigError, PlanError

if TYPE_CHECKING:
    from muxjax.config.fleet_file import FleetConfig
    from muxjax.placement.planner.plan import PlacementPlan
    from muxjax.placement.planner.planner import PlannerOptions
    from muxjax.units.plan_inputs import PlanInputs

Fleet = Annotated[Path | None, typer.Argument(metavar="FLEET", help="The fleet file (YAML).")]
MuxServe = Annotated[
    Path | None,
    typer.Option("--muxserve", metavar="FILE", help="MuxServe's models.yaml, in place of FLEET."),
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(plan)
    app.command(name="import-muxserve")(import_muxserve)


def plan(
    fleet_file: Fleet = None,
    muxserve: MuxServe = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NxD:DEVICE",
            help="Nodes x devices, as in 4x8:a100-80gb; several with commas. By default the fleet "
            "file's, or this machine's CPU.",
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measured step times; without them: calculated."),
    ] = None,
    objective: Annotated[
        Literal["throughput", "weighted", "slo"],
        typer.Option(
            help="Requests a second served; the same weighted by rates; or those in full and "
            "within the latency targets."
        ),
    ] = "throughput",
    execution: Annotated[
        Literal["concurrent", "time_sliced"] | None,
        typer.Option(
            help="How a unit's programs share its devices: at once with shares of the compute "
            "(MuxServe; default for a profile that has shares) or in turn (MuxJAX; default)."
        ),
    ] = None,
    upstream_compatible: Annotated[
        bool,
        typer.Option(
            "--upstream-compatible", help="Place as MuxServe's own search does, to compare."
        ),
    ] = False,
    effort: Annotated[
        float, typer.Option(min=0.1, max=1000, help="2 searches twice as long.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the search.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan's file (JSON) here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Find which models share which devices, and say what that will deliver. Starts nothing."""
    from muxjax.placement.planner.planner import PlannerOptions
    from muxjax.units.plan_inputs import plan_inputs

    began = time.perf_counter()
    config = read_fleet(fleet_file, muxserve)
    inputs = plan_inputs(config, cluster=cluster, profile=profile)
    options = PlannerOptions(
        execution=execution or inputs.execution,
        objective=objective,
        effort=effort,
        seed=seed,
        as_upstream=upstream_compatible,
    )
    found = search_plan(inputs, options, began=began)
    if output is not None:
        try:
            found.save(output)
        except OSError as error:
            raise PlanError(f"{output}: cannot be written: {error.strerror or error}") from error
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return

    from rich.console import Console

    from muxjax.cli.plan_table import show_plan

    console = Console()
    show_plan(found, Console(width=120) if not sys.stdout.isatty() else console)
    if output is not None:
        console.print(f"written to {output}", highlight=False)


def search_plan(
    inputs: PlanInputs, options: PlannerOptions, *, began: float | None = None
) -> PlacementPlan:
    """A plan, with a bar on standard error while it is searched for.

    Args:
      inputs: what to plan.
      options: how.
      began: when the work began, on `time.perf_counter`'s clock, for the plan's own account.

    Raises:
      PlanError: nothing fits.
    """
    from muxjax.placement.planner.planner import plan_placement
    from muxjax.progress import Bars

    with Bars({"planning": 1000}, show=True) as bars:
        shown = 0

        def report(done: float, value: float) -> None:
            nonlocal shown
            bars.advance("planning", round(1000 * done) - shown, f"{value:.5g}")
            shown = round(1000 * done)

        return plan_placement(
            inputs.loads,
            inputs.cluster,
            inputs.costs,
            options,
            profile=inputs.profile,
            began=began,
            report=report,
        )


def read_fleet(fleet_file: Path | None, muxserve: Path | None) -> FleetConfig:
    """The fleet of one of the two files.

    Raises:
      FleetConfigError: neither or both are given, or the file is at fault.
    """
    from muxjax.config.fleet_file import load_fleet_config

    if (fleet_file is None) == (muxserve is None):
        raise FleetConfigError("give either a fleet file or --muxserve FILE")
    if fleet_file is not None:
        return load_fleet_config(fleet_file)

    from muxjax.config.muxserve_yaml import read_muxserve

    assert muxserve is not None
    try:
        return load_fleet_config(read_muxserve(muxserve))
    except FleetConfigError as error:
        text = str(error)
        known = text.startswith(str(muxserve))
        raise FleetConfigError(text if known else f"{muxserve}: {text}") from error


def import_muxserve(
    models_file: Annotated[Path, typer.Argument(metavar="MODELS", help="MuxServe's models.yaml.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the fleet file here; by default print it."),
    ] = None,
) -> None:
    """Make a fleet file from MuxServe's models.yaml."""
    import yaml

    from muxjax.config.muxserve_yaml import read_muxserve

    fleet = read_muxserve(models_file)
    read_fleet(None, models_file)  # what is written is a valid fleet file
    text = f"# Made by `muxjax import-muxserve {models_file.name}`.\n"
    text += yaml.safe_dump(fleet, sort_keys=False, default_flow_style=None, width=100)
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FleetConfigError(f"{output}: cannot be written: {error.strerror or error}") from error
