"""`muxjax bench report` and `muxjax bench picture`: tables and plots of saved results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from muxjax.cli.options import register_command
from muxjax.errors import BenchError


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    register_command(app, report)
    register_command(app, picture)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with saved results.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for report.html and PNG files. By default DIR."
        ),
    ] = None,
) -> None:
    """Print tables of saved results and write them, with plots, to one self-contained HTML file."""
    from muxjax.bench.report.page import build_grids, write_report
    from muxjax.bench.report.saved import find_reports
    from muxjax.bench.report.tables import show_grids

    saved = find_reports(folder)
    show_grids(build_grids(saved))
    written = write_report(saved, output or folder)
    if not written.drawn:
        print("muxjax: no plots; they need matplotlib: pip install 'muxjax[plot]'", file=sys.stderr)
    print(
        f"written to {written.page}" + (f" and {len(written.pictures)} PNG files" * written.drawn)
    )


def picture(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A Chrome trace (JSON) written by --trace.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write (SVG).")],
    start: Annotated[float, typer.Option(help="Start in the trace, in seconds.")] = 0.0,
    seconds: Annotated[
        float | None, typer.Option(help="Length of the part to draw. By default the rest.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the picture.")] = "",
) -> None:
    """Draw a part of a trace: executed steps, waiting and running requests, and KV pages."""
    from muxjax.bench.report.trace_picture import trace_picture

    if seconds is not None and not seconds > 0:
        raise BenchError(f"--seconds must be above 0, not {seconds}")
    svg = trace_picture(trace, start=start, seconds=seconds, title=title)
    try:
        output.write_text(svg, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{output}: cannot be written: {error.strerror or error}") from error
    print(f"written to {output}")
