"""Options of `muxjax simulate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from muxjax.cli.options import WORKLOAD_PANEL
from muxjax.cli.plan import PLAN_PANEL, Cluster, MuxServe, Profile

KINDS = ("poisson", "gamma", "bursts", "drift")
"""Synthetic workloads; any other value of `--workload` is a trace file."""


@dataclass(frozen=True)
class PlanOptions:
    """Options of the plan that `simulate` searches for if it is given a fleet."""

    muxserve: MuxServe = None
    cluster: Cluster = None
    profile: Profile = None
    execution: Annotated[
        str | None,
        typer.Option(
            help="How programs share a device: time_sliced or concurrent. By default the "
            "execution of the plan.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = None


@dataclass(frozen=True)
class SimulateLengthOptions:
    """Length and token counts of a workload, for `simulate`."""

    seconds: Annotated[
        float | None,
        typer.Option(
            help="Length of the workload in seconds. By default 120, and longer at low rates.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    lengths: Annotated[
        Path | None,
        typer.Option(
            help="Draw the lengths of all models from this ShareGPT file (JSON).",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Count the tokens of --lengths with this tokenizer.json. By default four bytes "
            "count as a token.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    rate_scales: Annotated[
        str,
        typer.Option(
            help="Run the workload at each of these multiples of its rate.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = "0.5,1,1.5,2"
