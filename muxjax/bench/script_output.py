"""Tables and JSON on standard output, for benchmark scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], **notes: Any
) -> None:
    """Prints rows as a table with the notes below it."""
    table = Table(title=title, caption=", ".join(f"{k} {_cell(v)}" for k, v in notes.items()))
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    Console(width=max(100, Console().width)).print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def print_json(content: Mapping[str, Any]) -> None:
    """Prints one JSON object."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
