"""`muxjax convert`: a checkpoint written anew, in the form that loads fastest."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """What `--dtype` takes."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(convert)


def convert(
    source: Annotated[
        str,
        typer.Argument(help="As in a fleet file: a path, a Hub id, demo:NAME."),
    ],
    dest: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Of the matrices; keep: as the source has them.")
    ] = Dtype.keep,
) -> None:
    """Write a checkpoint as a MuxJAX folder (Orbax), of which devices load their parts only.

    DEST appears when it is complete.
    """
    from muxjax.models.checkpoints.convert import convert as write
    from muxjax.models.checkpoints.loading import open_checkpoint

    size = write(open_checkpoint(source), dest.expanduser().absolute(), dtype.value)
    print(f"{dest}: {size / 1e6:,.0f} MB of parameters")
