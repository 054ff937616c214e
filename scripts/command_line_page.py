"""Prints the options of every `muxjax` command as Markdown, for docs/reference/command-line.md."""

from __future__ import annotations

import sys
from typing import Any

import typer

from muxjax.cli.main import app


def options_table(command: Any) -> list[str]:
    """Returns a table of a command's arguments and options: name, meaning, default."""
    context = command.context_class(command, info_name=command.name)
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or "--help" in parameter.opts:
            continue
        names, meaning = (" ".join(text.split()).replace("|", "\\|") for text in record)
        rows.append(f"| `{names}` | {meaning} |")
    return ["| Argument or option | Meaning |", "|---|---|", *rows, ""] if rows else []


def sections(command: Any, path: str) -> list[str]:
    """Returns the section of a command, then those of its subcommands."""
    lines = [f"## {path}", "", command.help or "", ""]
    lines += options_table(command)
    for name, child in getattr(command, "commands", {}).items():
        lines += sections(child, f"{path} {name}")
    return lines


if __name__ == "__main__":
    root = typer.main.get_command(app)
    for name, command in root.commands.items():
        sys.stdout.write("\n".join(sections(command, f"muxjax {name}")) + "\n")
