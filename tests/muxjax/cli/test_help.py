"""The help of all commands: headings in order of use, and texts that are sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from muxjax.cli.main import app

# After the last sentence of a text that Typer does not complete itself.
DEFAULT = re.compile(r"\s*\[default: [^]]+\]$")


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    children = getattr(command, "commands", {})
    if not children:
        yield path, command
    for name, child in children.items():
        yield from commands(child, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_texts_are_sentences(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    texts = {"": command.help or ""}
    texts |= {parameter.name: parameter.help or "" for parameter in command.params}
    for name, text in texts.items():
        sentence = DEFAULT.sub("", text.strip())
        assert re.match(r"[A-Z]", sentence), (name, text)
        assert sentence.endswith("."), (name, text)
        assert len(sentence.split()) >= 2, (name, text)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_options_are_in_order_of_use(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0
    headings = re.findall(r"^([A-Z][\w ]*):$", result.output, re.MULTILINE)
    assert headings[-1] == "Help"
    expected = sorted(
        headings,
        key=lambda name: {"Arguments": 0, "Options": 1, "Output": 3, "Help": 4}.get(name, 2),
    )
    assert headings == expected
    if any(parameter.param_type_name == "argument" for parameter in COMMANDS[path].params):
        assert headings[0] == "Arguments"
    for section in re.split(r"^[A-Z][\w ]*:$", result.output, flags=re.MULTILINE)[1:]:
        # A section's required options come before its others.
        entries = re.split(r"\n(?=  \S)", section.strip("\n"))
        required = ["[required]" in entry for entry in entries]
        assert required == sorted(required, reverse=True), section


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_names_no_python_types(path: tuple[str, ...]) -> None:
    output = CliRunner().invoke(app, [*path, "--help"]).output
    assert "list[" not in output
    assert " range>" not in output
