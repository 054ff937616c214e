"""`muxjax bench report` and `muxjax bench trace`: what was saved, as tables and pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from muxjax.errors import BenchError


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(report)
    app.command()(picture)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with saved results.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for report.html and PNGs; by default DIR."),
    ] = None,
) -> None:
    """Tables and plots of saved runs: printed, and as one HTML file that needs no other."""
    from muxjax.bench.report.page import build_grids, write_report
    from muxjax.bench.report.saved import find
    from muxjax.bench.report.tables import show_grids

    found = find(folder)
    show_grids(build_grids(found))
    written = write_report(found, output or folder)
    if not written.drawn:
        print("muxjax: no plots: pip install 'muxjax[plot]' for them", file=sys.stderr)
    print(
        f"written to {written.page}" + (f" and {len(written.pictures)} PNG files" * written.drawn)
    )


def picture(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace (JSON).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture (SVG).")],
    start: Annotated[float, typer.Option(help="Seconds into the trace.")] = 0.0,
    seconds: Annotated[float | None, typer.Option(help="How much; by default all.")] = None,
    title: Annotated[str, typer.Option(help="Above the picture.")] = "",
) -> None:
    """Draw a part of a trace of `--trace`: who ran when, who waited, who held pages."""
    from muxjax.bench.report.trace_picture import trace_picture

    if seconds is not None and not seconds > 0:
        raise BenchError(f"--seconds must be above 0, not {seconds}")
    drawn = trace_picture(trace, start=start, seconds=seconds, title=title)
    try:
        output.write_text(drawn, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{output}: cannot be written: {error.strerror or error}") from error
    print(f"written to {output}")
