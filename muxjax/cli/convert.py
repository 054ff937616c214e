"""`muxjax convert`: writes a checkpoint in MuxJAX's format."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from muxjax.cli.options import register_command
from muxjax.termination import exit_on_signals


class Dtype(StrEnum):
    """Values of `--dtype`."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    register_command(app, convert, panel="Models and files")


def convert(
    source: Annotated[
        str,
        typer.Argument(help="The checkpoint, as in a fleet file: a path, a Hub id, or demo:NAME."),
    ],
    dest: Annotated[Path, typer.Argument(help="The new folder; it must not exist.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Type of the matrices; keep is the type of the source.")
    ] = Dtype.keep,
) -> None:
    """Convert a checkpoint to MuxJAX's format (Orbax), so that each device loads only its shards.

    DEST is created when the conversion is complete.
    """
    from muxjax.models.checkpoints.convert import convert as convert_checkpoint
    from muxjax.models.checkpoints.loading import open_checkpoint

    target = dest.expanduser().absolute()
    checkpoint = open_checkpoint(source)
    with exit_on_signals():
        size = convert_checkpoint(checkpoint, target, dtype.value)
    print(f"{dest}: {size / 1e6:,.0f} MB of parameters")
