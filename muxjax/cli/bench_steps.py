"""`muxjax bench steps`: the engine's compiled steps, timed, as a profile."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muxjax.errors import BenchError

if TYPE_CHECKING:
    from muxjax.bench.session import BenchSession
    from muxjax.bench.steps import Kind, StepMeasurement


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(steps)


def steps(
    fleet_file: Annotated[Path, typer.Argument(metavar="FLEET", help="The fleet file (YAML).")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the profile (JSON) here, for `plan --profile` and `simulate`.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Steps of each kind that count: rounds.")] = 5,
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens that a sequence holds; may be repeated. By default eight for each model, "
            "up to its longest sequence."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time a fleet's compiled steps, each bucket, at several contexts.

    All kinds are timed once in each round; Ctrl-C keeps the rounds that are finished.
    """
    from muxjax.config.fleet_file import load_fleet_config

    if repeats < 1:
        raise BenchError(f"--repeats must be at least 1, not {repeats}")
    config = load_fleet_config(fleet_file)

    from muxjax.bench.machine import describe_machine
    from muxjax.bench.session import BenchSession
    from muxjax.bench.steps import step_rows

    with BenchSession.load(config) as session:
        measured = _measured(session, repeats, context)
        profile = _profile(session, measured)
    if output is not None:
        from muxjax.bench.profile_file import write_profile

        write_profile(profile, output)
    rows = step_rows(measured)
    if as_json:
        report = {"kind": "steps", **describe_machine(), "steps": rows, "profile": profile}
        print(json.dumps(report, indent=2))
        return
    _show(rows, measured)
    if output is not None:
        print(f"written to {output}")


def _measured(session: BenchSession, repeats: int, contexts: list[int] | None) -> StepMeasurement:
    """What was measured: after an interrupt, all rounds that are finished."""
    from muxjax.bench.step_recorder import measure_in_service
    from muxjax.bench.steps import StepMeasurement, step_kinds
    from muxjax.progress import Bars

    kinds = step_kinds(session, contexts)
    measured = StepMeasurement()
    try:
        with Bars({"measuring": len(kinds) * (repeats + 1)}, show=True) as bars:

            def done(kind: Kind) -> None:
                bars.advance("measuring", 1, f"{kind.model} {kind.phase} {kind.size}")

            measure_in_service(session, repeats=repeats, contexts=contexts, done=done, into=measured)
    except KeyboardInterrupt:
        if not measured.steps:
            raise
        rounds = len(measured.steps[0].seconds)
        what = f"after {rounds} of {repeats} rounds; what becomes of steps in service is left out"
        print(f"muxjax: interrupted {what}", file=sys.stderr)
    return measured


def _profile(session: BenchSession, measured: StepMeasurement) -> dict[str, Any]:
    """The profile, under the names that planning looks for."""
    from muxjax.bench.profile_file import build_profile

    kinds = {entry.name: entry.profile or entry.name for entry in session.config.models}
    return build_profile(
        {kind: measured.times(name) for name, kind in kinds.items()},
        {kind: session.specs[name].limits for name, kind in kinds.items()},
        {kind: session.models[name].max_model_len for name, kind in kinds.items()},
    )


def _show(rows: list[dict[str, Any]], measured: StepMeasurement) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="steps",
        caption="milliseconds, medians; spread: highest less lowest; in service: times as long",
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
            row["phase"] if row["samples"] else "prefill, not last",
            str(row["bucket"]),
            parts,
            str(row["context"]),
            f"{row['median_ms']:.3g}",
            f"{spread:.0%}",
            "" if row["in_service"] is None else f"{row['in_service']:.2f}",
        )
    console = Console()
    console.print(table)
