"""`muxjax bench steps`: times the compiled steps of a fleet and writes a profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from muxjax.cli.options import OUTPUT_PANEL, AsJson, FleetFile, register_command
from muxjax.errors import BenchError


def register(app: typer.Typer) -> None:
    """Adds the command."""
    register_command(app, steps)


def steps(
    fleet_file: FleetFile,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the profile (JSON), for `plan --profile` and `simulate`.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Number of measurements of each kind of step.")] = 5,
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Context length to measure, in tokens. May be repeated. By default eight values "
            "for each model, up to its longest sequence."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time the compiled steps of a fleet, each bucket at several context lengths.

    Each round times all kinds of steps once. Ctrl-C keeps finished rounds.
    """
    from muxjax.config.fleet_file import load_fleet_config

    if repeats < 1:
        raise BenchError(f"--repeats must be at least 1, not {repeats}")
    config = load_fleet_config(fleet_file)

    from muxjax.bench.machine import describe_machine
    from muxjax.bench.session import BenchSession
    from muxjax.bench.steps import step_rows
    from muxjax.bench.steps_run import build_session_profile, measure_steps

    with BenchSession.load(config) as session:
        measured = measure_steps(session, repeats, context)
        profile = build_session_profile(session, measured)
    if output is not None:
        from muxjax.bench.profile_file import write_profile

        write_profile(profile, output)
    rows = step_rows(measured)
    if as_json:
        report = {"kind": "steps", **describe_machine(), "steps": rows, "profile": profile}
        print(json.dumps(report, indent=2))
        return
    _show(rows)
    if output is not None:
        print(f"written to {output}")


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="steps",
        caption="medians in ms; spread: maximum minus minimum; in service: factor on the time",
    )
    for column in ("model", "phase", "bucket", "parts", "context", "ms", "spread", "in service"):
        left = column in ("model", "phase")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        prefill = row["phase"] == "prefill"
        parts = f"{row['chunks']} chunks" if prefill else f"{row['tokens']} tokens"
        spread = (row["highest_ms"] - row["lowest_ms"]) / row["median_ms"]
        table.add_row(
            row["model"],
            row["phase"] if row["samples"] else "prefill, no sampling",
            str(row["bucket"]),
            parts,
            str(row["context"]),
            f"{row['median_ms']:.3g}",
            f"{spread:.0%}",
            "" if row["in_service"] is None else f"{row['in_service']:.2f}",
        )
    console = Console()
    console.print(table)
