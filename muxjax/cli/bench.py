"""`muxjax bench`: steps, policies on the real engine, servers over HTTP, reports."""

from __future__ import annotations

import typer

from muxjax.cli import bench_http as cli_bench_http
from muxjax.cli import bench_report as cli_bench_report
from muxjax.cli import bench_serve as cli_bench_serve
from muxjax.cli import bench_steps as cli_bench_steps

app = typer.Typer(
    name="bench",
    help="Measure: steps, policies, servers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def register(parent: typer.Typer) -> None:
    """Adds the group of commands."""
    parent.add_typer(app)


cli_bench_steps.register(app)
cli_bench_serve.register(app)
cli_bench_http.register(app)
cli_bench_report.register(app)
