"""`muxjax bench`: measure steps, policies and servers; report saved results."""

from __future__ import annotations

import typer

from muxjax.cli import bench_http as cli_bench_http
from muxjax.cli import bench_policies as cli_bench_policies
from muxjax.cli import bench_policy_map as cli_bench_policy_map
from muxjax.cli import bench_report as cli_bench_report
from muxjax.cli import bench_serve as cli_bench_serve
from muxjax.cli import bench_steps as cli_bench_steps
from muxjax.cli.options import GroupedGroup

app = typer.Typer(
    name="bench",
    cls=GroupedGroup,
    help="Measure steps, policies and servers, and report saved results.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def register(parent: typer.Typer) -> None:
    """Adds the `bench` group of commands."""
    parent.add_typer(app, rich_help_panel="Plan and measure")


cli_bench_steps.register(app)
cli_bench_serve.register(app)
cli_bench_http.register(app)
cli_bench_policies.register(app)
cli_bench_policy_map.register(app)
cli_bench_report.register(app)
